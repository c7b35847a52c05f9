"""Checks of keys that depend on each other. The range of a single key is in the schema."""

import math
from typing import Any, get_args

from model.names import WideResNet
from model.sizes import last_strided_input, num_decoder_modules, resolutions

# Keys of `data` that only these data sets use.
ONLY_FOR = {
    "holdout": ("folder", "posed"),
    "labels": ("folder",),
    "pose": ("posed",),
    "focal": ("posed",),
    "split": ("posed",),
}
# Keys of a view that move or hide pixels, with the value that turns each off: with cameras, every pixel must stay on
# its ray.
UNMOVED = {
    "crop_flip_probability": 0,
    "shift_pixels": 0,
    "randaugment_probability": 0,
    "affine_probability": 0,
    "cutout": 0,
}


def check_consistency(config: Any) -> None:
    """Raises ValueError, with advice, if keys of a `Config` contradict each other."""
    check_images_and_encoder(config)
    check_noise_schedule(config.diffusion)
    check_rates(config)
    size, decoder, num_levels = config.decoder_size, config.decoder, len(config.decoder.channel_mult)
    halvings = num_levels - 1
    halved = range(2**halvings, config.encoder_size + 1, 2**halvings)
    divisors = [each for each in halved if each >= 4 and config.encoder_size % each == 0]
    if config.encoder_size % size:
        hint = f", or decoder.image_size to one of {divisors}" if divisors else ""
        raise ValueError(
            f"decoder.image_size {size} does not divide data.image_size {config.encoder_size}: "
            f"set data.image_size to a multiple of {size}{hint}"
        )
    if size % 2**halvings:
        name = "decoder.image_size" if decoder.image_size else "data.image_size"
        advice = f"take a multiple of {2**halvings}"
        if decoder.image_size:
            advice = f"take one of {divisors}" if divisors else "take another data.image_size"
        raise ValueError(
            f"{name} {size} cannot be halved {halvings} times, as decoder.channel_mult requires: "
            f"{advice}, or fewer levels in decoder.channel_mult"
        )
    levels = resolutions(size, num_levels)
    for resolution in decoder.attn_resolutions:
        if resolution not in levels:
            raise ValueError(
                f"decoder.attn_resolutions: {resolution} is none of the decoder's sizes: choose from {levels}"
            )
    attended = [
        decoder.model_channels * multiple
        for multiple, resolution in zip(decoder.channel_mult, levels, strict=True)
        if resolution in decoder.attn_resolutions or resolution == levels[-1]
    ]
    for channels in attended:
        if decoder.num_head_channels and channels % decoder.num_head_channels:
            raise ValueError(
                f"decoder.num_head_channels does not divide the {channels} channels of a level with self-attention: "
                "choose a divisor"
            )
    sections = decoder.num_sections
    if config.encoder.latent_dim < sections:
        raise ValueError(
            f"encoder.latent_dim {config.encoder.latent_dim} is too small for the {sections} sections of "
            f"decoder.modulation=sectioned: take at least {sections}"
        )
    if config.training.mask.section_probability and decoder.modulation == "shared":
        raise ValueError("training.mask.section_probability needs decoder.modulation=sectioned: set both, or neither")
    if config.training.terms.kl and not config.encoder.probabilistic:
        raise ValueError("training.terms.kl needs encoder.probabilistic=true: set both, or neither")
    if config.data.has_cameras:
        check_cameras(config)
    for name in () if config.data.has_cameras else ("canonical", "ray_octaves"):
        if getattr(config.views, name) != type(config.views).model_fields[name].default:
            raise ValueError(f"views.{name} is for data.name=posed, not for {config.data.name}: remove it")
    if decoder.cross_attention:
        check_cross_attention(config)
    if config.views.same:
        check_same_view(config)
    timesteps = config.evaluation.timesteps
    if timesteps and max(timesteps) >= config.diffusion.num_timesteps:
        raise ValueError(
            f"evaluation.timesteps names timestep {max(timesteps)}: timesteps go from 0 to "
            f"{config.diffusion.num_timesteps - 1}"
        )
    if timesteps and not config.encoder.time_dependent:
        raise ValueError("evaluation.timesteps needs encoder.time_dependent=true: set both, or neither")
    by_section = len(config.sampling.guidance_scale) > 1 or config.sampling.sections is not None
    if by_section and decoder.modulation == "shared":
        raise ValueError(
            "a list in sampling.sections or sampling.guidance_scale needs decoder.modulation=sectioned: remove the list"
        )
    if len(config.sampling.guidance_scale) not in (1, sections):
        raise ValueError(
            f"sampling.guidance_scale must be one number, or a list of {sections}, one for each section of the latent"
        )
    if not set(config.sampling.sections or []) <= set(range(sections)):
        raise ValueError(
            f"sampling.sections {config.sampling.sections} names a section that does not exist: the latent's sections "
            f"are 0 to {sections - 1}"
        )
    if config.evaluation.features.startswith("decoder."):
        _, part, rest = config.evaluation.features.split(".")
        index, timestep = map(int, rest.split("@"))
        blocks = num_decoder_modules(part, num_levels, decoder.num_res_blocks)
        if index >= blocks or timestep >= config.diffusion.num_timesteps:
            raise ValueError(
                f"evaluation.features {config.evaluation.features} does not exist: the decoder has {part}.0 to "
                f"{part}.{blocks - 1}, and timesteps go from 0 to {config.diffusion.num_timesteps - 1}"
            )
    if config.training.micro_batch_size and config.training.batch_size % config.training.micro_batch_size:
        raise ValueError("training.micro_batch_size must divide training.batch_size: change one of them")
    if config.sampling.num_sampling_steps > config.diffusion.num_timesteps:
        raise ValueError("sampling.num_sampling_steps must be at most diffusion.num_timesteps: lower it")
    if config.evaluation.knn.weights == "temperature" and not config.evaluation.normalize:
        raise ValueError(
            "evaluation.knn.weights=temperature needs evaluation.normalize=true: set it, or choose uniform weights"
        )


