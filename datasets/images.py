"""Images of one split: uint8 squares that are read by index, and their labels if there are any."""

import copy
import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config.errors import UserError

# Mean and standard deviation of each channel, for pixels on the scale of [0, 1].
Statistics = tuple[tuple[float, ...], tuple[float, ...]]

RESIZED_AT_ONCE = 1024  # images whose float32 copies are in memory at the same time

# Indices of images of a split: a range of consecutive indices, or a tensor (N,) int64 of any indices.
Indices = range | Tensor


class DatasetError(UserError):
    """Error about images that are missing or unusable."""


@dataclass(frozen=True)
class Summary:
    """Statistics of the channels of a split, and a digest of its pixels."""

    statistics: Statistics
    digest: str


def summarize(blocks: Iterable[Tensor]) -> Summary:
    """Returns the summary of pixels (N, 3, H, W) uint8. The sizes of the blocks do not change it."""
    digest = hashlib.blake2b(digest_size=16)
    # Sums are integers, because integer sums are exact in any order.
    count, total, squares = 0, torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for block in blocks:
        digest.update(block.contiguous().numpy().data)
        count += block.numel() // 3
        total += block.sum(dim=(0, 2, 3))
        squares += block.int().square_().sum(dim=(0, 2, 3))
    mean = total.double() / (255 * count)
    std = (squares.double() / (255**2 * count) - mean.square()).clamp(min=0).sqrt()
    return Summary((tuple(mean.tolist()), tuple(std.tolist())), digest.hexdigest())


class Images(ABC):
    """Images of one split, in memory or on the disk.

    Attributes:
        shape: (N, 3, size, size).
        labels: (N,) int64, indices into `classes`; None if the images have no labels.
        classes: names of the classes.
        attributes: (N, A) uint8, 0/1 values of each image, named by `attribute_names`; None if there are none.
        summary: summary of all pixels.
        names: names of the files, relative to `folder`, in order; None if the images do not come from files.
        folder: folder of the files; None if the images do not come from files.
        grey_bits: number of bits that hold the greys of files with more than 8 bits per grey; None if there are no such
            files.
        cameras: (N, 3, 4) float32 cameras, on the host (see cameras.py); None if they are not known.
        objects: (N,) int64 numbers of the objects in the images, the same in all splits; None if there are no cameras.
    """

    cameras: Tensor | None = None
    objects: Tensor | None = None

    def __init__(self, shape: tuple[int, ...], labels: Tensor | None, classes: list[str], summary: Summary) -> None:
        assert shape[1] == 3 and (labels is None or len(labels) == shape[0])
        self.attributes: Tensor | None = None
        self.attribute_names: list[str] = []
        self.shape, self.labels, self.classes, self.summary = torch.Size(shape), labels, classes, summary
        self.names: list[str] | None = None
        self.folder: Path | None = None
        self.grey_bits: int | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def batches(self, wanted: Iterable[Indices], pin_memory: bool = False) -> Generator[Tensor, None, None]:
        """Yields the pixels (N, 3, size, size) uint8 of each batch of indices, in order.

        `wanted` may be read several batches ahead. If `pin_memory` is set, pixels on the host are in pinned memory, so
        that they can be copied to a GPU asynchronously.
        """

    def digest(self) -> str:
        """Returns a digest of all pixels, labels, classes, cameras and objects. Attributes are not included."""
        found = hashlib.blake2b(digest_size=16)
        found.update(f"{self.shape} {self.classes}".encode(errors="surrogateescape"))
        found.update(self.summary.digest.encode())
        if self.labels is not None:
            found.update(self.labels.numpy().tobytes())
        if self.cameras is not None and self.objects is not None:
            # Rounded, because the last bit of a sine may differ between machines.
            found.update((self.cameras.double() * 2**16).round().int().numpy().tobytes())
            found.update(self.objects.numpy().tobytes())
        return found.hexdigest()

    def cameras_at(self, indices: Indices) -> Tensor | None:
        """Returns the cameras (n, 3, 4) of the images at `indices`; None if they have none."""
        if self.cameras is None:
            return None
        return self.cameras[indices.start : indices.stop] if isinstance(indices, range) else self.cameras[indices]

    @cached_property
    def views_of_objects(self) -> Tensor:
        """Indices (number of objects, largest number of views) int64 of the images of each object, padded by -1."""
        assert self.objects is not None, "the images have no objects"
        return group_by_object(self.objects)


