"""Corruptions of images by Hendrycks & Dietterich (ICLR 2019, arXiv 1903.12261), with the parameters of CIFAR-10-C.

The parameters are those of the authors' make_cifar_c.py (github.com/hendrycks/robustness). They are made for images of
32 px, but are used for all sizes: on larger images, the same blur removes less.

Nine of the benchmark's 15 kinds are here, and two of its four additional kinds (speckle noise, Gaussian blur). The
others are glass blur, motion blur, snow, frost, fog, elastic transform, spatter and saturate.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.randomness import derive_seed

SEVERITIES = (1, 2, 3, 4, 5)
GAUSSIAN_REACH = 4  # standard deviations; scipy.ndimage's default

Generators = Sequence[torch.Generator]
Corruption = Callable[[Tensor, Any, Generators], Tensor]
"""Function (images (N, 3, H, W) in [0, 1], parameter, a generator per image) -> corrupted images."""


def _normal(images: Tensor, generators: Generators) -> Tensor:
    return torch.stack([torch.randn(images.shape[1:], generator=source) for source in generators])


def gaussian_noise(images: Tensor, std: float, generators: Generators) -> Tensor:
    """Adds normal noise."""
    return images + std * _normal(images, generators)


def shot_noise(images: Tensor, photons: float, generators: Generators) -> Tensor:
    """Draws each value from a Poisson distribution; `photons` is the mean number for the value 1."""
    pairs = zip(images, generators, strict=True)
    return torch.stack([torch.poisson(image * photons, generator=source) for image, source in pairs]) / photons


def impulse_noise(images: Tensor, amount: float, generators: Generators) -> Tensor:
    """Sets a fraction of the values to 0 or 1, with equal probability."""
    drawn = torch.stack([torch.rand(images.shape[1:], generator=source) for source in generators])
    return torch.where(drawn < amount / 2, 0, torch.where(drawn < amount, 1, images))


def speckle_noise(images: Tensor, std: float, generators: Generators) -> Tensor:
    """Adds normal noise that is proportional to the value."""
    return images + images * std * _normal(images, generators)


def _gaussian(sigma: float, reach: int) -> Tensor:
    """Returns a normalised Gaussian kernel of 2 * reach + 1 values."""
    kernel = (-torch.arange(-reach, reach + 1).double().square() / (2 * sigma**2)).exp()
    return (kernel / kernel.sum()).float()


def _filter(images: Tensor, kernel: Tensor, padding: str) -> Tensor:
    """Filters each channel by a symmetric kernel (odd height, odd width)."""
    rows, columns = (size // 2 for size in kernel.shape)
    padded = F.pad(images, (columns, columns, rows, rows), mode=padding)
    return F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)


def gaussian_blur(images: Tensor, sigma: float, generators: Generators) -> Tensor:
    """Convolves with a Gaussian of `sigma` pixels. Values outside the image are those of its border."""
    line = _gaussian(sigma, int(GAUSSIAN_REACH * sigma + 0.5))
    return _filter(_filter(images, line[None], "replicate"), line[:, None], "replicate")


def disk(radius: float, sigma: float) -> Tensor:
    """Returns a kernel in the form of a disk, smoothed by a Gaussian of 3 x 3 pixels."""
    reach = math.floor(radius)
    line = torch.arange(-reach, reach + 1)
    inside = (line[:, None] ** 2 + line**2 <= radius**2).float()
    smooth = _gaussian(sigma, 1)
    kernel = F.pad(inside / inside.sum(), (2, 2, 2, 2))[None, None]  # the Gaussian reaches 1 pixel over the disk
    return F.conv2d(kernel, (smooth[:, None] * smooth)[None, None])[0, 0]


def defocus_blur(images: Tensor, shape: tuple[float, float], generators: Generators) -> Tensor:
    """Convolves with a disk of (radius, sigma), see `disk`. Values outside the image are reflected."""
    return _filter(images, disk(*shape), "reflect")


def _zoomed(images: Tensor, factor: float) -> Tensor:
    """Returns the central 1 / factor of the images, enlarged to their size by bilinear interpolation."""
    size = images.shape[-1]
    cut = math.ceil(size / factor)
    start = (size - cut) // 2
    enlarged = round(cut * factor)
    middle = images[..., start : start + cut, start : start + cut]
    zoomed = F.interpolate(middle, (enlarged, enlarged), mode="bilinear", align_corners=True)
    start = (enlarged - size) // 2
    return zoomed[..., start : start + size, start : start + size]


def zoom_blur(images: Tensor, end: float, generators: Generators) -> Tensor:
    """Averages the image with its enlargements by 1.00, 1.01, ..., `end` - 0.01 (or `end`, if rounding includes it)."""
    factors = np.arange(1, end, 0.01)  # as in the benchmark
    total = images.clone()
    for factor in factors.tolist():
        total += _zoomed(images, factor)
    return total / (len(factors) + 1)


def brightness(images: Tensor, amount: float, generators: Generators) -> Tensor:
    """Adds to the value V of HSV, clipped at 1. At constant hue and saturation, the channels are proportional to V."""
    value = images.amax(dim=1, keepdim=True)
    brighter = (value + amount).clamp(max=1)
    return torch.where(value > 0, images * (brighter / value.clamp(min=1e-6)), brighter)


def contrast(images: Tensor, factor: float, generators: Generators) -> Tensor:
    """Multiplies the deviation from each channel's mean."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (images - mean) * factor + mean


