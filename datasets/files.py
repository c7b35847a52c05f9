"""A listing of image files opened: decoded once into memory, where it fits, else looked through once and streamed."""

import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.decoding import StreamedImages, decode_batches
from datasets.images import DatasetError, Images, StoredImages, Summary, summarize
from datasets.listing import Listing

logger = logging.getLogger(__name__)

CACHE_VERSION = 3  # raise when the pixels that decoding gives change, or what is known of them


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """What this process may use: the machine's memory, or less where a container is given less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # `max` is no number
            limits.append(int(Path(file).read_text()))
    return min(limits)


def choose_stream(setting: bool | None, root: Path, count: int, image_size: int) -> bool:
    """Whether to stream `count` images: as asked, else where they would fill more than half of the memory.

    Raises DatasetError where they would have to be stored, and are larger than the memory.
    """
    needed, there = count * 3 * image_size**2, memory_bytes()
    size = f"the {count:,} images in {root} take {needed / 1e9:.1f} GB at {image_size} px"
    if setting is None and needed > there / 2:
        logger.info("%s, and there is %.1f GB of memory: they are decoded while they are used", size, there / 1e9)
        return True
    if setting is False and needed > there:
        raise DatasetError(f"{size}, and there is {there / 1e9:.1f} GB of memory: remove data.stream=false")
    return bool(setting)


def open_listing(listing: Listing, image_size: int, cache_dir: Path, stream: bool, num_workers: int | None) -> Images:
    """The images of `listing`; the second time, unless the files have changed, it takes seconds.

    The cache is at most two files a split: where images are stored, their pixels as a memory-mapped array, which
    processes of one machine share; and, written last, a mark with the fingerprint of the files and the summary of
    their pixels. So every file has been decoded before training starts, one that cannot be read is found by then, and
    statistics and digest are the same whether images are stored or streamed.

    Args:
        num_workers: threads that decode what is streamed; None: one a core.
    """
    name = hashlib.blake2b(os.fsencode(listing.root.resolve()), digest_size=6).hexdigest()
    pixels_file = cache_dir / f"{name}-{image_size}.npy"
    mark_file = pixels_file.with_suffix(".json")
    shape = (len(listing.files), 3, image_size, image_size)
    source = {"version": CACHE_VERSION, "source": _fingerprint(listing)}
    summary = _read_mark(mark_file, source)
    if summary is None or not (stream or _map_pixels(pixels_file, shape) is not None):
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            mark_file.unlink(missing_ok=True)
            _remove_leftovers(cache_dir, f"{pixels_file.stem}.*.partial")
            partial = pixels_file.with_suffix(f".{secrets.token_hex(4)}.partial")
            try:
                with open(partial, "xb") as file:
                    with suppress(OSError):
                        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed: this is no leftover
                    if stream:
                        summary = summarize(_decode_all(listing, image_size))
                    else:
                        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
                        if hasattr(os, "posix_fallocate"):  # else a full disk kills the process while it decodes
                            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
                        summary = summarize(_keep(_decode_all(listing, image_size), array))
                        array.flush()
                        partial.replace(pixels_file)
                mark = {"wanted": source, "statistics": summary.statistics, "digest": summary.digest}
                partial.write_text(json.dumps(mark))
                partial.replace(mark_file)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            advice = "set data.cache_dir" if stream else "set data.cache_dir, or data.stream=true, which needs no room"
            raise DatasetError(f"cannot cache images in {cache_dir} ({error}): {advice}") from None
        logger.info("cached %d images of %s in %s", len(listing.files), listing.root, cache_dir)
    if stream:
        return StreamedImages(listing, image_size, num_workers or num_cores(), summary)
    pixels = _map_pixels(pixels_file, shape)
    assert pixels is not None, "the cache has just been read or written"
    labels = None if listing.labels is None else torch.tensor(listing.labels)
    return StoredImages(torch.from_numpy(pixels), labels, listing.classes, summary)


def _fingerprint(listing: Listing) -> str:
    """Digest of every file's name, size and time of change: it differs when the source does."""
    digest = hashlib.blake2b(digest_size=16)
    for file, label in zip(listing.files, listing.labels or [0] * len(listing.files), strict=True):
        try:
            status = (listing.root / file).stat()
        except OSError as error:
            raise DatasetError(f"cannot read {listing.root / file} ({error.strerror}): mend or remove it") from None
        digest.update(f"{file}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _decode_all(listing: Listing, image_size: int) -> Iterator[Tensor]:
    """All pixels in order, a block at a time, with a progress bar."""
    count = len(listing.files)
    logger.info("decoding %d images of %s", count, listing.root)
    blocks = (range(start, min(start + 256, count)) for start in range(0, count, 256))
    with tqdm(total=count, desc="decoding", unit="img", leave=False, disable=None) as bar:  # on a terminal only
        for pixels in decode_batches(listing, image_size, blocks, num_cores()):
            yield pixels
            bar.update(len(pixels))


def _keep(blocks: Iterator[Tensor], out: np.ndarray) -> Iterator[Tensor]:
    """The same blocks, each written to its place in `out`."""
    start = 0
    for pixels in blocks:
        out[start : start + len(pixels)] = pixels.numpy()
        start += len(pixels)
        yield pixels


def _remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the files that nobody holds a lock on any more, since who wrote them was killed."""
    for left in folder.glob(pattern):
        with suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _read_mark(path: Path, source: dict[str, Any]) -> Summary | None:
    """What the cache knows of the pixels of `source`, or None where that cannot be read or is of another."""
    try:
        mark = json.loads(path.read_text())
        mean, std = mark["statistics"]
        if mark["wanted"] != source or not len(mean) == len(std) == 3:
            return None
        return Summary((tuple(map(float, mean)), tuple(map(float, std))), str(mark["digest"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _map_pixels(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The cached pixels, or None where they are not whole.

    Mapped copy-on-write, because torch wants writable memory; nothing writes, so the pages stay shared.
    """
    try:
        pixels = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError):
        return None
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None
