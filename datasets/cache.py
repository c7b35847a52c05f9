"""Opening of a listing of image files: as stored images with a cache of their pixels, or as streamed images.

In both cases, all files are decoded once before training starts: to cache their pixels, or only to summarise them.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.decoding import StreamedImages, decode_batches, num_cores
from datasets.images import DatasetError, Images, StoredImages, Summary, summarize
from datasets.listing import Listing
from utils.files import native_lock

logger = logging.getLogger(__name__)

CACHE_VERSION = 3  # increase it if decoding gives different pixels or if the content of the mark file changes
BLOCK_BYTES = 2**23  # bytes of pixels in one block while all files are decoded


def memory_bytes() -> int:
    """Returns the bytes of memory that this process may use: the machine's, or the container's limit if it is lower.

    On Windows, which has no `sysconf`, the memory counts as unlimited.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or `max`, which means no limit
            limits.append(int(Path(file).read_text()))
    return min(limits)


def choose_stream(setting: bool | None, root: Path, count: int, image_size: int) -> bool:
    """Returns True if `count` images must be streamed.

    A `setting` of True or False is returned unchanged. If `setting` is None, the images are streamed if they need more
    than half of the memory. Raises DatasetError if `setting` is False and the images are larger than the memory.
    """
    needed, there = count * 3 * image_size**2, memory_bytes()
    size = f"the {count:,} images in {root} take {needed / 1e9:.1f} GB at {image_size} px"
    if setting is None and needed > there / 2:
        logger.info("%s, which is more than half of the %.1f GB of memory: streaming them", size, there / 1e9)
        return True
    if setting is False and needed > there:
        raise DatasetError(f"{size}, but the memory is {there / 1e9:.1f} GB: remove data.stream=false")
    return bool(setting)


def open_listing(
    listing: Listing, image_size: int, cache_dir: Path, stream: bool, num_workers: int | None, processes: int
) -> Images:
    """Opens the images of `listing`, stored or streamed.

    All files are decoded the first time, and again if any file has changed or the cache is incomplete. So an unreadable
    file is found before training starts, and stored and streamed images have the same statistics and digest.

    The cache of a split has at most two files:
    - The pixels, a memory-mapped array that the processes of one machine share. Only stored images have it.
    - The mark, a JSON file with the fingerprint of the image files and the summary of their pixels. It is written last.

    Raises DatasetError if an image cannot be read or the cache cannot be written.

    Args:
        num_workers: threads that decode; None: one per core, divided among `processes` while images are streamed.
        processes: number of processes that share this machine's cores.
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
            if summary is None:  # otherwise the mark is valid, and only the pixels are missing
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
            advice = "set data.cache_dir to another folder" + (
                ", or set data.stream=true to cache no pixels" if full else ""
            )
            raise DatasetError(f"cannot cache images in {cache_dir} ({error.strerror}): {advice}") from None
        logger.info("cached %s of %s in %s", "the statistics" if stream else "the images", listing.root, cache_dir)
        pixels = None if stream else _map_pixels(pixels_file, shape)
    if stream:
        logger.info(
            "streaming the %d images of %s: each batch is decoded shortly before its use",
            len(listing.files),
            listing.root,
        )
        return StreamedImages(listing, image_size, num_workers or max(1, num_cores() // processes), summary)
    assert pixels is not None, "the cache has just been read or written"
    labels = None if listing.labels is None else torch.tensor(listing.labels)
    images = StoredImages(torch.from_numpy(pixels), labels, listing.classes, summary)
    images.names = listing.files
    return images


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file to write to, which replaces `path` at the end.

    Unlike `utils.files.replacing`, several processes may write `path` at the same time. Each process has a temporary
    file of its own and locks it. Temporary files without a lock were left by killed processes and are removed.

    Raises OSError immediately if the disk is full or read-only.
    """
    _remove_leftovers(path.parent, f"{path.name}.*.partial")
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file, ExitStack() as held:
            with suppress(OSError, NotImplementedError):  # some storage has no locks; leftovers are not removed there
                held.enter_context(native_lock(partial))
            file.write(bytes(4096))  # a full or read-only disk fails here, not after the decoding
            file.flush()
            yield partial
            os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _allocate(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Creates a file for an array and allocates its blocks on the disk. Raises OSError if there is no space."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # without this, a full disk kills the process (SIGBUS) later
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _fingerprint(listing: Listing) -> str:
    """Returns a digest of the names, sizes and modification times of all files. It changes if any file changes.

    Raises DatasetError if a file cannot be accessed or is not a regular file.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in listing.files:
        try:
            status = (listing.root / file).stat()
        except OSError as error:
            raise DatasetError(
                f"cannot read {listing.root / file} ({error.strerror}): restore it, or make it readable"
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise DatasetError(f"{listing.root / file} is not a regular file: remove it")
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _decode_all(listing: Listing, image_size: int, num_workers: int, out: np.ndarray | None) -> Iterator[Tensor]:
    """Yields all pixels in order, one block at a time, and shows a progress bar.

    If `out` (N, 3, size, size) is given, the pixels are also written to it. Raises DatasetError if an image cannot be
    read.
    """
    count, size = len(listing.files), max(1, BLOCK_BYTES // (3 * image_size**2))
    logger.info("decoding %d images of %s", count, listing.root)
    blocks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    with tqdm(total=count, desc="decoding", unit="img", leave=False, disable=None) as bar:  # None: only on a terminal
        decoded = decode_batches(listing, image_size, blocks, num_workers)
        try:
            for block, pixels in zip(blocks, decoded, strict=True):
                if out is not None:
                    out[block.start : block.stop] = pixels.numpy()
                bar.update(len(pixels))
                yield pixels
        except DatasetError as error:
            raise DatasetError(f"{error}: repair or remove it") from None


def _remove_leftovers(folder: Path, pattern: str) -> None:
    """Removes the files in `folder` that match `pattern` and that no process has locked."""
    for left in folder.glob(pattern):
        with suppress(OSError, NotImplementedError), native_lock(left):
            left.unlink()


def _read_mark(path: Path, fingerprint: str, root: Path) -> Summary | None:
    """Returns the summary of the pixels, or None if the cache is missing, stale or damaged.

    Logs the reason if the cache is stale or damaged.
    """
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
    logger.info("the cache %s of %s %s: decoding all images again", path, root, reason)
    return None


def _map_pixels(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Maps the cached pixels into memory; returns None if the file is missing, truncated or damaged.

    A truncated or damaged file is also logged. The mapping is copy-on-write, because torch requires writable memory.
    Nothing writes to the mapping, so all processes share its pages.
    """
    try:
        pixels = np.load(path, mmap_mode="c")
        if pixels.shape == shape and pixels.dtype == np.uint8:
            return pixels
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):
        pass
    logger.info("the cached pixels in %s are truncated or damaged: decoding all images again", path)
    return None
