"""Decoding of image files to uint8 squares: a single file, or batches of files by threads that read ahead."""

import errno
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config.schema import Data
from datasets.findings import GREY_BITS, Findings, ImageError
from datasets.images import DatasetError, Images, Indices, Summary
from datasets.listing import Listing

AHEAD = 3  # number of batches that are decoded ahead of the batch in use
GROUP = 8  # images that one thread decodes per job
BAND_PIXELS = 2**24  # larger images are converted and resized in bands of this many pixels, which saves memory

# Transposition that makes an image upright, by the value of its orientation tag.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112  # the number of this tag


@dataclass(frozen=True)
class Rules:
    """Choices by which the content of an image file becomes pixels.

    Attributes:
        background: colour behind transparent pixels, (red, green, blue) from 0 to 255.
        max_megapixels: larger images are not read.
        grey_bits: number of bits that hold the greys of files with more than 8 bits per grey; None: 16.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    max_megapixels: float = 250.0
    grey_bits: int | None = None


DEFAULT_RULES = Rules()


def rules_of(data: Data, grey_bits: int | None = None) -> Rules:
    """Returns the rules of a config's section `data`, with the range of greys that the training images have."""
    red, green, blue = data.background
    return Rules((red, green, blue), data.max_megapixels, grey_bits)


@cache
def _silence_pil() -> None:
    """Ignores PIL's warnings (for example about the transparency of a palette) from the first call on.

    The filter is never removed: `warnings.catch_warnings` around each image would change the filters of all threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(path: Path, image_size: int, rules: Rules = DEFAULT_RULES, findings: Findings | None = None) -> np.ndarray:
    """Decodes an image file to a (size, size, 3) uint8 square.

    The central square of the image is cropped and resized to `image_size`. The EXIF orientation is applied. Transparent
    pixels show `rules.background`. Greyscale becomes RGB, and greys of more than 8 bits keep the highest 8 of
    `rules.grey_bits` bits. Only the first frame of an animation and the first page of a document are read.

    Raises ImageError if the file cannot be read, is too large or has floating-point pixels.

    Args:
        findings: facts about the file are added to it.
    """
    _silence_pil()
    Image.MAX_IMAGE_PIXELS = math.ceil(rules.max_megapixels * 1e6 / 2)  # PIL refuses images of twice this size
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("the range of floating-point pixels is unknown")
            stored = [str(tile[3]) for tile in getattr(image, "tile", [])]  # `load` forgets how pixels are stored
            if image.format == "TIFF":
                _forget_metadata(image)
            image.load()
            _match_transparency(image, stored)
            square = np.asarray(_square(image, image_size, rules))
            if findings is not None:
                _note(findings, image, stored, square)
            return square
    except Image.DecompressionBombError:
        reason = f"it has more pixels than data.max_megapixels={rules.max_megapixels:g} allows"
        raise ImageError(path, reason, damaged=True) from None
    except FileNotFoundError:
        reason = "it is a link to a missing file" if path.is_symlink() else "it is missing"
        raise ImageError(path, reason, damaged=path.is_symlink()) from None
    except MemoryError:
        raise ImageError(path, "it does not fit in memory", damaged=False) from None
    except Exception as error:  # PIL's decoders raise many types for damaged files
        described = isinstance(error, (OSError, ValueError, SyntaxError))
        text = re.sub(f":? {re.escape(repr(os.fspath(path)))}", "", str(error))  # the message names the file already
        reason = " ".join(f"{'' if described else type(error).__name__ + ': '}{text}".split())
        # Errors of the system have a number. PIL's own have none, and damaged files make PIL seek invalid positions.
        damaged = not isinstance(error, OSError) or error.errno in (None, errno.EINVAL)
        raise ImageError(path, reason, damaged) from None


def central_square(width: int, height: int) -> tuple[float, float, float, float]:
    """Returns the box (left, top, right, bottom) of the central square of an image. Its edges may halve a pixel."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _square(image: Image.Image, size: int, rules: Rules) -> Image.Image:
    """Returns the upright central square (size, size) of a loaded image, as RGB."""
    orientation = orientation_of(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    left, top, right, bottom = box = central_square(width, height)
    is_final = image.mode == "RGB" and orientation == 1 and not image.has_transparency_data  # needs no copy
    if is_final or width * height <= BAND_PIXELS:
        rgb = _upright_rows(image, orientation, 0, height, rules)
        return rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BILINEAR, box=box)
    # In bands, so that the image is never copied as a whole: rows first and columns second. PIL does so as well, except
    # for images at least twice as high as wide. Their pixels may differ from PIL's by one level.
    reach = max(1, (right - left) / size) + 1  # distance at which pixels outside of the square contribute to its edge
    first, last = max(0, math.floor(top - reach)), min(height, math.ceil(bottom + reach))
    narrow = Image.new("RGB", (size, last - first))
    step = max(1, BAND_PIXELS // width)
    for start in range(first, last, step):
        band = _upright_rows(image, orientation, start, min(start + step, last), rules)
        row_box = (left, 0, right, band.height)
        narrow.paste(band.resize((size, band.height), Image.Resampling.BILINEAR, box=row_box), (0, start - first))
    return narrow.resize((size, size), Image.Resampling.BILINEAR, box=(0, top - first, size, bottom - first))


def _forget_metadata(image: Image.Image) -> None:
    """Removes the metadata of a TIFF file except its orientation.

    PIL reads this metadata while it loads the pixels, and raises errors for tags of unusual types.
    """
    for name in ("xmp", "XML:com.adobe.xmp"):  # these may hold the orientation, as text
        if not isinstance(image.info.get(name, ""), (bytes, str)):
            del image.info[name]
    with suppress(Exception):
        exif = image.getexif()
        for tag in set(exif) - {ORIENTATION}:
            del exif[tag]


def orientation_of(image: Image.Image) -> int:
    """Returns the orientation of an image, from 1 to 8. Damaged metadata count as none, as in viewers.

    If the image is not loaded, metadata behind the pixels of a PNG file count as none.
    """
    try:
        found = Image.Image.getexif(image).get(ORIENTATION, 1)  # PNG's own function loads the pixels
        return int(found) if found in UPRIGHT else 1
    except Exception:
        return 1


def _upright_rows(image: Image.Image, orientation: int, start: int, end: int, rules: Rules) -> Image.Image:
    """Returns the rows from `start` to `end` of the upright image, as RGB."""
    width, height = image.size
    rows = height if orientation < 5 else width
    if end - start < rows:
        if orientation in (3, 4, 7, 8):  # the upright image begins with the last row or column
            start, end = rows - end, rows - start
        image = image.crop((0, start, width, end) if orientation < 5 else (start, 0, end, height))
    rgb = _to_rgb(image, rules)
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def _to_rgb(image: Image.Image, rules: Rules) -> Image.Image:
    """Returns the image as RGB, on the background of the rules."""
    if image.mode.startswith("I"):
        values, bits = np.asarray(image), rules.grey_bits or GREY_BITS[-1]
        rgb = Image.fromarray((values.clip(0, 2**bits - 1) >> (bits - 8)).astype(np.uint8)).convert("RGB")
        if "transparency" in image.info:
            opaque = Image.fromarray(values != image.info["transparency"])
            rgb = Image.composite(rgb, Image.new("RGB", rgb.size, rules.background), opaque)
        return rgb
    if image.has_transparency_data:
        below = Image.new("RGBA", image.size, (*rules.background, 255))
        return Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _match_transparency(image: Image.Image, stored: list[str]) -> None:
    """Scales the transparent colour of a PNG as PIL scales its pixels.

    PIL converts pixels of 2, 4 and 3 x 16 bits to 8 bits, and keeps the transparent colour in the depth of the file.
    """
    clear = image.info.get("transparency")
    if isinstance(clear, int) and stored in (["L;2"], ["L;4"]):
        image.info["transparency"] = clear * (85 if stored == ["L;2"] else 17)
    elif isinstance(clear, tuple) and stored == ["RGB;16B"]:
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _note(findings: Findings, image: Image.Image, stored: list[str], square: np.ndarray) -> None:
    """Adds facts about a loaded image to the findings."""
    opaque = image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255)
    if image.has_transparency_data and not opaque:
        findings.add("transparent")
    if image.mode.startswith("I"):
        findings.add_grey(*_extremes(image))
    elif any(";16" in each for each in stored) and square.max() < 2**4:  # PIL keeps the high byte of 16-bit colours
        findings.add("dark")
    if _has_frames(image):
        findings.add("frames")


