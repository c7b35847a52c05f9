"""Data sets of image files: Tiny-ImageNet in its official layout, and any folder. Decoded once, then cached."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from datasets.images import DatasetError, Images, channel_statistics

logger = logging.getLogger(__name__)

CACHE_VERSION = 1  # raise when the pixels that decoding gives change


@dataclass(frozen=True)
class Listing:
    """The image files of one split, relative to `root`, in a fixed order, with their labels if there are any."""

    root: Path
    files: list[str]
    labels: list[int] | None
    classes: list[str]


def _image_files(folder: Path) -> list[str]:
    """Paths of the images anywhere below `folder`, relative to it, sorted; hidden files are passed over.

    Links are followed, each real folder once.
    """

    def unreadable(error: OSError) -> None:
        raise DatasetError(f"cannot read the folder {error.filename}: {error.strerror}") from None

    found, seen = [], set()
    for base, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(base)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in seen)
        if real not in seen:
            relative = Path(base).relative_to(folder)
            found += [str(relative / name) for name in names if _is_image(name)]
        seen.add(real)
    return sorted(found)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _class_folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _list_classes(folder: Path, classes: list[str]) -> Listing:
    """`folder`/<class>/**/<image> for each of `classes`."""
    files, labels = [], []
    for label, name in enumerate(classes):
        inside = _image_files(folder / name)
        if not inside:
            raise DatasetError(f"no images in {folder / name} (known endings: {' '.join(IMG_EXTENSIONS)})")
        files += [f"{name}/{file}" for file in inside]
        labels += [label] * len(inside)
    return Listing(folder, files, labels, classes)


def list_folder(root: Path) -> tuple[Listing, Listing | None]:
    """Training and test files of `root`/train/<class>/* and `root`/test/<class>/* (or val), or of a flat folder.

    A flat folder, `root`/* or `root`/train/*, has no labels and no test split.
    """
    if not root.is_dir():
        raise DatasetError(f"no folder {root}: set data.root to one that holds train/<class>/* and test/<class>/*")
    train = root / "train" if (root / "train").is_dir() else root
    classes = _class_folders(train)
    if train == root or not classes:
        files = _image_files(train)
        if not files:
            raise DatasetError(f"no images in {train} (known endings: {' '.join(IMG_EXTENSIONS)})")
        return Listing(train, files, None, []), None
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test is None:
        raise DatasetError(f"{root} has train/ but neither test/ nor val/, which the evaluation needs")
    if _class_folders(test) != classes:
        odd = sorted(set(classes) ^ set(_class_folders(test)))
        raise DatasetError(f"{train} and {test} hold different classes: {', '.join(odd[:5])}")
    if len(classes) == 1:
        raise DatasetError(f"{train} holds one class only: give at least two, or put its images into {train} itself")
    for split in (train, test):
        beside = sum(_is_image(path.name) for path in split.iterdir())
        if beside:
            logger.info("%d images in %s itself are passed over: they belong to no class", beside, split)
    return _list_classes(train, classes), _list_classes(test, classes)


def list_tiny_imagenet(root: Path) -> tuple[Listing, Listing]:
    """Tiny-ImageNet's official layout; its validation split, labelled by val_annotations.txt, is the test split."""
    base = next((f for f in (root, root / "tiny-imagenet-200") if (f / "wnids.txt").is_file()), None)
    if base is None:
        raise DatasetError(
            f"no Tiny-ImageNet in {root}: unpack tiny-imagenet-200.zip there (it holds wnids.txt, train/ and val/)"
        )
    try:
        classes = sorted((base / "wnids.txt").read_text().split())
        rows = [line.split("\t") for line in (base / "val" / "val_annotations.txt").read_text().splitlines()]
        labels = [classes.index(row[1]) for row in rows]
    except (OSError, ValueError, IndexError) as error:
        raise DatasetError(f"{base} is not a complete Tiny-ImageNet ({error}): unpack it again") from None
    if not rows:
        raise DatasetError(f"{base / 'val' / 'val_annotations.txt'} is empty: unpack tiny-imagenet-200.zip again")
    test = Listing(base / "val" / "images", [row[0] for row in rows], labels, classes)
    return _list_classes(base / "train", classes), test


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
            raise DatasetError(f"cannot read {listing.root / file}: {error.strerror}") from None
        digest.update(f"{file}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _decode_all(listing: Listing, image_size: int, out: np.ndarray) -> None:
    """Fill `out` (N, 3, size, size) uint8, with a progress bar."""

    def work(indices: Sequence[int]) -> int:
        for index in indices:
            out[index] = _decode(listing.root / listing.files[index], image_size).transpose(2, 0, 1)
        return len(indices)

    blocks = [range(start, min(start + 256, len(out))) for start in range(0, len(out), 256)]
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(out), desc=f"decoding {listing.root}", unit="img", leave=False) as bar,
    ):
        warnings.simplefilter("ignore")  # e.g. of a palette's transparency
        for done in pool.map(work, blocks):
            bar.update(done)


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
            partial = pixels_file.with_suffix(f".{os.getpid()}.partial")
            try:
                array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
                _decode_all(listing, image_size, array)
                array.flush()
                mark = {"wanted": wanted, "statistics": channel_statistics(torch.from_numpy(array))}
                partial.replace(pixels_file)
                partial.write_text(json.dumps(mark))
                partial.replace(mark_file)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise DatasetError(f"cannot cache images in {cache_dir} ({error}): set data.cache_dir") from None
        logger.info("cached %d images of %s in %s", len(listing.files), listing.root, pixels_file)
    pixels = _map_pixels(pixels_file, shape)
    assert mark is not None and pixels is not None, "the cache has just been read or written"
    mean, std = mark["statistics"]
    labels = None if listing.labels is None else torch.tensor(listing.labels)
    return Images(torch.from_numpy(pixels), labels, listing.classes, (tuple(mean), tuple(std)))


def _read_mark(path: Path) -> dict[str, Any] | None:
    """What the cache says of itself, or None where that cannot be read."""
    try:
        mark = json.loads(path.read_text())
        (_, _, _), (_, _, _) = mark["statistics"]
        return mark if isinstance(mark["wanted"], dict) else None
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
