"""SODA as a config describes it: built without numbers, described, with its initial weights, on a device."""

import torch

from config.schema import Config
from model.build import build_soda, forward_flops
from model.soda import SODA
from utils.randomness import derive_seed


def _build(config: Config) -> SODA:
    encoder, decoder = config.encoder.model_dump(), config.decoder.model_dump()
    return build_soda(config.decoder_size, encoder, decoder, config.initialization)


def build_on_meta(config: Config) -> SODA:
    """SODA on the meta device: names and shapes without numbers, which cost nothing."""
    with torch.device("meta"):
        return _build(config)


def initial_soda(config: Config, device: torch.device) -> SODA:
    """SODA with its initial weights, which depend only on the config and its seed."""
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    return to_device(_build(config), device)


def to_device(soda: SODA, device: torch.device) -> SODA:
    """`soda` on `device`, channels last on CUDA and contiguous elsewhere, as is fastest."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return soda.to(device, memory_format=layout)  # type: ignore[call-overload]


def describe_model(config: Config) -> str:
    """Parameters of encoder and decoder, their work per image, and the section of z that modulates each layer."""
    soda = build_on_meta(config)
    flops = forward_flops(soda, config.encoder_size, config.decoder_size)
    lines = []
    for name, module, work in zip(("encoder", "decoder"), (soda.encoder, soda.decoder), flops, strict=True):
        parameters = sum(p.numel() for p in module.parameters())
        lines.append(f"{name}: {parameters:,} parameters, {work / 1e9:.3f} GFLOP forward an image")
    lines.append(f"training: about {3 * sum(flops) / 1e9:.2f} GFLOP an image, forward and backward")
    if config.decoder.modulation == "sectioned":
        row = "{:<10}{:>5}{:>10}{:>9}  {}".format
        lines += ["", row("layer", "px", "channels", "section", "dimensions of z (width)")]
        for layer in soda.decoder.layers():
            start, stop = layer.dims.start, layer.dims.stop
            dims = f"{start} to {stop - 1} ({stop - start})"
            lines.append(row(layer.name, layer.resolution, layer.channels, layer.section, dims))
    return "\n".join(lines)
