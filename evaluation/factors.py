"""Images whose factors of variation are known: synthetic shapes, or files with a table of factors."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datasets.images import DatasetError, Images
from datasets.sources import open_files
from evaluation.features import Subset
from evaluation.shapes import FACTORS, Shapes
from experiment.opening import Experiment
from utils.distributed.collectives import all_equal, first_on_each_node
from utils.distributed.processes import local_world_size
from utils.randomness import generator

ANGLE = "_degrees"  # end of the name of a column with angles


@dataclass(frozen=True)
class KnownFactors:
    """Images and their factors.

    Attributes:
        title: what the images are, for a protocol.
        names: names of the K factors.
        values: (N, K) float64.
    """

    title: str
    images: Images | Subset
    names: list[str]
    values: Tensor

    def drawn(self, count: int, seed: int) -> "KnownFactors":
        """Returns `count` of the images, drawn at random and in random order, or all if they are fewer."""
        assert isinstance(self.images, Images), "drawn already"
        order = torch.randperm(len(self.images), generator=generator(seed, "images with factors"))[:count]
        return KnownFactors(self.title, Subset(self.images, order), self.names, self.values[order])


def shapes_with_factors(count: int, experiment: Experiment) -> KnownFactors:
    """Returns synthetic shapes of the encoder's size with size, position, hue and rotation."""
    shapes = Shapes(count, experiment.config.encoder_size, experiment.config.seed)
    return KnownFactors("synthetic shapes", shapes, list(FACTORS), shapes.factors.double())


def open_factors(table: Path, experiment: Experiment) -> KnownFactors:
    """Collective. Opens the images that a table lists, with the factors in its other columns.

    The table is a CSV file with a heading. The first column has the paths of the images, relative to the folder of the
    table; the others have numbers. A column whose name ends in `_degrees` has angles, and becomes two factors, cosine
    and sine, so that 359 degrees are near 1 degree.

    Raises DatasetError if the table cannot be used, or if images are missing or damaged.
    """
    files, names, values = read_table(table)
    grey_bits, data = experiment.info.grey_bits, experiment.config.data
    images = first_on_each_node(lambda: open_files(table.parent, files, data, local_world_size(), grey_bits))
    if not all_equal((images.digest(), values.tolist())):
        raise DatasetError(f"the machines hold different images or factors of {table}: copy the same files to all")
    if len(images) < len(files):
        raise DatasetError(f"{len(files) - len(images)} images of {table} cannot be read: remove their rows")
    return KnownFactors(f"the images of {table.name}", images, names, values)


def read_table(table: Path) -> tuple[list[str], list[str], Tensor]:
    """Returns files, names of the factors and their values (N, K) float64 of a table. Raises DatasetError."""
    try:
        lines = [line for line in csv.reader(table.read_text(encoding="utf-8-sig").splitlines()) if line]
    except OSError as error:
        raise DatasetError(f"cannot read {table} ({error.strerror}): set --factors to a CSV file") from None
    except (UnicodeDecodeError, csv.Error):
        raise DatasetError(f"{table} is not a CSV file in UTF-8: set --factors to one") from None
    if len(lines) < 2 or len(lines[0]) < 2:
        raise DatasetError(f"{table} has no factors: give it a heading, a column of files, and columns of numbers")
    columns: dict[str, list[float]] = {name: [] for name in lines[0][1:]}
    for number, line in enumerate(lines[1:], start=2):
        try:
            numbers = [float(text) for text in line[1:]]
        except ValueError:
            numbers = []
        if len(line) != len(lines[0]) or len(numbers) != len(columns) or not all(map(math.isfinite, numbers)):
            raise DatasetError(f"row {number} of {table} is not a path and {len(columns)} numbers: correct it")
        for column, value in zip(columns.values(), numbers, strict=True):
            column.append(value)
    factors: dict[str, list[float]] = {}
    for name, column in columns.items():
        if len(set(column)) == 1:
            raise DatasetError(f"the column {name} of {table} has the same value in all rows: remove it")
        if name.endswith(ANGLE):
            for function in (math.cos, math.sin):
                title = f"{function.__name__} of {name.removesuffix(ANGLE)}"
                factors[title] = [function(math.radians(each)) for each in column]
        else:
            factors[name] = column
    files = [line[0] for line in lines[1:]]
    return files, list(factors), torch.tensor(list(factors.values()), dtype=torch.float64).T
