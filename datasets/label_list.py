"""Files with the labels or the attributes of images, one image per line (`data.labels`)."""

import csv
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datasets.formats import image_endings
from datasets.images import DatasetError
from datasets.walking import is_image
from utils.files import marked_encoding
from utils.text import compose

logger = logging.getLogger(__name__)

VALUES = {"0": 0, "1": 1, "-1": 0}  # CelebA writes -1 for 0
SEPARATORS = {"\t": "tabs", ";": "semicolons", ",": "commas", None: "blanks"}  # None: any number of blanks and tabs
DECISIVE = 100  # number of lines after which the format is no longer in doubt


@dataclass(frozen=True)
class LabelList:
    """Contents of a file of labels, for the images that exist. Either `labels` or `attributes` is empty.

    Attributes:
        files: paths of the images relative to the data set's folder, in the order in which they were given.
        labels: label of each file.
        attributes: 0/1 values of each file, in the order of `attribute_names`.
    """

    files: list[str]
    labels: dict[str, str]
    attributes: dict[str, list[int]]
    attribute_names: list[str]


@dataclass(frozen=True)
class _Format:
    """Format of the lines: `separator`, and the number of `values` that follow the path."""

    separator: str | None
    values: int

    def split(self, line: str) -> list[str]:
        """Returns [path, *values] of a line. There are fewer cells if separators are missing.

        The path may contain the separator. Other cells may contain it if they are in double quotes.
        """
        if '"' not in line:
            cells = line.rsplit(self.separator, self.values)
        else:
            cells = _cells(line, self.separator)
            if len(cells) > self.values:
                cells = [_join(cells[: -self.values], self.separator), *cells[-self.values :]]
        return [cell.strip() for cell in cells]


class _Files:
    """Paths of the images that exist, relative to `root`, found by any spelling of the path."""

    def __init__(self, files: list[str], root: Path) -> None:
        self._root = root
        self._exact = set(files)
        self._composed: dict[str, list[str]] = {}
        for file in files:
            self._composed.setdefault(compose(file), []).append(file)

    def named(self, path: str) -> list[str]:
        """Returns the file that has this path, or else all files whose names have the same composed form."""
        if path in self._exact:
            return [path]
        if not path.lower().endswith(image_endings()):  # saves the slow steps for most texts that are no path
            return []
        if Path(path).is_absolute():
            with suppress(ValueError):  # Windows: on another drive than `root`
                path = os.path.relpath(path, self._root)
        path = path.replace("\\", "/")
        path = str(PurePosixPath(os.path.normpath(path)))
        return [path] if path in self._exact else self._composed.get(compose(path), [])


def read_label_list(path: Path, files: list[str], root: Path) -> LabelList:
    """Reads a text file of lines `path, label`, or `path, 0/1 values` for two or more attributes.

    Columns are separated by commas, semicolons, tabs or blanks. The separator and the number of columns are chosen so
    that the most lines name existing images. Paths may therefore contain any of these characters. Lines before the
    first path of an image are headings. The last heading names the attributes.

    Logs the format, and the number of lines whose image does not exist, and of images without a line. Raises
    DatasetError if the file cannot be read, or if a line is wrong.

    Args:
        files: paths of the images that exist, relative to `root`. Paths in the file are relative to `root` as well.
    """
    lines = _read_lines(path)
    existing = _Files(files, root)
    chosen = _choose_format(path, lines, existing, files[0], root)
    headings: list[str] = []
    line_of: dict[str, int] = {}
    found: dict[str, list[str]] = {}
    missing: list[str] = []
    for number, line in lines:
        name, *values = chosen.split(line)
        named = existing.named(name)
        if not named and not line_of and not missing and not is_image(PurePosixPath(name).name):
            headings.append(line)
            continue
        where = f"{path}, line {number}"
        if len(named) > 1:
            raise DatasetError(
                f"{where}: {name} is the name of {len(named)} files that differ only in their Unicode form "
                f"({', '.join(map(ascii, named))}): rename one of them"
            )
        _check_values(where, values, chosen)
        if not named:
            _check_path(where, line, chosen, existing)
            missing.append(name)
        elif named[0] in found:
            raise DatasetError(
                f"{where}: {named[0]} is in line {line_of[named[0]]} already: remove one of the two lines"
            )
        else:
            found[named[0]], line_of[named[0]] = values, number
    kept = [file for file in files if file in found]
    logger.info(
        "%d images in %s have %s in %s. Its lines are read as %s, because this names the most existing images%s",
        len(kept),
        root,
        "labels" if chosen.values == 1 else f"{chosen.values} attributes",
        path,
        _expected(chosen),
        f"; {len(headings)} before the first path are headings" if headings else "",
    )
    if missing:
        logger.info("%s names %d images that are not in %s, such as %s", path, len(missing), root, missing[0])
    if len(kept) < len(files):
        logger.info("left out %d images in %s that %s does not name", len(files) - len(kept), root, path)
    if chosen.values == 1:
        return LabelList(kept, {file: compose(found[file][0]) for file in kept}, {}, [])
    attributes = {file: [VALUES[value] for value in found[file]] for file in kept}
    return LabelList(kept, {}, attributes, _attribute_names(path, headings, chosen))


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """Returns (number, stripped text) of all lines that are not empty. Raises DatasetError.

    The file is UTF-8, or has the byte-order mark of UTF-16, which spreadsheet programs write.
    """
    try:
        text = path.read_text(encoding=marked_encoding(path.read_bytes()) or "utf-8")
    except FileNotFoundError:
        raise DatasetError(f"no file {path}: set data.labels to the path of the file of labels") from None
    except OSError as error:
        raise DatasetError(f"cannot read {path} ({error.strerror}): set data.labels to a readable file") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # also in UTF-16 without a mark
        raise DatasetError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    stripped = ((number, line.strip()) for number, line in enumerate(text.split("\n"), start=1))
    return [(number, line) for number, line in stripped if line]


