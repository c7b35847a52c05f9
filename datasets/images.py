"""What every source of images gives: uint8 squares held once in memory, with labels if there are any."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Mean and deviation of each channel, on the scale of [0, 1].
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class DatasetError(Exception):
    """Images that are missing or unusable; the message says what to do."""


@dataclass(frozen=True)
class Images:
    """One split: `pixels` (N, 3, size, size) uint8, `labels` (N,) int64 or None, and the classes' names.

    `statistics` and `known_digest` are what `channel_statistics` and `pixel_digest` give, if that is known already.
    """

    pixels: Tensor
    labels: Tensor | None
    classes: list[str]
    statistics: Statistics | None = None
    known_digest: str | None = None

    def __post_init__(self) -> None:
        assert self.pixels.dtype == torch.uint8 and self.pixels.shape[1] == 3
        assert self.labels is None or len(self.labels) == len(self.pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def digest(self) -> str:
        """Tells data sets apart: of all pixels, labels and classes."""
        found = hashlib.blake2b(digest_size=16)
        found.update(f"{self.pixels.shape} {self.classes}".encode(errors="surrogateescape"))
        found.update((self.known_digest or pixel_digest(self.pixels)).encode())
        if self.labels is not None:
            found.update(self.labels.numpy().tobytes())
        return found.hexdigest()


def from_arrays(arrays: np.ndarray, labels: np.ndarray, classes: list[str], image_size: int) -> Images:
    """Images from arrays (N, H, W) or (N, H, W, 3) uint8, resized with antialiasing if they have another size."""
    pixels = torch.from_numpy(np.ascontiguousarray(arrays))
    pixels = pixels[:, None].expand(-1, 3, -1, -1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    if pixels.shape[-2:] != (image_size, image_size):
        pixels = torch.nn.functional.interpolate(
            pixels.float(), size=(image_size, image_size), mode="bilinear", antialias=True
        )
        pixels = pixels.round().clamp(0, 255).byte()
    return Images(pixels.contiguous(), torch.from_numpy(np.asarray(labels, dtype=np.int64)), classes)


def pixel_digest(pixels: Tensor) -> str:
    """Of all pixels (N, 3, H, W) uint8; about a second a gigabyte."""
    return hashlib.blake2b(pixels.numpy().data, digest_size=16).hexdigest()


def channel_statistics(pixels: Tensor) -> Statistics:
    """Mean and deviation of each channel over all pixels of (N, 3, H, W) uint8."""
    total, squares = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for chunk in pixels.split(1024):
        values = chunk.double().div(255).transpose(0, 1).flatten(1)  # (3, n)
        total += values.sum(dim=1)
        squares += values.square().sum(dim=1)
    count = pixels.numel() / 3
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
