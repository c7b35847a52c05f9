"""Checks between keys of a config; the range of a single key is in the schema."""

import math
from typing import Any

from model.sizes import last_strided_input, num_decoder_blocks, resolutions


def check_consistency(config: Any) -> None:
    """Raise ValueError, with advice, if keys of a `Config` contradict each other."""
    size, decoder, num_levels = config.decoder_size, config.decoder, len(config.decoder.channel_mult)
    halvings = num_levels - 1
    if size % 2**halvings:
        raise ValueError(
            f"data.image_size {size} cannot be halved {halvings} times, as decoder.channel_mult asks: "
            f"take a multiple of {2**halvings}, or fewer levels"
        )
    levels = resolutions(size, num_levels)
    for resolution in decoder.attn_resolutions:
        if resolution not in levels:
            raise ValueError(f"decoder.attn_resolutions: {resolution} is none of the decoder's {levels}")
    attended = [
        decoder.model_channels * multiple
        for multiple, resolution in zip(decoder.channel_mult, levels, strict=True)
        if resolution in decoder.attn_resolutions or resolution == levels[-1]
    ]
    for channels in attended:
        if decoder.num_head_channels and channels % decoder.num_head_channels:
            raise ValueError(f"decoder.num_head_channels does not divide the {channels} channels that attend")
    sections = decoder.num_sections
    if config.encoder.latent_dim < sections:
        raise ValueError(
            f"encoder.latent_dim {config.encoder.latent_dim} is too few for the {sections} sections of "
            f"decoder.modulation sectioned: take at least {sections}"
        )
    if config.training.mask.section_probability and decoder.modulation == "shared":
        raise ValueError("training.mask.section_probability needs decoder.modulation sectioned")
    by_section = len(config.sampling.guidance_scale) > 1 or config.sampling.sections is not None
    if by_section and decoder.modulation == "shared":
        raise ValueError("sampling by sections (guidance_scale, sections) needs decoder.modulation sectioned")
    if len(config.sampling.guidance_scale) not in (1, sections):
        raise ValueError(f"sampling.guidance_scale is one number, or one for each of the latent's {sections} sections")
    if not set(config.sampling.sections or []) <= set(range(sections)):
        raise ValueError(f"sampling.sections {config.sampling.sections}: the latent's sections are 0 to {sections - 1}")
    if config.evaluation.features.startswith("decoder."):
        _, part, rest = config.evaluation.features.split(".")
        index, timestep = map(int, rest.split("@"))
        blocks = num_decoder_blocks(part, num_levels, decoder.num_res_blocks)
        if index >= blocks or timestep >= config.diffusion.num_timesteps:
            raise ValueError(
                f"evaluation.features {config.evaluation.features}: the decoder has {part}.0 to {part}.{blocks - 1}, "
                f"and timesteps go from 0 to {config.diffusion.num_timesteps - 1}"
            )
    # On some CPUs the bf16 gradient of a strided 3x3 convolution on a 1x1 map is garbage.
    if "resnet" in config.encoder.architecture and last_strided_input(config.encoder_size, config.encoder.stem) == 1:
        hint = "" if config.encoder.stem == "small" else ", or encoder.stem small"
        raise ValueError(
            f"data.image_size {config.encoder_size} leaves the encoder's last strided convolution a 1x1 map: "
            f"take larger images{hint} (encoder.stem is {config.encoder.stem})"
        )
    if config.data.stream and config.data.name not in ("tiny", "folder"):
        raise ValueError(f"data.stream is for data sets of image files, tiny and folder, not for {config.data.name}")
    if config.training.micro_batch_size and config.training.batch_size % config.training.micro_batch_size:
        raise ValueError("training.micro_batch_size must divide training.batch_size")
    if config.sampling.num_sampling_steps > config.diffusion.num_timesteps:
        raise ValueError("sampling.num_sampling_steps must be at most diffusion.num_timesteps")
    if config.diffusion.beta_end < config.diffusion.beta_start:
        raise ValueError("diffusion.beta_end must be at least diffusion.beta_start")
    diffusion, mean_beta = config.diffusion, (config.diffusion.beta_start + config.diffusion.beta_end) / 2
    # About log alphas_cumprod of the last timestep. The sampler divides by its root, and float32 ends at exp(-87).
    if diffusion.schedule == "linear" and diffusion.num_timesteps * math.log1p(-mean_beta) < -150:
        raise ValueError("diffusion: the linear schedule ends where float32 does: set beta_end lower")
    if config.evaluation.knn.weights == "temperature" and not config.evaluation.normalize:
        raise ValueError("evaluation.knn.weights temperature needs evaluation.normalize true")