def check_images_and_encoder(config: Any) -> None:
    """Raises ValueError, with advice, if keys of `data` and `encoder` contradict each other."""
    stored_size = config.data.stored_size
    if stored_size is not None and stored_size < config.encoder_size:
        raise ValueError(
            f"data.stored_size {stored_size} is smaller than data.image_size {config.encoder_size}: set it to at least "
            f"{config.encoder_size}, or remove it"
        )
    encoder = config.encoder
    for name in ("stem", "width"):
        value, default = getattr(encoder, name), type(encoder).model_fields[name].default
        if encoder.architecture in get_args(WideResNet) and value != default:
            raise ValueError(
                f"encoder.{name}={value} is for torchvision's ResNets, not for {encoder.architecture}: "
                f"set encoder.{name}={default}, the default"
            )
    # On some CPUs, the bf16 gradient of a strided 3x3 convolution on a 1x1 map is wrong.
    if "resnet" in encoder.architecture and (
        last_strided_input(config.encoder_size, encoder.architecture, encoder.stem) == 1
    ):
        hint = "" if encoder.stem == "small" else ", or set encoder.stem=small"
        raise ValueError(
            f"data.image_size {config.encoder_size} is too small for encoder.stem={encoder.stem}, because the "
            f"encoder's last strided convolution gets a 1x1 map: take larger images{hint}"
        )
    data = config.data
    if data.stream and not data.is_of_files:
        raise ValueError(
            f"data.stream is for data sets of image files, tiny, folder and posed, not for {data.name}: remove it"
        )
    for name, users in ONLY_FOR.items():
        if data.name not in users and getattr(data, name) != type(data).model_fields[name].default:
            raise ValueError(f"data.{name} is for data.name={' or '.join(users)}, not for {data.name}: remove it")
    if data.has_cameras and not data.pose:
        raise ValueError(
            "data.name=posed needs data.pose, which says how file names give the cameras: set it, for example "
            "data.pose={polar}-{azimuth}"
        )


