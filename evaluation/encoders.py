"""Encoders for the judge: a trained model, a model with re-estimated BatchNorm statistics, and the two baselines."""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.features import feature_name
from evaluation.protocols import config_protocols
from experiment.batch import draw_source, read_pixels
from experiment.models import initial_soda
from experiment.opening import Experiment
from model.decoder import UNetDecoder
from model.soda import SODA
from utils.device import autocast, memory_for
from utils.randomness import image_noise

SETTLING_PASSES = 20
SETTLING_IMAGES = 512  # at most; the batches of large runs would fill the memory of a rank
MAX_RAW_PIXELS = 2**30  # largest number of raw-pixel values of a complete split: 4 GB in float32

Encode = Callable[[Tensor, range], Mapping[str, Tensor]]
"""Function (views (N, 3, H, W), or (N, 9, H, W) with rays, their indices in the split) -> {name: features (N, D)}."""


def encode_with(experiment: Experiment, soda: SODA) -> Encode:
    """Returns a function that computes the features of `soda`, in evaluation mode and under the experiment's autocast.

    The features are "z" and "pooled" of the encoder, or those at each judged timestep, such as "z@500". If
    `evaluation.features` names features of the decoder, these are added.
    """
    features = experiment.config.evaluation.features
    encoders = {
        timestep: soda.encoder if timestep is None else soda.encoder.at(timestep)
        for timestep in experiment.config.judged_timesteps
    }

    def encode(views: Tensor, indices: range) -> dict[str, Tensor]:
        soda.eval()
        found: dict[str, Tensor] = {}
        with torch.no_grad(), autocast(experiment.device, experiment.amp_dtype):
            for timestep, encoder in encoders.items():
                found |= {feature_name(kind, timestep): each for kind, each in encoder.features(views).items()}
            if features.startswith("decoder."):
                found[features] = decoder_features(experiment, soda.decoder, views, indices, features)
        return found

    return encode


def decoder_features(experiment: Experiment, decoder: UNetDecoder, views: Tensor, indices: range, name: str) -> Tensor:
    """Maps views (N, 3, H, W) to the output of a decoder block, averaged over its pixels: (N, C) float32.

    The decoder denoises the views with the null latent. In training, it receives the null latent with probability
    `training.mask.latent_probability`. These are the features of Denoising Diffusion Autoencoders (Xiang et al. 2023).
    The noise depends only on the seed and the sample's index in its split, so it is the same in every call.

    Args:
        name: decoder.<block>@<timestep>: name of the block, and timestep of the noise that is added to the views.
    """
    block, timestep = name.removeprefix("decoder.").split("@")
    x_start = experiment.views.x_start_of(views)
    noise = image_noise(x_start.shape[1:], indices, experiment.config.seed, "features", device=views.device)
    timesteps = torch.full((len(views),), int(timestep), device=views.device)
    z = torch.zeros(len(views), experiment.config.encoder.latent_dim, device=views.device)
    x_t = experiment.diffusion.q_sample(x_start, timesteps, noise)
    return decoder.features(x_t, timesteps, z, block).float().mean(dim=(2, 3))


@torch.no_grad()
def settled(experiment: Experiment, soda: SODA) -> SODA:
    """Returns a model with the decoder of `soda` and a copy of its encoder with settled BatchNorm statistics.

    The running statistics are replaced by their means over SETTLING_PASSES forward passes in training mode. A pass is
    over the source views of one batch, but of at most SETTLING_IMAGES images. They have timesteps that are spread
    evenly, in case the encoder depends on the timestep. Every rank encodes all of these images, because statistics of
    one rank's share would depend on the number of ranks.
    """
    encoder = copy.deepcopy(soda.encoder).train()
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # cumulative average, in which the initial statistics have no weight
    positions = range(min(experiment.loader.batch_size, SETTLING_IMAGES))
    timesteps = torch.tensor(positions, device=experiment.device) * experiment.diffusion.num_timesteps // len(positions)
    steps = range(SETTLING_PASSES)
    with memory_for(lambda: "use another device, because BatchNorm's statistics need a complete batch"):
        for step, pixels in zip(steps, read_pixels(experiment, ((step, positions) for step in steps)), strict=True):
            encoder(draw_source(experiment, pixels, step, positions), timesteps)
    return SODA(encoder, soda.decoder)


def raw_pixels(views: Tensor, num_images: int) -> Tensor:
    """Returns the colours of views (N, 3, H, W), or (N, 9, H, W) with rays, as features (N, 3 * size * size).

    Views larger than 32 px are reduced to 32 px by averaging. For very large data sets, the size is halved until the
    features of `num_images` images are at most MAX_RAW_PIXELS values in total.
    """
    size = min(views.shape[-1], 32)
    while 3 * size**2 * num_images > MAX_RAW_PIXELS:
        size //= 2
    return F.adaptive_avg_pool2d(views[:, :3], size).flatten(1)


def baselines(experiment: Experiment) -> dict[str, Encode]:
    """Returns the baselines: the untrained model, with the random weights of this seed, and the raw pixels.

    BatchNorm's running statistics start at mean 0 and variance 1. With these, the untrained model would be too weak a
    baseline, so its statistics are settled first. The raw pixels are returned under the name of the first features that
    the config's protocols judge, so that the protocols of these features apply to them.
    """
    untrained = settled(experiment, initial_soda(experiment.config, experiment.device))
    features = config_protocols(experiment.config)[0].feature_name
    return {
        "untrained": encode_with(experiment, untrained),
        "raw pixels": lambda views, _: {features: raw_pixels(views, len(experiment.train))},
    }