def _cells(line: str, separator: str | None) -> list[str]:
    """Returns the stripped cells of a line, without double quotes around them."""
    if '"' not in line:
        return [cell.strip() for cell in line.split(separator)]
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator or " ", skipinitialspace=True))]
    except csv.Error:  # a cell is longer than 128 KiB
        return [line]


def _join(cells: list[str], separator: str | None) -> str:
    return (separator or " ").join(cells)


def _possible_formats(line: str) -> Iterator[_Format]:
    """Yields the formats that a line can have: a path and a label, or a path and the 0/1 values at the line's end."""
    for separator in SEPARATORS:
        cells = _cells(line, separator)
        if len(cells) > 1:
            yield _Format(separator, 1)
        values = next((index for index, cell in enumerate(reversed(cells)) if cell not in VALUES), 0)
        if values > 1:
            yield _Format(separator, values)


def _choose_format(path: Path, lines: list[tuple[int, str]], existing: _Files, example: str, root: Path) -> _Format:
    """Returns the format in which most of the first lines name existing images. Raises DatasetError if none does.

    Args:
        example: path of an image that exists.
    """
    counts: Counter[_Format] = Counter()
    for _, line in lines:
        counts.update(each for each in _possible_formats(line) if existing.named(each.split(line)[0]))
        if counts and max(counts.values()) >= DECISIVE:
            break
    if counts:
        return max(counts, key=lambda each: counts[each])
    if not lines:
        raise DatasetError(f"{path} is empty: write one line per image, with its path and its label")
    for number, line in lines[:DECISIVE]:
        if existing.named(line):
            raise DatasetError(
                f"{path}, line {number}: the path {line} has no label: write its label behind it, separated by a comma"
            )
        for separator in SEPARATORS:
            _check_path(f"{path}, line {number}", line, _Format(separator, 1), existing)
    raise DatasetError(
        f"{path} names none of the images in {root}: begin each line with a path relative to this folder, such as "
        f"{example}, and not as in its last line, {lines[-1][1][:100]}"
    )


def _expected(chosen: _Format) -> str:
    columns = "a path and a label" if chosen.values == 1 else f"a path and {chosen.values} values of 0 and 1"
    return f"{columns}, separated by {SEPARATORS[chosen.separator]}"


def _check_values(where: str, values: list[str], chosen: _Format) -> None:
    """Raises DatasetError if there are too few values, or if a value of an attribute is neither 0 nor 1."""
    if len(values) < chosen.values or not all(values):
        raise DatasetError(f"{where} is not complete: write {_expected(chosen)}")
    wrong = next((value for value in values if value not in VALUES), None)
    if chosen.values > 1 and wrong is not None:
        raise DatasetError(f"{where}: the value {wrong} of an attribute is neither 0 nor 1: write 0 or 1")


def _check_path(where: str, line: str, chosen: _Format, existing: _Files) -> None:
    """Raises DatasetError if a line has too many columns: its path is longer than that of an image that exists."""
    cells = _cells(line, chosen.separator)
    for count in range(1, len(cells) - chosen.values):
        name = _join(cells[:count], chosen.separator)
        if existing.named(name):
            raise DatasetError(
                f"{where}: {len(cells) - count} columns follow the path {name}: write {_expected(chosen)}, and put a "
                f"label that contains {SEPARATORS[chosen.separator]} in double quotes"
            )


def _attribute_names(path: Path, headings: list[str], chosen: _Format) -> list[str]:
    """Returns the last columns of the last heading. If it has too few, returns the numbers of the attributes.

    Raises DatasetError if two attributes have the same name.
    """
    cells = _cells(headings[-1], chosen.separator) if headings else []
    if len(cells) >= chosen.values:
        names = cells[-chosen.values :]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise DatasetError(f"{path} has two columns {twice[0]!r}: rename one")
        return names
    return [f"attribute {index}" for index in range(1, chosen.values + 1)]
