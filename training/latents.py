"""Latents of whole splits, and test latents with thumbnails for TensorBoard's projector."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets import Images
from evaluation.features import Features, extract_features
from model import SODA
from training.experiment import Experiment
from utils.device import autocast
from utils.distributed import all_reduce, share
from utils.randomness import generator
from utils.run_log import SPRITE_PIXELS

MAX_POINTS = 10_000  # in the projector, which sends all of them to the browser
THUMBNAIL = 64  # pixels


@torch.no_grad()
def encode_images(experiment: Experiment, soda: SODA, pixels: Tensor) -> Tensor:
    """z (N, latent_dim) float32 of images (N, 3, H, W) uint8, as they are."""
    soda.eval()
    with autocast(experiment.device, experiment.amp_dtype):
        return soda.encoder(experiment.views.evaluation(pixels)).float()


def latents(
    experiment: Experiment, soda: SODA, images: Images, done: Callable[[int], Any] = lambda count: None
) -> Tensor:
    """z (N, latent_dim) float32 of a whole split, on the device; processes share the work.

    `done` is told how many images this process has encoded since it was last called.
    """

    def run(pixels: Tensor, indices: range) -> Features:
        done(len(indices))
        return {"z": encode_images(experiment, soda, pixels)}

    batch_size = experiment.config.evaluation.batch_size
    return extract_features(run, images, batch_size, experiment.device, share, all_reduce)["z"]


def projector_points(experiment: Experiment, z: Tensor) -> tuple[Tensor, list[str], list[list[str]], Tensor]:
    """Test latents z (N, latent_dim) with class, place and thumbnail, as `RunLog.embedding` takes them."""
    test = experiment.test
    assert test is not None and test.labels is not None, "test images have labels"
    order = torch.randperm(len(test), generator=generator(experiment.config.seed, "projector"))
    chosen = order[:MAX_POINTS].sort().values
    size = min(test.shape[-1], THUMBNAIL, SPRITE_PIXELS // math.ceil(math.sqrt(len(chosen))))
    pixels = [F.adaptive_avg_pool2d(batch.float().cpu() / 255, size) for batch in test.batches(chosen.split(256))]
    rows = [[test.classes[int(test.labels[i])], f"test:{i}"] for i in chosen.tolist()]
    return z[chosen.to(z.device)].cpu(), ["class", "image"], rows, torch.cat(pixels)
