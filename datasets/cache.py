"""Opens a listing of image files: decoded once to a cache if they fit in memory, else summarised once and streamed."""

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

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.decoding import StreamedImages, decode_batches, num_cores
from datasets.images import DatasetError, Images, StoredImages, Summary, summarize
from datasets.listing import Listing

logger = logging.getLogger(__name__)

CACHE_VERSION = 3  # raise it when decoding gives other pixels, or when the mark holds other facts
BLOCK_BYTES = 2**23  # pixels decoded at a time while the cache is written


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or the container's limit if that is lower."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # `max` is no number
            limits.append(int(Path(file).read_text()))
    return min(limits)


def choose_stream(setting: bool | None, root: Path, count: int, image_size: int) -> bool:
    """True if `count` images are to be streamed: as `setting` says; if it is None, if they fill half of the memory.

    Raises DatasetError if `setting` is False and the images are larger than the memory.
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
    listing: Listing, image_size: int, cache_dir: Path, stream: bool, num_workers: int | None, processes: int
) -> Images:
    """The images of `listing`; every file is decoded the first time, and again if any of them has changed.

    The cache of a split is at most two files. If images are stored: their pixels as a memory-mapped array, which the
    processes of one machine share. Always, and written last: a mark with the fingerprint of the files and the summary
    of their pixels. So a file that cannot be read is found before training starts, and statistics and digest are the
    same for stored and streamed images.

    Args:
        num_workers: threads that decode; None: one a core, of which `processes` have a share each once images stream.
    """
    root = hashlib.blake2b(os.fsencode(listing.root.resolve()), digest_size=6).hexdigest()
    mark_file = cache_dir / f"{listing.kind}-{root}-{image_size}.json"
    pixels_file = mark_file.with_suffix(".npy")
    shape = (len(listing.files), 3, image_size, image_size)
    fingerprint = _fingerprint(listing)
    summary = _read_mark(mark_file, fingerprint, listing.root)
    pixels = None if stream or summary is None else _map_pixels(pixels_file, shape)
    if summary is None or (pixels is None and not stream):
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            if summary is None:  # else only the pixels are missing
                for outdated in (mark_file, pixels_file):
                    outdated.unlink(missing_ok=True)
            with _replacing(mark_file) as mark:
                if stream:
                    summary = summarize(_decode_all(listing, image_size, num_workers or num_cores(), None))
                else:
                    with _replacing(pixels_file) as partial:
                        array = _allocate(partial, shape)
                        summary = summarize(_decode_all(listing, image_size, num_workers or num_cores(), array))
                        array.flush()
                known = {"statistics": summary.statistics, "digest": summary.digest}
                mark.write_text(json.dumps({"version": CACHE_VERSION, "source": fingerprint, **known}))
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
def _replacing(path: Path) -> Iterator[Path]:
    """As `utils.files.replacing`, for a file that several processes may write at once, each under its own name.

    The temporary file is locked while it is written; those without a lock are left by killed processes and removed.
    Raises OSError at once if the disk is full or read-only.
    """
    _remove_leftovers(path.parent, f"{path.name}.*.partial")
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            with suppress(OSError):  # storage without locks: nothing is removed there
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(bytes(4096))  # a disk that is full, or cannot be written to, is to be known before the work
            file.flush()
            yield partial
            os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _allocate(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """An array in a file whose blocks are allocated on the disk; raises OSError if there is too little room."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # else a full disk kills the process (SIGBUS) while it decodes
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _fingerprint(listing: Listing) -> str:
    """Digest of every file's name, size and time of change, on which pixels depend. Raises DatasetError."""
    digest = hashlib.blake2b(digest_size=16)
    for file in listing.files:
        try:
            status = (listing.root / file).stat()
        except OSError as error:
            raise DatasetError(f"cannot read {listing.root / file} ({error.strerror}): mend or remove it") from None
        if not stat.S_ISREG(status.st_mode):
            raise DatasetError(f"{listing.root / file} is no regular file: remove it")
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
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
    """Removes the files that no process holds a lock on."""
    for left in folder.glob(pattern):
        with suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _read_mark(path: Path, fingerprint: str, root: Path) -> Summary | None:
    """Summary of the cached pixels; None if there is no cache, or if it is stale, which is logged."""
    try:
        mark = json.loads(path.read_text())
        mean, std = mark["statistics"]
        summary = Summary((tuple(map(float, mean)), tuple(map(float, std))), str(mark["digest"]))
        if not len(mean) == len(std) == 3:
            reason = "is damaged"
        elif mark["version"] != CACHE_VERSION:
            reason = "was written by another version of this program"
        elif mark["source"] != fingerprint:
            reason = "is stale: files were added, removed or changed"
        else:
            return summary
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        reason = "is damaged"
    logger.info("the cache %s of %s %s; decoding all of them anew", path, root, reason)
    return None


def _map_pixels(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The cached pixels; None if there are none, or if they are not whole, which is logged.

    Mapped copy-on-write, because torch wants writable memory; nothing writes, so the pages stay shared.
    """
    try:
        pixels = np.load(path, mmap_mode="c")
        if pixels.shape == shape and pixels.dtype == np.uint8:
            return pixels
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):
        pass
    logger.info("the cached pixels %s are damaged; decoding all of them anew", path)
    return None
