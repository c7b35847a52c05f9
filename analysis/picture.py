"""A picture: rows and columns of images, each with a caption, all of them labelled."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 72  # pixels that an image is wide at least, enlarged by whole numbers
GAP, MARGIN, LINE = 8, 16, 15
MAX_LABEL = 22  # letters in a line of a row's label


@dataclass
class Cell:
    """An image (3, H, W) uint8 on the host, or None for a place that stays empty, and what stands below it."""

    image: Tensor | None = None
    caption: str = ""


@dataclass
class Picture:
    """Cells by row and column, with what a reader must know to read them.

    Attributes:
        name: a word for a file.
        title: what it shows; explanation: how to read it, in a sentence or two.
        rows: their labels, empty for none; columns: likewise.
    """

    name: str
    title: str
    explanation: str
    columns: list[str]
    rows: list[str]
    cells: list[list[Cell]] = field(repr=False)


def to_pixels(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1], or a little outside, as uint8 on the host."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu()


def cells(images: Tensor, captions: Sequence[str] | None = None) -> list[Cell]:
    """Of images (N, 3, H, W), uint8, or float32 in [-1, 1]."""
    pixels = images.cpu() if images.dtype == torch.uint8 else to_pixels(images)
    return [Cell(image, caption) for image, caption in zip(pixels, captions or [""] * len(pixels), strict=True)]


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def save_picture(picture: Picture, path: Path, footer: str) -> None:
    """Write it as a PNG, the title above, `footer` (how it was made) below; the same bytes for the same picture."""
    side = next(cell.image.shape[-1] for row in picture.cells for cell in row if cell.image is not None)
    scale = max(1, -(-CELL // side))
    side *= scale
    small, bold = _font(12), _font(18)
    wrap = max(8, side // 6)  # letters under an image and above it
    heads = [_lines(name, wrap) for name in picture.columns]
    labels = [_lines(name, MAX_LABEL) for name in picture.rows]
    captions = [[_lines(cell.caption, wrap) for cell in row] for row in picture.cells]

    label_width = max((_width(line, small) for lines in labels for line in lines), default=0)
    left = MARGIN + label_width + (GAP if label_width else 0)
    width = max(left + len(picture.columns) * (side + GAP) - GAP + MARGIN, 420)
    title = textwrap.wrap(picture.title, (width - 2 * MARGIN) // 9)
    notes = [textwrap.wrap(text, (width - 2 * MARGIN) // 6) for text in (picture.explanation, footer)]
    top = MARGIN + 24 * len(title) + LINE * len(notes[0]) + GAP
    head_height = LINE * max((len(lines) for lines in heads), default=0)
    heights = [side + LINE * max(map(len, row)) + GAP for row in captions]
    height = top + head_height + sum(heights) + LINE * len(notes[1]) + GAP + MARGIN

    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(title):
        draw.text((MARGIN, MARGIN + 24 * i), line, "black", bold)
    for i, line in enumerate(notes[0]):
        draw.text((MARGIN, MARGIN + 24 * len(title) + LINE * i), line, "#555555", small)
    for column, lines in enumerate(heads):
        _centred(draw, left + column * (side + GAP), top + head_height - LINE * len(lines), side, lines, small)
    y = top + head_height + 2
    for row, row_cells in enumerate(picture.cells):
        for i, line in enumerate(labels[row] if labels else []):
            draw.text((MARGIN, y + side // 2 - LINE * len(labels[row]) // 2 + LINE * i), line, "black", small)
        for column, cell in enumerate(row_cells):
            x = left + column * (side + GAP)
            if cell.image is not None:
                enlarged = F.interpolate(cell.image[None], scale_factor=scale, mode="nearest")[0]
                canvas.paste(Image.fromarray(enlarged.permute(1, 2, 0).numpy()), (x, y))
            _centred(draw, x, y + side, side, captions[row][column], small)
        y += heights[row]
    for i, line in enumerate(notes[1]):
        draw.text((MARGIN, y + GAP + LINE * i), line, "#555555", small)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    canvas.save(partial, format="png")
    partial.replace(path)


def _lines(text: str, width: int) -> list[str]:
    return [line for part in text.split("\n") for line in textwrap.wrap(part, width)]


def _width(line: str, font: Any) -> int:
    return int(font.getlength(line)) + 1


def _centred(draw: Any, x: int, y: int, width: int, lines: list[str], font: Any) -> None:
    for i, line in enumerate(lines):
        draw.text((x + (width - _width(line, font)) // 2, y + LINE * i), line, "black", font)