def check_noise_schedule(diffusion: Any) -> None:
    """Raises ValueError, with advice, if keys of the noise schedule contradict each other."""
    if diffusion.beta_end < diffusion.beta_start:
        raise ValueError("diffusion.beta_end must be at least diffusion.beta_start: raise beta_end")
    if diffusion.sigma_max <= diffusion.sigma_min:
        raise ValueError("diffusion.sigma_max must be larger than diffusion.sigma_min: raise sigma_max")
    mean_beta = (diffusion.beta_start + diffusion.beta_end) / 2
    # T log(1 - mean beta) is about log alphas_cumprod of the last timestep. The sampler divides by the square root of
    # alphas_cumprod, and the smallest normal float32 is about exp(-87).
    if diffusion.schedule == "linear" and diffusion.num_timesteps * math.log1p(-mean_beta) < -150:
        raise ValueError(
            "alphas_cumprod of the linear schedule's last timestep is too small for float32: lower diffusion.beta_end"
        )


def check_rates(config: Any) -> None:
    """Raises ValueError, with advice, if keys of `optimizer` and `training.epochs` contradict each other."""
    if config.optimizer.cooldown_epochs and config.optimizer.schedule != "constant":
        raise ValueError("optimizer.cooldown_epochs needs optimizer.schedule=constant: set both, or neither")
    rising_and_falling = config.optimizer.warmup_epochs + config.optimizer.cooldown_epochs
    if config.optimizer.cooldown_epochs and rising_and_falling > config.training.epochs:
        raise ValueError(
            f"optimizer.warmup_epochs and optimizer.cooldown_epochs add up to {rising_and_falling:g} epochs, more than "
            f"the {config.training.epochs} of training.epochs: lower one of the two"
        )


def check_cameras(config: Any) -> None:
    """Raises ValueError if keys of a `Config` contradict the cameras of its data set."""
    views = {"source": config.views.source, "target": config.views.target, "probe": config.views.probe}
    moved = [
        f"views.{part}.{name}={value}"
        for part, view in views.items()
        for name, value in UNMOVED.items()
        if getattr(view, name) != value
    ]
    if moved:
        raise ValueError(
            f"{moved[0].split('=')[0]} moves or hides pixels, but with data.name=posed each pixel belongs to a ray: "
            f"set {' '.join(moved)}"
        )
    if config.views.same:
        raise ValueError("views.same contradicts data.name=posed, whose views are different photographs: remove it")
    if config.encoder.time_dependent:
        raise ValueError("encoder.time_dependent is for images without cameras, not for data.name=posed: remove it")
    if config.evaluation.features.startswith("decoder."):
        raise ValueError(
            f"evaluation.features={config.evaluation.features} is for images without cameras, not for data.name=posed: "
            "choose z or pooled"
        )


def check_cross_attention(config: Any) -> None:
    """Raises ValueError if decoder.cross_attention contradicts other keys of a `Config`."""
    if not config.data.has_cameras:
        raise ValueError("decoder.cross_attention is for data.name=posed: remove it")
    if config.decoder.modulation != "shared":  # the feature map has no sections
        raise ValueError(
            "decoder.cross_attention needs decoder.modulation=shared: remove decoder.cross_attention, or the modulation"
        )


def check_same_view(config: Any) -> None:
    """Raises ValueError if views.same contradicts other keys of a `Config`."""
    views = config.views
    if views.num_sources > 1:
        raise ValueError("views.same needs views.num_sources=1: set both, or neither")
    source, target = views.source.model_dump(exclude={"noise_std"}), views.target.model_dump()
    other = next((name for name in target if source[name] != target[name]), None)
    if other:
        raise ValueError(
            f"views.same needs one augmentation, but views.source.{other} is {source[other]} and views.target.{other} "
            f"is {target[other]}: set them to one value"
        )
    in_pixels = next((name for name in ("shift_pixels", "blur_probability") if target[name]), None)
    if in_pixels and config.data.stored_size and config.decoder_size != config.encoder_size:
        raise ValueError(
            f"views.same contradicts views.target.{in_pixels}, because data.stored_size cuts source and target in "
            "different sizes, and shifts and blur are in pixels: set it to 0, or remove data.stored_size"
        )
