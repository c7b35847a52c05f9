"""Image files to uint8 squares: one, or batches of them by threads that work ahead of whoever takes them."""

import os
import warnings
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from datasets.images import DatasetError, Images, Indices, Summary
from datasets.listing import Listing

AHEAD = 3  # batches in work while the one before them is used
GROUP = 8  # images that a thread takes at a time

warnings.filterwarnings("ignore", module=r"PIL\.")  # e.g. of a palette's transparency


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(path: Path, image_size: int) -> np.ndarray:
    """An image file as a (size, size, 3) uint8 square: shorter side resized, centre cropped, grey made colour.

    Turned as its EXIF orientation says; 16-bit grey loses its low byte. Raises DatasetError.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range")
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
            rgb = upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"cannot read the image {path} ({error})") from None
    width, height = rgb.size
    if (width, height) != (image_size, image_size):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(rgb)


def decode_batches(
    listing: Listing, image_size: int, wanted: Iterable[Indices], num_workers: int, pin_memory: bool = False
) -> Generator[Tensor, None, None]:
    """Pixels (N, 3, size, size) uint8 of each batch of indices in turn, decoded ahead by `num_workers` threads.

    Threads and not processes: PIL lets go of Python's lock while it decodes and resizes, pixels are written where they
    stay (in pinned memory, if asked), no shared memory runs out, and an error is raised as it is.

    Raises DatasetError for a file that cannot be read, when its batch is due.
    """

    def fill(out: np.ndarray, indices: list[int]) -> None:
        for square, index in zip(out, indices, strict=True):
            square[:] = decode(listing.root / listing.files[index], image_size).transpose(2, 0, 1)

    def start(indices: Indices) -> tuple[Tensor, list[Future[None]]]:
        chosen = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        pixels = torch.empty(len(chosen), 3, image_size, image_size, dtype=torch.uint8, pin_memory=pin_memory)
        groups = range(0, len(chosen), GROUP)
        return pixels, [pool.submit(fill, pixels[g : g + GROUP].numpy(), chosen[g : g + GROUP]) for g in groups]

    def finish(pixels: Tensor, jobs: list[Future[None]]) -> Tensor:
        for job in jobs:
            job.result()
        return pixels

    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
    try:
        in_work: deque[tuple[Tensor, list[Future[None]]]] = deque()
        for indices in wanted:
            in_work.append(start(indices))
            if len(in_work) > AHEAD:
                yield finish(*in_work.popleft())
        while in_work:
            yield finish(*in_work.popleft())
    finally:
        pool.shutdown(cancel_futures=True)  # whoever takes them may stop before the last


class StreamedImages(Images):
    """One split that stays on disk: every batch is decoded when it is wanted, or a little before.

    Args:
        num_workers: threads that decode.
        summary: of all decoded pixels; whoever opens the split has looked at every file once.
    """

    def __init__(self, listing: Listing, image_size: int, num_workers: int, summary: Summary) -> None:
        labels = None if listing.labels is None else torch.tensor(listing.labels)
        super().__init__((len(listing.files), 3, image_size, image_size), labels, listing.classes, summary)
        self.names = listing.files
        self._listing, self._num_workers = listing, num_workers

    def batches(self, wanted: Iterable[Indices], pin_memory: bool = False) -> Generator[Tensor, None, None]:
        try:
            yield from decode_batches(self._listing, self.shape[-1], wanted, self._num_workers, pin_memory)
        except DatasetError as error:
            raise DatasetError(f"{error}: put back the file that was there, and start again") from None