def group_by_object(objects: Tensor) -> Tensor:
    """Returns the indices (number of objects, largest number of views) int64 of the images of each object.

    Args:
        objects: (N,) int64 number of the object of each image. Objects with fewer views are padded by -1.
    """
    counts = objects.bincount()
    order = objects.argsort(stable=True)
    position = torch.arange(len(order)) - (counts.cumsum(0) - counts)[objects[order]]
    found = torch.full((len(counts), int(counts.max())), -1)
    found[objects[order], position] = order
    return found


class StoredImages(Images):
    """Images of one split in the memory of the host or of a GPU.

    Args:
        pixels: (N, 3, size, size) uint8.
        summary: summary of all pixels; None: it is computed by a pass over all pixels.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor | None, classes: list[str], summary: Summary | None = None
    ) -> None:
        assert pixels.dtype == torch.uint8
        super().__init__(pixels.shape, labels, classes, summary or summarize(p.cpu() for p in pixels.split(1024)))
        self.pixels = pixels

    def batches(self, wanted: Iterable[Indices], pin_memory: bool = False) -> Generator[Tensor, None, None]:
        for indices in wanted:
            if isinstance(indices, range):
                chosen = self.pixels[indices.start : indices.stop]
            else:
                chosen = self.pixels.index_select(0, indices.to(self.pixels.device, non_blocking=True))
            yield chosen.pin_memory() if pin_memory and chosen.device.type == "cpu" else chosen

    def to(self, device: torch.device) -> "StoredImages":
        """Returns the same images in the memory of `device`."""
        moved = copy.copy(self)
        moved.pixels = self.pixels.to(device)
        return moved


class JoinedImages(Images):
    """Images of one split, followed by images of another one without their labels. Both have the same size.

    Labels of the second ones are -1. Classes are those of the first ones.
    """

    def __init__(self, first: Images, second: Images) -> None:
        assert first.labels is not None and first.shape[1:] == second.shape[1:]
        unknown = torch.full((len(second),), -1)
        digests = hashlib.blake2b(f"{first.summary.digest} {second.summary.digest}".encode(), digest_size=16)
        summary = Summary(first.summary.statistics, digests.hexdigest())
        shape = (len(first) + len(second), *first.shape[1:])
        super().__init__(shape, torch.cat([first.labels, unknown]), first.classes, summary)
        self._first, self._second = first, second

    def batches(self, wanted: Iterable[Indices], pin_memory: bool = False) -> Generator[Tensor, None, None]:
        tensors = (torch.arange(i.start, i.stop) if isinstance(i, range) else i for i in wanted)
        for_order, for_first, for_second = itertools.tee(tensors, 3)
        count = len(self._first)
        parts = zip(
            for_order,
            self._first.batches((i[i < count] for i in for_first), pin_memory),
            self._second.batches((i[i >= count] - count for i in for_second), pin_memory),
            strict=True,
        )
        for indices, first, second in parts:
            order = torch.argsort((indices >= count).byte(), stable=True)  # the first ones before the others
            both = torch.cat([first, second.to(first.device)])
            found = torch.empty_like(both, pin_memory=pin_memory and both.device.type == "cpu")
            found[order.to(both.device)] = both
            yield found


def _resize(pixels: Tensor, size: int) -> Tensor:
    resized = torch.nn.functional.interpolate(pixels.float(), size=(size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte()


def from_arrays(arrays: np.ndarray, labels: np.ndarray, classes: list[str], image_size: int) -> StoredImages:
    """Makes images from arrays (N, H, W) or (N, H, W, 3) uint8.

    Arrays of another size are resized to `image_size` with antialiasing.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(arrays))
    pixels = pixels[:, None].expand(-1, 3, -1, -1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    if pixels.shape[-2:] != (image_size, image_size):
        pixels = torch.cat([_resize(part, image_size) for part in pixels.split(RESIZED_AT_ONCE)])
    return StoredImages(pixels.contiguous(), torch.from_numpy(np.asarray(labels, dtype=np.int64)), classes)
