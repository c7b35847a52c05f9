"""Decoding of image files to uint8 squares: a single file, or batches of files by threads that read ahead."""

import os
import warnings
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from datasets.images import DatasetError, Images, Indices, Summary
from datasets.listing import Listing

AHEAD = 3  # number of batches that are decoded ahead of the batch in use
GROUP = 8  # images that one thread decodes per job


@cache
def _silence_pil() -> None:
    """Ignores PIL's warnings (for example about the transparency of a palette) from the first call on.

    The filter is never removed: `warnings.catch_warnings` around each image would change the filters of all threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(path: Path, image_size: int) -> np.ndarray:
    """Decodes an image file to a (size, size, 3) uint8 square.

    The central square of the image is cropped and resized to `image_size`. The EXIF orientation is applied. Greyscale
    becomes RGB, and 16-bit greyscale loses its low byte.

    Raises DatasetError if the file cannot be read or has floating-point pixels.
    """
    _silence_pil()
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("the range of floating-point pixels is unknown")
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
    """Yields the pixels (N, 3, size, size) uint8 of each batch of indices, decoded ahead by `num_workers` threads.

    Threads are used instead of processes because PIL releases the GIL while it decodes and resizes. Threads write the
    pixels directly into the batch, which can be in pinned memory. They cannot run out of shared memory, and their
    exceptions keep their type.

    Raises DatasetError if a file cannot be read. The error is raised in place of the batch that contains the file.
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

    _silence_pil()  # before the threads start, because they share the filters
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
        pool.shutdown(cancel_futures=True)  # the caller may stop before the last batch


class StreamedImages(Images):
    """Images of one split that stay on the disk. Each batch is decoded shortly before it is used.

    Args:
        num_workers: threads that decode.
        summary: summary of all decoded pixels. The caller decodes every file once to compute it.
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
            raise DatasetError(f"{error}: restore the original file and run the command again") from None