def _has_frames(image: Image.Image) -> bool:
    """Returns True if an image has several frames or pages. Reads from its file: use its pixels before this call."""
    try:
        return image.format != "PSD" and bool(getattr(image, "is_animated", False))  # a PSD has layers, not frames
    except Exception:  # the second frame is damaged
        return True


def _extremes(image: Image.Image) -> tuple[int, int]:
    """Returns the lowest and the highest value of a loaded greyscale image."""
    width, height = image.size
    step = max(1, BAND_PIXELS // width)
    bands = (np.asarray(image.crop((0, y, width, min(y + step, height)))) for y in range(0, height, step))
    lowest, highest = zip(*((int(band.min()), int(band.max())) for band in bands), strict=True)
    return min(lowest), max(highest)


def decode_batches(
    listing: Listing,
    image_size: int,
    wanted: Iterable[Indices],
    num_workers: int,
    pin_memory: bool = False,
    rules: Rules = DEFAULT_RULES,
    findings: Findings | None = None,
) -> Generator[Tensor, None, None]:
    """Yields the pixels (N, 3, size, size) uint8 of each batch of indices, decoded ahead by `num_workers` threads.

    Threads are used instead of processes because PIL releases the GIL while it decodes and resizes. Threads write the
    pixels directly into the batch, which can be in pinned memory. They cannot run out of shared memory, and their
    exceptions keep their type.

    Raises ImageError if a file cannot be read. The error is raised in place of the batch that contains the file.

    Args:
        findings: facts about the files are added to it. Files that cannot be read are then black and raise no error.
    """

    def fill(out: np.ndarray, indices: list[int]) -> None:
        for square, index in zip(out, indices, strict=True):
            try:
                pixels = decode(listing.root / listing.files[index], image_size, rules, findings)
                square[:] = pixels.transpose(2, 0, 1)
            except ImageError as error:
                if findings is None:
                    raise
                findings.add_error(listing.files[index], error)
                square[:] = 0

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
        rules: rules by which the caller has decoded the files.
    """

    def __init__(
        self,
        listing: Listing,
        image_size: int,
        num_workers: int,
        summary: Summary,
        rules: Rules = DEFAULT_RULES,
    ) -> None:
        labels = None if listing.labels is None else torch.tensor(listing.labels)
        super().__init__((len(listing.files), 3, image_size, image_size), labels, listing.classes, summary)
        self.names, self.folder = listing.files, listing.root
        self._listing, self._num_workers, self._rules = listing, num_workers, rules

    def batches(self, wanted: Iterable[Indices], pin_memory: bool = False) -> Generator[Tensor, None, None]:
        try:
            yield from decode_batches(self._listing, self.shape[-1], wanted, self._num_workers, pin_memory, self._rules)
        except DatasetError as error:
            raise DatasetError(f"{error}: restore the original file and run the command again") from None
