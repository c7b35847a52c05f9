"""A grid of images with captions, and the PNG file that shows it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evaluation.quality import to_pixels
from utils.files import replacing

CELL = 72  # smallest width of a shown image in pixels
GAP, MARGIN, LINE = 8, 16, 15
MAX_LABEL = 130  # largest width of a row's label in pixels
GREY = "#555555"
FRAME_MS = 150  # time that an image of an animation is shown


@dataclass
class Cell:
    """An image (3, H, W) uint8 on the host (None: the cell is empty), and the caption below it."""

    image: Tensor | None = None
    caption: str = ""


@dataclass
class Grid:
    """Cells by row and column, with a title, an explanation and labels.

    Attributes:
        title: heading of the grid.
        explanation: a few sentences that say how to read the grid.
        columns: a label for each column; a label may be empty.
        rows: a label for each row, or an empty list for no labels.
        frames: images (3, H, W) uint8 of an animation that accompanies the grid.
    """

    title: str
    explanation: str
    columns: list[str]
    rows: list[str]
    cells: list[list[Cell]] = field(repr=False)
    frames: list[Tensor] = field(repr=False, default_factory=list)


def to_cells(images: Tensor, captions: Sequence[str] | None = None) -> list[Cell]:
    """Returns a cell for each image of (N, 3, H, W), which are uint8, or float32 in [-1, 1]."""
    pixels = images.cpu() if images.dtype == torch.uint8 else to_pixels(images)
    return [Cell(image, caption) for image, caption in zip(pixels, captions or [""] * len(pixels), strict=True)]


def rows_of(columns: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    """Converts columns of cells, all of the same length, to rows of cells."""
    return [list(row) for row in zip(*columns, strict=True)]


@cache
def _font(size: int) -> Any:
    """Returns DejaVu Sans, which covers most alphabets, if matplotlib is installed; otherwise Pillow's ASCII font."""
    matplotlib = find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin is not None:
        path = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.exists():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


def save_grid(grid: Grid, path: Path, footer: str) -> None:
    """Writes the grid as a PNG file, with `footer`, a note on how the picture was made, at the bottom.

    All images are shown at one width. This is the width of the largest image, times an integer if it is below CELL.
    Equal grids give identical bytes. Missing folders are created.
    """
    side = max(cell.image.shape[-1] for row in grid.cells for cell in row if cell.image is not None)
    side *= max(1, -(-CELL // side))
    small, large = _font(11), _font(17)
    heads = [_lines(name, side + GAP - 4, small) for name in grid.columns]
    labels = [_lines(name, MAX_LABEL, small) for name in grid.rows]
    captions = [[_lines(cell.caption, side + GAP - 4, small) for cell in row] for row in grid.cells]

    label_width = max((_width(line, small) for lines in labels for line in lines), default=0)
    left = MARGIN + label_width + (GAP if label_width else 0)
    width = max(left + len(grid.columns) * (side + GAP) - GAP + MARGIN, 420)
    title, explanation, note = (
        _lines(text, width - 2 * MARGIN, font, at_most=20)
        for text, font in ((grid.title, large), (grid.explanation, small), (footer, small))
    )
    top = MARGIN + 24 * len(title) + LINE * len(explanation) + GAP
    head_height = LINE * max(map(len, heads))
    heights = [side + LINE * max(map(len, row)) + GAP for row in captions]
    height = top + head_height + sum(heights) + LINE * len(note) + GAP + MARGIN

    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)

    def write(lines: list[str], x: int, y: int, font: Any = small, colour: str = "black", step: int = LINE) -> None:
        for i, line in enumerate(lines):
            draw.text((x, y + step * i), line, colour, font)

    def write_centred(lines: list[str], x: int, y: int) -> None:
        for i, line in enumerate(lines):
            write([line], x + (side - _width(line, small)) // 2, y + LINE * i)

    write(title, MARGIN, MARGIN, large, step=24)
    write(explanation, MARGIN, MARGIN + 24 * len(title), colour=GREY)
    for column, lines in enumerate(heads):
        write_centred(lines, left + column * (side + GAP), top + head_height - LINE * len(lines))
    y = top + head_height + 2
    for row, row_cells in enumerate(grid.cells):
        if labels:
            write(labels[row], MARGIN, y + side // 2 - LINE * len(labels[row]) // 2)
        for column, cell in enumerate(row_cells):
            x = left + column * (side + GAP)
            if cell.image is not None:
                enlarged = F.interpolate(cell.image[None], (side, side), mode="nearest")[0]
                canvas.paste(Image.fromarray(enlarged.permute(1, 2, 0).numpy()), (x, y))
            write_centred(captions[row][column], x, y + side)
        y += heights[row]
    write(note, MARGIN, y + GAP, colour=GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        canvas.save(partial, format="png")


def write_gif(frames: Sequence[Tensor], file: Any) -> None:
    """Writes images (3, H, W) uint8 to a path or a binary file, as an animated GIF that repeats forever."""
    images = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in frames]
    images[0].save(file, format="gif", save_all=True, append_images=images[1:], duration=FRAME_MS, loop=0)


def save_gif(frames: Sequence[Tensor], path: Path) -> None:
    """Saves an animation (see `write_gif`). Missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        write_gif(frames, partial)


def _width(line: str, font: Any) -> int:
    return int(font.getlength(line)) + 1


def _lines(text: str, width: int, font: Any, at_most: int = 4) -> list[str]:
    """Breaks `text` into lines of at most `width` pixels: at spaces, or inside a word that is wider than a line.

    If there are more than `at_most` lines, "..." replaces line `at_most` and all lines after it.
    """
    lines: list[str] = []
    for part in text.split("\n"):
        line = ""
        for word in part.split(" "):
            longer = f"{line} {word}" if line else word
            if _width(longer, font) <= width:
                line = longer
                continue
            lines += [line] if line else []
            while _width(word, font) > width and len(word) > 1:
                fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or _width(word[:n], font) <= width)
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines += [line] if line else []
    return lines if len(lines) <= at_most else [*lines[: at_most - 1], "..."]
