"""Test latents with classes and thumbnails for TensorBoard's projector."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.images import Images
from utils.run_folder.run_log import SPRITE_PIXELS

THUMBNAIL = 64  # pixels


def projector_points(images: Images, chosen: Tensor, z: Tensor) -> tuple[Tensor, list[str], list[list[str]], Tensor]:
    """Returns latents of labelled images with class, index and thumbnail, in the form that `RunLog.embedding` takes.

    Args:
        chosen: (n,) indices of the images to show.
        z: (n, latent_dim) latents of these images.
    """
    assert images.labels is not None, "the projector needs labels"
    size = min(images.shape[-1], THUMBNAIL, SPRITE_PIXELS // math.ceil(math.sqrt(len(chosen))))
    pixels = [F.adaptive_avg_pool2d(batch.float().cpu() / 255, size) for batch in images.batches(chosen.split(256))]
    rows = [[images.classes[int(images.labels[i])], f"test:{i}"] for i in chosen.tolist()]
    return z.cpu(), ["class", "image"], rows, torch.cat(pixels)
