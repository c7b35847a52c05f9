"""Encoders as the judge takes them: of a model, with settled statistics, untrained, and the raw pixels."""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from experiment.batch import draw_source, read_pixels
from experiment.models import initial_soda
from experiment.opening import Experiment
from model.decoder import UNetDecoder
from model.soda import SODA
from utils.device import autocast
from utils.randomness import image_noise

SETTLING_PASSES = 20
MAX_RAW_PIXELS = 2**30  # numbers of a whole data set, 4 GB in float32

Encode = Callable[[Tensor, range], Mapping[str, Tensor]]
"""(views (N, 3, H, W), their indices in the split) -> features (N, D) by name."""


def encode_with(experiment: Experiment, soda: SODA) -> Encode:
    """The features of `soda` for the judge: in evaluation mode, under the experiment's autocast.

    "z" and "pooled" of the encoder; features of the decoder if `evaluation.features` names them.
    """
    features = experiment.config.evaluation.features

    def encode(views: Tensor, indices: range) -> dict[str, Tensor]:
        soda.eval()
        with torch.no_grad(), autocast(experiment.device, experiment.amp_dtype):
            found = soda.encoder.features(views)
            if features.startswith("decoder."):
                found[features] = decoder_features(experiment, soda.decoder, views, indices, features)
        return found

    return encode


def decoder_features(experiment: Experiment, decoder: UNetDecoder, views: Tensor, indices: range, name: str) -> Tensor:
    """Activations of the decoder without a latent, averaged over the pixels: views (N, 3, H, W) -> (N, C) float32.

    The probe of Denoising Diffusion Autoencoders (Xiang et al. 2023), on a decoder that trains without a latent with
    probability `training.mask.latent_probability`. The noise belongs to a sample's index, in either split, and is the
    same each time.

    Args:
        name: decoder.<block>@<timestep>: the block whose activations are taken, and the timestep of the noise.
    """
    block, timestep = name.removeprefix("decoder.").split("@")
    x_start = experiment.views.denormalize(views) * 2 - 1
    noise = image_noise(views.shape[1:], indices, experiment.config.seed, "features", device=views.device)
    timesteps = torch.full((len(views),), int(timestep), device=views.device)
    z = torch.zeros(len(views), experiment.config.encoder.latent_dim, device=views.device)
    x_t = experiment.diffusion.q_sample(x_start, timesteps, noise)
    return decoder.features(x_t, timesteps, z, block).float().mean(dim=(2, 3))


@torch.no_grad()
def settled(experiment: Experiment, soda: SODA) -> SODA:
    """`soda` with the BatchNorm statistics of forward passes over source views in training mode; shares the decoder.

    Each process sees whole batches: split ones would give numbers that depend on how many processes there are.
    """
    encoder = copy.deepcopy(soda.encoder).train()
    positions = range(experiment.config.training.batch_size)
    steps = range(SETTLING_PASSES)
    for step, pixels in zip(steps, read_pixels(experiment, ((step, positions) for step in steps)), strict=True):
        encoder(draw_source(experiment, pixels, step, positions))
    return SODA(encoder, soda.decoder)


def raw_pixels(views: Tensor, num_images: int) -> Tensor:
    """(N, 3, H, W) -> (N, 3 * size * size), averaged down to 32 px, or to less for a data set of very many images."""
    size = min(views.shape[-1], 32)
    while 3 * size**2 * num_images > MAX_RAW_PIXELS:
        size //= 2
    return F.adaptive_avg_pool2d(views, size).flatten(1)


def baselines(experiment: Experiment) -> dict[str, Encode]:
    """The model as this run started it, and the raw pixels under the name of the config's features.

    BatchNorm's running statistics start at mean 0 and variance 1. They are settled first: without that, the untrained
    encoder would be too weak a baseline.
    """
    untrained = settled(experiment, initial_soda(experiment.config, experiment.device))
    features = experiment.config.evaluation.features
    return {
        "untrained": encode_with(experiment, untrained),
        "raw pixels": lambda views, _: {features: raw_pixels(views, len(experiment.train))},
    }
