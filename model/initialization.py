"""The paper's initial weights, beside the default ones that the modules give themselves."""

import math

from torch import nn

from model.soda import SODA

TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
"""Standard deviation, 0.8796, of a standard normal that is cut off at 2 on either side."""


def initialize_as_paper(soda: SODA) -> None:
    """Xavier for the encoder, a truncated normal for the decoder; biases are zero.

    What is known of the paper's is these names, and that residual connections are rescaled by sqrt 2, which the
    decoder's `rescale_residual` does. Taken here: Xavier's uniform distribution (Glorot & Bengio 2010); a normal one
    cut off at two of its deviations, of deviation 1 / sqrt(fan in) after the cut (JAX's lecun_normal). No convolution
    starts at zero: the ends of the residual branches have the size that dividing by sqrt 2 presumes.
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
