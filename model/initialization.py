"""Alternatives to the default initial weights of the modules: the paper's, and those of torch."""

import math

from torch import nn

from model.blocks import ZeroConv2d
from model.soda import SODA

TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
"""Standard deviation, 0.8796, of a standard normal distribution truncated to [-2, 2]."""


def initialize_as_paper(soda: SODA) -> None:
    """Initialises the encoder with Xavier, the decoder with a truncated normal distribution, and all biases with zero.

    Two facts are known of the paper's initialisation: the names of these two methods, and the division of residual sums
    by sqrt(2). The decoder divides them if `rescale_residual` is True. The details are choices of this project:

    - Encoder: the uniform version of Xavier (Glorot & Bengio 2010).
    - Decoder: a normal distribution truncated at two of its standard deviations. After the truncation, the standard
      deviation is 1 / sqrt(fan in) (lecun_normal in JAX).
    - No convolution starts at zero, because the division by sqrt(2) assumes that both summands have a similar size.
    """
    for part, is_encoder in ((soda.encoder, True), (soda.decoder, False)):
        for module in part.modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            if is_encoder:
                nn.init.xavier_uniform_(module.weight)
            else:
                std = 1 / math.sqrt(module.weight[0].numel()) / TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialize_zeros_as_torch(soda: SODA) -> None:
    """Initialises the layers that start at zero as torch initialises every convolution."""
    for module in soda.modules():
        if isinstance(module, ZeroConv2d):
            module.reset_as_torch()
