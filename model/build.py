"""Construction of encoders and of SODA from the keys of a config, and their FLOPs per image."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.decoder import UNetDecoder
from model.diffusion import log_sigmas
from model.encoder import Encoder
from model.initialization import initialize_as_paper, initialize_zeros_as_torch
from model.names import Architecture, Initialization
from model.rays import COLOR_CHANNELS, RAY_CHANNELS, ImageConv2d, input_channels
from model.resnets import ARCHITECTURES, WIDENING, ResNetEncoder, WideResNetEncoder
from model.soda import SODA

ENCODERS: dict[Architecture, type[Encoder]] = {
    **dict.fromkeys(ARCHITECTURES, ResNetEncoder),
    **dict.fromkeys(WIDENING, WideResNetEncoder),
}
"""Encoder class of each value of `encoder.architecture`."""


def build_encoder(encoder: dict[str, Any], diffusion: dict[str, Any] | None, ray_octaves: int | None = None) -> Encoder:
    """Builds an encoder. Its initial weights are drawn from torch's default generator.

    Args:
        encoder: keys and values of the `encoder` section of the config that describe layers.
        diffusion: keys and values of the `diffusion` section. Only a time-dependent encoder needs them.
        ray_octaves: octaves of the encoding of rays (model/rays.py); None: images have no rays.
    """
    layers = {name: value for name, value in encoder.items() if name != "time_dependent"}
    if encoder.get("time_dependent"):
        assert diffusion is not None, "a time-dependent encoder needs the noise schedule"
        layers["log_sigmas"] = log_sigmas(**diffusion)
    return ENCODERS[encoder["architecture"]](**layers, ray_octaves=ray_octaves)


def build_soda(
    decoder_size: int,
    encoder: dict[str, Any],
    decoder: dict[str, Any],
    initialization: Initialization = "default",
    diffusion: dict[str, Any] | None = None,
    ray_octaves: int | None = None,
) -> SODA:
    """Builds SODA. Its initial weights are drawn from torch's default generator.

    Args:
        decoder_size: height and width in pixels of the images that the decoder denoises.
        encoder, decoder: keys and values of the `encoder` and `decoder` sections of the config that describe layers.
            `decoder_size` replaces `decoder.image_size`, which may be null.
        initialization: `default`, `torch` or `paper` (model/initialization.py).
        diffusion: keys and values of the `diffusion` section. Only a time-dependent encoder needs them.
        ray_octaves: octaves of the encoding of rays in encoder and decoder; None: images have no rays.
    """
    as_paper = initialization == "paper"
    source = build_encoder(encoder, diffusion, ray_octaves)
    layers = {name: value for name, value in decoder.items() if name != "cross_attention"} | {
        "image_size": decoder_size,
        "latent_dim": source.latent_dim,
        "rescale_residual": as_paper,
        "ray_octaves": ray_octaves,
        "token_dim": source.pooled_dim if decoder.get("cross_attention") else None,
    }
    soda = SODA(source, UNetDecoder(**layers))
    if as_paper:
        initialize_as_paper(soda)
    elif initialization == "torch":
        initialize_zeros_as_torch(soda)
    for part in soda.modules():
        if isinstance(part, ImageConv2d):
            part.balance()
    return soda


def forward_flops(soda: SODA, encoder_size: int, decoder_size: int, ray_octaves: int | None = None) -> tuple[int, int]:
    """Returns the FLOPs of a forward pass for one image: (encoder, decoder). A multiply-add counts as two FLOPs.

    `soda` may be on the meta device. In that case, operations are counted but not computed.
    """
    device = next(soda.parameters()).device

    def images(channels: int, size: int) -> Tensor:
        return torch.zeros(1, channels, size, size, device=device)

    x_source, x_t = images(input_channels(ray_octaves), encoder_size), images(COLOR_CHANNELS, decoder_size)
    rays = None if ray_octaves is None else images(RAY_CHANNELS, decoder_size)
    timesteps = torch.zeros(1, dtype=torch.int64, device=device)
    z = torch.zeros(1, soda.encoder.latent_dim, device=device)
    was_training = soda.training
    tokens = soda.eval().tokens(x_source[None])
    soda.train(was_training)
    decoder = module_flops(soda.decoder, x_t, timesteps, z, rays, tokens)
    return module_flops(soda.encoder, x_source, timesteps), decoder


def module_flops(module: nn.Module, *inputs: Tensor | None) -> int:
    """Returns the FLOPs of a forward pass. A multiply-add counts as two FLOPs. All may be on the meta device."""
    was_training = module.training
    module.eval()  # in training mode, BatchNorm raises an error for a single image with a 1x1 feature map
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    module.train(was_training)
    return counter.get_total_flops()
