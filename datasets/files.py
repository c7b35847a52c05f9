"""Image files decoded in parallel to uint8 squares, once: the second time they come from a cache on disk."""

import fcntl
import hashlib
import json
import logging
import os
import secrets
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from datasets.images import DatasetError, Images, channel_statistics, pixel_digest
from datasets.listing import Listing

logger = logging.getLogger(__name__)

CACHE_VERSION = 2  # raise when the pixels that decoding gives change, or what is known of them


def _decode(path: Path, image_size: int) -> np.ndarray:
    """An image file as a (size, size, 3) uint8 square: shorter side resized, centre cropped, grey made colour.

    Turned as its EXIF orientation says; 16-bit grey loses its low byte.
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
        raise DatasetError(f"cannot read the image {path} ({error}): mend or remove it") from None
    width, height = rgb.size
    if (width, height) != (image_size, image_size):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(rgb)


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


def _decode_all(listing: Listing, image_size: int, out: np.ndarray) -> None:
    """Fill `out` (N, 3, size, size) uint8, with a progress bar."""

    def work(indices: Sequence[int]) -> int:
        for index in indices:
            out[index] = _decode(listing.root / listing.files[index], image_size).transpose(2, 0, 1)
        return len(indices)

    logger.info("decoding %d images of %s", len(out), listing.root)
    blocks = [range(start, min(start + 256, len(out))) for start in range(0, len(out), 256)]
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(out), desc="decoding", unit="img", leave=False, disable=None) as bar,  # on a terminal only
    ):
        warnings.simplefilter("ignore")  # e.g. of a palette's transparency
        for done in pool.map(work, blocks):
            bar.update(done)


def memory_bytes() -> int:
    """What this process may use: the machine's memory, or less where a container is given less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # `max` is no number
            limits.append(int(Path(file).read_text()))
    return min(limits)


def check_memory(root: Path, count: int, image_size: int) -> None:
    """Raise DatasetError where `count` decoded images are larger than the memory."""
    needed, there = count * 3 * image_size**2, memory_bytes()
    if needed > there:
        raise DatasetError(
            f"the {count:,} images in {root} take {needed / 1e9:.1f} GB at {image_size} px, and there is "
            f"{there / 1e9:.1f} GB of memory: set data.image_size lower, or take fewer images"
        )


def load_listing(listing: Listing, image_size: int, cache_dir: Path) -> Images:
    """The decoded images, from the cache where it agrees with the files, else decoded and cached.

    The cache is two files a split: the pixels as a memory-mapped array, which processes of one machine share,
    and, written last, a mark with the fingerprint of their source and their channel statistics.
    """
    name = hashlib.blake2b(os.fsencode(listing.root.resolve()), digest_size=6).hexdigest()
    pixels_file = cache_dir / f"{name}-{image_size}.npy"
    mark_file = pixels_file.with_suffix(".json")
    shape = (len(listing.files), 3, image_size, image_size)
    wanted = {"version": CACHE_VERSION, "source": _fingerprint(listing)}
    mark = _read_mark(mark_file)
    if mark is None or mark["wanted"] != wanted or _map_pixels(pixels_file, shape) is None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            mark_file.unlink(missing_ok=True)
            _remove_leftovers(cache_dir, f"{pixels_file.stem}.*.partial")
            partial = pixels_file.with_suffix(f".{secrets.token_hex(4)}.partial")
            try:
                with open(partial, "xb") as file:
                    with suppress(OSError):
                        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed: this is no leftover
                    array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
                    if hasattr(os, "posix_fallocate"):  # else a disk that is full kills the process while it decodes
                        os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
                    _decode_all(listing, image_size, array)
                array.flush()
                pixels = torch.from_numpy(array)
                known = {"statistics": channel_statistics(pixels), "digest": pixel_digest(pixels)}
                mark = {"wanted": wanted, **known}
                partial.replace(pixels_file)
                partial.write_text(json.dumps(mark))
                partial.replace(mark_file)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise DatasetError(f"cannot cache images in {cache_dir} ({error}): set data.cache_dir") from None
        logger.info("cached %d images of %s in %s", len(listing.files), listing.root, pixels_file)
    mapped = _map_pixels(pixels_file, shape)
    assert mark is not None and mapped is not None, "the cache has just been read or written"
    mean, std = mark["statistics"]
    labels = None if listing.labels is None else torch.tensor(listing.labels)
    return Images(torch.from_numpy(mapped), labels, listing.classes, (tuple(mean), tuple(std)), mark["digest"])


def _remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the files that nobody holds a lock on any more, since who wrote them was killed."""
    for left in folder.glob(pattern):
        with suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _read_mark(path: Path) -> dict[str, Any] | None:
    """What the cache says of itself, or None where that cannot be read."""
    try:
        mark = json.loads(path.read_text())
        (_, _, _), (_, _, _) = mark["statistics"]
        return mark if isinstance(mark["wanted"], dict) and isinstance(mark["digest"], str) else None
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
