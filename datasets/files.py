"""A listing of image files opened: decoded once into memory, where it fits, else looked through once and streamed."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.decoding import StreamedImages, decode_batches, num_cores
from datasets.images import DatasetError, Images, StoredImages, Summary, summarize
from datasets.listing import Listing

logger = logging.getLogger(__name__)

CACHE_VERSION = 2  # raise when the pixels that decoding gives change, or what is known of them
BLOCK_BYTES = 2**23  # of pixels that are decoded at a time, when all are


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
        logger.info("%s, and there is %.1f GB of memory", size, there / 1e9)
        return True
    if setting is False and needed > there:
        raise DatasetError(f"{size}, and there is {there / 1e9:.1f} GB of memory: remove data.stream=false")
    return bool(setting)


def open_listing(
    listing: Listing, image_size: int, cache_dir: Path, stream: bool, num_workers: int | None = None, processes: int = 1
) -> Images:
    """The images of `listing`; every file is decoded the first time, and again if any of them has changed.

    The cache is at most two files a split: where images are stored, their pixels as a memory-mapped array, which
    processes of one machine share; and, written last, a mark with the fingerprint of the files and the summary of
    their pixels. So a file that cannot be read is found before training starts, and statistics and digest are the
    same whether images are stored or streamed.

    Args:
        num_workers: threads that decode; None: one a core, of which `processes` have a share each once images stream.
    """
    name = hashlib.blake2b(os.fsencode(listing.root.resolve()), digest_size=6).hexdigest()
    pixels_file = cache_dir / f"{name}-{image_size}.npy"
    mark_file = pixels_file.with_suffix(".json")
    shape = (len(listing.files), 3, image_size, image_size)
    source = {"version": CACHE_VERSION, "source": _fingerprint(listing)}
    summary = _read_mark(mark_file, source)
    pixels = None if stream else _map_pixels(pixels_file, shape)
    if summary is None or (pixels is None and not stream):
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            if summary is None:  # else the mark is right, and what it tells of is there or not at all
                for outdated in (mark_file, pixels_file):
                    outdated.unlink(missing_ok=True)
            with _partial(pixels_file) as partial:
                array = None if stream else _allocate(partial, shape)
                summary = summarize(_decode_all(listing, image_size, num_workers or num_cores(), array))
                if array is not None:
                    array.flush()
                    partial.replace(pixels_file)
            mark = {"wanted": source, "statistics": summary.statistics, "digest": summary.digest}
            unfinished = mark_file.with_suffix(f".{secrets.token_hex(4)}")
            unfinished.write_text(json.dumps(mark))
            unfinished.replace(mark_file)
        except OSError as error:
            full = error.errno == errno.ENOSPC and not stream
            advice = "set data.cache_dir" + (", or data.stream=true, which needs next to no room" if full else "")
            raise DatasetError(f"cannot cache images in {cache_dir} ({error.strerror}): {advice}") from None
        logger.info("cached %s of %s in %s", "a summary" if stream else "the images", listing.root, cache_dir)
        pixels = None if stream else _map_pixels(pixels_file, shape)
    if stream:
        logger.info("the %d images of %s are decoded while they are used", len(listing.files), listing.root)
        return StreamedImages(listing, image_size, num_workers or max(1, num_cores() // processes), summary)
    assert pixels is not None, "the cache has just been read or written"
    labels = None if listing.labels is None else torch.tensor(listing.labels)
    images = StoredImages(torch.from_numpy(pixels), labels, listing.classes, summary)
    images.names = listing.files
    return images


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, locked while it is worked on and gone in the end; others' leftovers go first."""
    _remove_leftovers(path.parent, f"{path.stem}.*.partial")
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed: this is no leftover
            file.write(bytes(4096))  # a disk that is full, or cannot be written to, is to be known before the work
            file.flush()
            yield partial
    finally:
        partial.unlink(missing_ok=True)


def _allocate(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """An array in a file, with all its room on the disk; raises OSError where there is too little."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # else a disk that is full kills the process while it decodes
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _fingerprint(listing: Listing) -> str:
    """Digest of every file's name, size and time of change: it differs when the source does."""
    digest = hashlib.blake2b(digest_size=16)
    for file, label in zip(listing.files, listing.labels or [0] * len(listing.files), strict=True):
        try:
            status = (listing.root / file).stat()
        except OSError as error:
            raise DatasetError(f"cannot read {listing.root / file} ({error.strerror}): mend or remove it") from None
        if not stat.S_ISREG(status.st_mode):
            raise DatasetError(f"{listing.root / file} is no regular file: remove it")
        digest.update(f"{file}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _decode_all(listing: Listing, image_size: int, num_workers: int, out: np.ndarray | None) -> Iterator[Tensor]:
    """All pixels in order, a block at a time, with a progress bar; written to `out` (N, 3, size, size), if given."""
    count, size = len(listing.files), max(1, BLOCK_BYTES // (3 * image_size**2))
    logger.info("decoding %d images of %s", count, listing.root)
    blocks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    with tqdm(total=count, desc="decoding", unit="img", leave=False, disable=None) as bar:  # on a terminal only
        decoded = decode_batches(listing, image_size, blocks, num_workers)
        try:
            for block, pixels in zip(blocks, decoded, strict=True):
                if out is not None:
                    out[block.start : block.stop] = pixels.numpy()
                bar.update(len(pixels))
                yield pixels
        except DatasetError as error:
            raise DatasetError(f"{error}: mend or remove it") from None


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
