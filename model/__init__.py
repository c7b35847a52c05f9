"""The model: a source view in, a latent; a noised target view in, its noise. It knows nothing of how it is run."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.diffusion import GaussianDiffusion
from model.encoder import ResNetEncoder
from model.initialization import Initialization, initialize_as_paper
from model.soda import SODA
from model.unet import UNetDecoder

__all__ = ["SODA", "GaussianDiffusion", "ResNetEncoder", "UNetDecoder", "build_soda", "forward_flops"]


def build_soda(
    image_size: int, encoder: dict[str, Any], decoder: dict[str, Any], initialization: Initialization = "default"
) -> SODA:
    """SODA from the config's `encoder` and `decoder` sections and `initialization` key."""
    as_paper = initialization == "paper"
    latent_dim = encoder["latent_dim"]
    soda = SODA(
        ResNetEncoder(**encoder),
        UNetDecoder(image_size=image_size, latent_dim=latent_dim, rescale_residual=as_paper, **decoder),
    )
    if as_paper:
        initialize_as_paper(soda)
    return soda


def forward_flops(soda: SODA, image_size: int) -> tuple[int, int]:
    """FLOPs of one image's forward pass in the encoder and in the decoder; a multiply-add counts as two.

    `soda` may lie on the meta device: nothing is computed there, only counted.
    """
    device = next(soda.parameters()).device
    image = torch.zeros(1, 3, image_size, image_size, device=device)
    z = torch.zeros(1, soda.encoder.fc.out_features, device=device)
    was_training = soda.training
    soda.eval()  # BatchNorm over one image on a 1x1 map refuses to train
    counts = []
    for module, inputs in [(soda.encoder, (image,)), (soda.decoder, (image, torch.zeros(1, device=device), z))]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs)
        counts.append(counter.get_total_flops())
    soda.train(was_training)
    return counts[0], counts[1]
