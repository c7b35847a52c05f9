"""Construction of SODA from a config: on the meta device, or with initial weights on a device, and its description."""

from typing import TypeVar

import torch
from torch import nn

from config.schema import Config
from model.build import build_soda, forward_flops
from model.soda import SODA
from utils.randomness import derive_seed

NOT_LAYERS = {"weights", "frozen"}  # keys of the encoder and the decoder that do not describe their layers

M = TypeVar("M", bound=nn.Module)


def _build(config: Config) -> SODA:
    encoder, decoder = (part.model_dump(exclude=NOT_LAYERS) for part in (config.encoder, config.decoder))
    return build_soda(
        config.decoder_size, encoder, decoder, config.initialization, config.diffusion.model_dump(), config.ray_octaves
    )


def build_on_meta(config: Config) -> SODA:
    """Returns SODA on the meta device: its weights have names and shapes, but no values, and use no memory."""
    with torch.device("meta"):
        return _build(config)


def initial_soda(config: Config, device: torch.device) -> SODA:
    """Returns SODA on `device` with its initial weights. They depend only on the config, which includes the seed.

    Seeds torch's default generators.
    """
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    return to_device(_build(config), device)


def to_device(model: M, device: torch.device) -> M:
    """Moves `model` to `device`, with the memory layout that is fastest there, and returns it."""
    layout = torch.channels_last if prefers_channels_last(model, device) else torch.contiguous_format
    return model.to(device, memory_format=layout)  # type: ignore[call-overload]


def prefers_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Returns True if convolutions are faster in the channels-last memory layout (docs/performance.md).

    This is so on CUDA and, as measured on one such machine, on CPUs with AVX2 but without AVX-512.
    """
    if device.type != "cpu":
        return device.type == "cuda"
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return False
    # In torch 2.14, the backward pass of strided 1x1 convolutions with so few channels writes past its memory.
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return all(c.kernel_size != (1, 1) or c.stride == (1, 1) or c.in_channels >= 8 for c in convolutions)


def pass_flops(config: Config, soda: SODA) -> tuple[int, int, int]:
    """Returns FLOPs per image: of the encoder for one source view, of the decoder, and of the whole forward pass.

    The forward pass encodes views.num_sources views. With data.name=posed, this is the largest number of a training
    step. `soda` may be on the meta device.
    """
    encoder, decoder = forward_flops(soda, config.encoder_size, config.decoder_size, config.ray_octaves)
    return encoder, decoder, config.views.num_sources * encoder + decoder


def step_flops(config: Config, soda: SODA) -> int:
    """Returns the FLOPs of a training step per image.

    A backward pass takes about twice the FLOPs of a forward pass. A frozen encoder has none. `soda` may be on the meta
    device.
    """
    _, decoder, whole = pass_flops(config, soda)
    return 2 * (decoder if config.encoder.frozen else whole) + whole


def describe_model(config: Config) -> str:
    """Returns a text with the number of parameters, the image size and the FLOPs per image of encoder and decoder.

    If decoder.modulation is sectioned, the text also lists the section of z that modulates each layer of the decoder.
    """
    soda = build_on_meta(config)
    sizes = config.encoder_size, config.decoder_size
    *flops, _ = pass_flops(config, soda)
    lines = []
    modules = {"encoder": soda.encoder, "decoder": soda.decoder}
    for (name, module), size, work in zip(modules.items(), sizes, flops, strict=True):
        parameters = sum(p.numel() for p in module.parameters())
        lines.append(
            f"{name}: {parameters:,} parameters, {work / 1e9:#.4g} GFLOP per image of {size} px in a forward pass"
        )
    most = "up to " if config.data.has_cameras else ""
    views = f" and {most}{config.views.num_sources} source views" if config.views.num_sources > 1 else ""
    lines.append(f"training: about {step_flops(config, soda) / 1e9:#.4g} GFLOP per image{views}, forward and backward")
    if config.decoder.modulation == "sectioned":
        row = "{:<10}{:>5}{:>10}{:>9}  {}".format
        lines += ["", row("layer", "px", "channels", "section", "dimensions of z (width)")]
        for layer in soda.decoder.layers():
            start, stop = layer.dims.start, layer.dims.stop
            dims = f"{start} to {stop - 1} ({stop - start})"
            lines.append(row(layer.name, layer.resolution, layer.channels, layer.section, dims))
    return "\n".join(lines)
