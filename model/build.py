"""SODA from the settings of a config, and its work per image."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.decoder import UNetDecoder
from model.encoder import ENCODERS
from model.initialization import initialize_as_paper
from model.names import Initialization
from model.soda import SODA


def build_soda(
    decoder_size: int, encoder: dict[str, Any], decoder: dict[str, Any], initialization: Initialization = "default"
) -> SODA:
    """SODA with the initial weights that torch's default generator draws.

    Args:
        decoder_size: height and width in pixels of the images that the decoder denoises.
        encoder, decoder: the keys of the config's sections.
    """
    as_paper = initialization == "paper"
    latent_dim = encoder["latent_dim"]
    soda = SODA(
        ENCODERS[encoder["architecture"]](**encoder),
        UNetDecoder(image_size=decoder_size, latent_dim=latent_dim, rescale_residual=as_paper, **decoder),
    )
    if as_paper:
        initialize_as_paper(soda)
    return soda


def forward_flops(soda: SODA, encoder_size: int, decoder_size: int) -> tuple[int, int]:
    """FLOPs of one image's forward pass in the encoder and in the decoder; a multiply-add counts as two.

    `soda` may lie on the meta device: nothing is computed there, only counted.
    """
    device = next(soda.parameters()).device
    x_source, x_t = (torch.zeros(1, 3, size, size, device=device) for size in (encoder_size, decoder_size))
    z = torch.zeros(1, soda.encoder.latent_dim, device=device)
    was_training = soda.training
    soda.eval()  # BatchNorm over one image on a 1x1 map refuses to train
    counts = []
    for module, inputs in [(soda.encoder, (x_source,)), (soda.decoder, (x_t, torch.zeros(1, device=device), z))]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs)
        counts.append(counter.get_total_flops())
    soda.train(was_training)
    return counts[0], counts[1]
