"""Test latents with classes and thumbnails for TensorBoard's projector."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.images import Images
from utils.randomness import generator
from utils.run_folder.run_log import SPRITE_PIXELS

MAX_POINTS = 10_000  # the browser loads all of them
THUMBNAIL = 64  # pixels


def projector_points(images: Images, z: Tensor, seed: int) -> tuple[Tensor, list[str], list[list[str]], Tensor]:
    """Returns latents of labelled images with class, index and thumbnail, in the form that `RunLog.embedding` takes.

    If there are more than MAX_POINTS images, `seed` chooses MAX_POINTS of them.

    Args:
        z: (N, latent_dim) latents of `images`.
    """
    assert images.labels is not None, "the projector needs labels"
    order = torch.randperm(len(images), generator=generator(seed, "projector"))
    chosen = order[:MAX_POINTS].sort().values
    size = min(images.shape[-1], THUMBNAIL, SPRITE_PIXELS // math.ceil(math.sqrt(len(chosen))))
    pixels = [F.adaptive_avg_pool2d(batch.float().cpu() / 255, size) for batch in images.batches(chosen.split(256))]
    rows = [[images.classes[int(images.labels[i])], f"test:{i}"] for i in chosen.tolist()]
    return z[chosen.to(z.device)].cpu(), ["class", "image"], rows, torch.cat(pixels)