def _by_pillow(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(array))) for array in arrays])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).float() / 255


def pixelate(images: Tensor, factor: float, generators: Generators) -> Tensor:
    """Reduces the image to `factor` times its size, and enlarges it again, both by Pillow's box filter."""

    def change(image: Image.Image) -> Image.Image:
        small = int(image.width * factor), int(image.height * factor)
        return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)

    return _by_pillow(images, change)


def jpeg_compression(images: Tensor, quality: int, generators: Generators) -> Tensor:
    """Compresses the image by Pillow's JPEG encoder and decodes it again."""

    def change(image: Image.Image) -> Image.Image:
        stored = io.BytesIO()
        image.save(stored, format="JPEG", quality=quality)
        return Image.open(stored)

    return _by_pillow(images, change)


CORRUPTIONS: dict[str, tuple[Corruption, tuple[Any, ...]]] = {
    "gaussian noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle noise": (speckle_noise, (0.06, 0.10, 0.12, 0.16, 0.20)),
    "gaussian blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))),
    "zoom blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "brightness": (brightness, (0.05, 0.10, 0.15, 0.20, 0.30)),
    "contrast": (contrast, (0.75, 0.50, 0.40, 0.30, 0.15)),
    "pixelate": (pixelate, (0.95, 0.90, 0.85, 0.75, 0.65)),
    "jpeg compression": (jpeg_compression, (80, 65, 58, 50, 40)),
}
"""Function of each kind, and its parameter at severities 1 to 5."""


def corrupt(pixels: Tensor, indices: range, kind: str, severity: int, seed: int) -> Tensor:
    """Returns corrupted images (N, 3, H, W) uint8 on the host. Fractions of levels are cut off, as in the benchmark.

    Args:
        pixels: (N, 3, H, W) uint8.
        indices: index of each image. Its noise depends only on the seed, the kind, the severity and this index.
        severity: 1 (the weakest) to 5.
    """
    function, parameters = CORRUPTIONS[kind]
    generators = [torch.Generator().manual_seed(derive_seed(seed, kind, severity, index)) for index in indices]
    corrupted = function(pixels.cpu().float() / 255, parameters[severity - 1], generators)
    return (corrupted.clamp(0, 1) * 255 + 1e-3).byte()  # division by 255 may round a level down
