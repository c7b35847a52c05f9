"""Files with the labels or the attributes of images, one image per line (`data.labels`)."""

import csv
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datasets.images import DatasetError
from utils.text import compose

logger = logging.getLogger(__name__)

VALUES = {"0": 0, "1": 1, "-1": 0}  # CelebA writes -1 for 0


@dataclass(frozen=True)
class LabelList:
    """Contents of a file of labels, for the images that exist. Either `labels` or `attributes` is empty.

    Attributes:
        files: paths of the images relative to the data set's folder, sorted.
        labels: label of each file.
        attributes: 0/1 values of each file, in the order of `names`.
        names: names of the attributes.
    """

    files: list[str]
    labels: dict[str, str]
    attributes: dict[str, list[int]]
    names: list[str]


def read_label_list(path: Path, files: list[str], root: Path) -> LabelList:
    """Reads a text file of rows `path, label`, or `path, 0/1 values` for two or more attributes.

    Columns are separated by commas, semicolons or tabs, or, if the first row has none of these, by blanks. Rows before
    the first row whose path has an ending, such as .jpg, are headings. The last heading names the attributes.

    Logs the number of rows whose image does not exist, and of images without a row. Raises DatasetError if the file
    cannot be read, or if a row is wrong.

    Args:
        files: paths of the images that exist, relative to `root`. Paths of rows are relative to `root` as well.
    """
    rows = _read_rows(path)
    start = next((index for index, (_, row) in enumerate(rows) if Path(row[0]).suffix), len(rows))
    headings, rows = [row for _, row in rows[:start]], rows[start:]
    if not rows:
        raise DatasetError(f"{path} names no images: write one row per image, with its path and its label")
    width = len(rows[0][1])
    existing = {compose(file): file for file in files}
    found: dict[str, list[str]] = {}
    missing = []
    for line, row in rows:
        if len(row) != width or width < 2 or not all(row):
            raise DatasetError(
                f"{path}, line {line}: write a path and a label, or a path and several values of 0 and 1, separated "
                "alike in every line"
            )
        file = existing.get(_relative(row[0], root))
        if file is None:
            missing.append(row[0])
        elif file in found:
            raise DatasetError(f"{path}, line {line}: {file} is named twice: remove one of the two lines")
        elif width > 2 and not VALUES.keys() >= set(row[1:]):
            raise DatasetError(f"{path}, line {line}: an attribute is neither 0 nor 1: write 0 or 1")
        else:
            found[file] = row[1:]
    if not found:
        raise DatasetError(
            f"{path} names none of the images in {root}: write paths relative to this folder, such as {files[0]} "
            f"instead of {missing[0]}"
        )
    if missing:
        logger.info("%s names %d images that are not in %s, such as %s", path, len(missing), root, missing[0])
    if len(found) < len(files):
        logger.info("left out %d images in %s that %s does not name", len(files) - len(found), root, path)
    kept = [file for file in files if file in found]
    if width == 2:
        return LabelList(kept, {file: compose(found[file][0]) for file in kept}, {}, [])
    names = headings[-1][1 - width :] if headings and len(headings[-1]) >= width - 1 else []
    names = names or [f"attribute {index}" for index in range(1, width)]
    return LabelList(kept, {}, {file: [VALUES[value] for value in found[file]] for file in kept}, names)


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Returns (number of the line, stripped columns) of all rows that are not empty. Raises DatasetError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        raise DatasetError(
            f"no file {path.name} here or in data.root: set data.labels to the path of the file of labels"
        ) from None
    except OSError as error:
        raise DatasetError(f"cannot read {path} ({error.strerror}): set data.labels to a readable file") from None
    except UnicodeDecodeError:
        raise DatasetError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    delimiter = next((mark for mark in ",;\t" if any(mark in line for line in lines[:2])), None)
    table: Iterable[list[str]] = (
        (line.split() for line in lines)
        if delimiter is None
        else csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    )
    stripped = ([cell.strip() for cell in row] for row in table)
    return [(number, row) for number, row in enumerate(stripped, start=1) if any(row)]


def _relative(path: str, root: Path) -> str:
    """Returns the path of a row relative to `root`, in the form in which paths are compared."""
    path = path.replace("\\", "/")
    if path.startswith("/"):
        path = os.path.relpath(path, root.absolute())
    return compose(str(PurePosixPath(os.path.normpath(path))))
