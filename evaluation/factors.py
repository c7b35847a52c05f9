"""Images whose factors of variation are known: synthetic shapes, or files with a table of factors."""

import csv
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datasets.images import DatasetError, Images
from datasets.sources import open_files
from evaluation.shapes import FACTORS, Shapes
from experiment.opening import Experiment
from utils.distributed.collectives import all_equal, first_on_each_node
from utils.distributed.processes import local_world_size
from utils.randomness import generator
from utils.text import join_names

logger = logging.getLogger(__name__)

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
    images: Images
    names: list[str]
    values: Tensor


def shapes_with_factors(count: int, experiment: Experiment) -> KnownFactors:
    """Returns synthetic shapes of the encoder's size with size, position, hue and rotation."""
    shapes = Shapes(count, experiment.config.encoder_size, experiment.config.seed)
    return KnownFactors("synthetic shapes", shapes, list(FACTORS), shapes.factors.double())


def open_factors(table: Path, count: int, experiment: Experiment) -> KnownFactors:
    """Collective. Opens at most `count` of the images that a table lists, drawn at random, with their factors.

    The table is a CSV file with a heading. The first column has the paths of the images, relative to the folder of the
    table; the others have numbers. A column whose name ends in `_degrees` has angles, and becomes two factors, cosine
    and sine, so that 359 degrees are near 1 degree. Factors that have only one value are left out.

    Raises DatasetError if the table cannot be used, or if images are missing or damaged.
    """
    files, names, values = read_table(table)
    total = len(files)
    order = torch.randperm(len(files), generator=generator(experiment.config.seed, "images with factors"))[:count]
    files, values = [files[i] for i in order.tolist()], values[order]
    grey_bits, data = experiment.info.grey_bits, experiment.config.data
    images = first_on_each_node(lambda: open_files(table.parent, files, data, local_world_size(), grey_bits))
    if not all_equal((images.digest(), values.tolist())):
        raise DatasetError(f"the machines hold different images or factors of {table}: copy the same files to all")
    readable = set(images.names or [])
    values = values[[i for i, file in enumerate(files) if file in readable]]
    varying = [j for j in range(len(names)) if len(values[:, j].unique()) > 1]
    if not varying:
        raise DatasetError(f"in the images of {table}, each factor has only one value: add images with other values")
    if len(varying) < len(names):
        constant = [name for j, name in enumerate(names) if j not in varying]
        logger.info("factors left out, because they have only one value: %s", join_names(constant))
    title = f"{len(values)} of the {total} images of {table.name}"
    return KnownFactors(title, images, [names[j] for j in varying], values[:, varying])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_table(table: Path) -> tuple[list[str], list[str], Tensor]:
    """Returns files, names of the factors and their values (N, K) float64 of a table. Raises DatasetError."""
    try:
        reader = csv.reader(table.read_text(encoding="utf-8-sig").splitlines())
        lines = [(reader.line_num, line) for line in reader if line]
    except OSError as error:
        raise DatasetError(f"cannot read {table} ({error.strerror}): set --factors to a CSV file") from None
    except (UnicodeDecodeError, csv.Error):
        raise DatasetError(f"{table} is not a CSV file in UTF-8: set --factors to one") from None
    if len(lines) < 2 or len(lines[0][1]) < 2:
        raise DatasetError(f"{table} has no factors: give it a heading, a column of files, and columns of numbers")
    (_, heading), *rest = lines
    if all(_is_number(text) for text in heading[1:]):
        raise DatasetError(
            f"the first line of {table} has only numbers after its first cell: add a heading, or rename the columns"
        )
    if len(set(heading)) < len(heading):
        raise DatasetError(f"{table} has two columns of one name: rename one")
    rows = []
    for number, line in rest:
        try:
            row = [float(text) for text in line[1:]]
        except ValueError:
            row = []
        if len(line) != len(heading) or not row or not all(map(math.isfinite, row)):
            wanted = f"{len(heading) - 1} number{'s' * (len(heading) > 2)}"
            raise DatasetError(f"line {number} of {table} is not a path and {wanted}: correct it")
        rows.append(row)
    factors: dict[str, list[float]] = {}
    for name, column in zip(heading[1:], zip(*rows, strict=True), strict=True):
        if name.endswith(ANGLE):
            for function in (math.cos, math.sin):  # rounded, so that a constant sine is found
                title = f"{function.__name__} of {name.removesuffix(ANGLE)}"
                factors[title] = [round(function(math.radians(each)), 9) for each in column]
        else:
            factors[name] = list(column)
    return [line[0] for _, line in rest], list(factors), torch.tensor(list(factors.values()), dtype=torch.float64).T
