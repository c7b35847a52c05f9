"""Base class of the measures, and the form of their results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, ClassVar

from utils.logging import align

if TYPE_CHECKING:
    from evaluation.measures.subjects import Subjects
    from experiment.opening import Experiment

Cell = dict[str, float]
"""Result of a measure for one encoder: {"value": ...}, with "deviation" if it is a mean over random draws."""

Rows = dict[str, dict[str, Cell]]
"""Cells of a table: {row: {column: cell}}. Columns are encoders."""


def mean_cell(values: Sequence[float]) -> Cell:
    """Returns mean and sample standard deviation of two or more values."""
    return {"value": fmean(values), "deviation": stdev(values)}


@dataclass(frozen=True)
class Measured:
    """Table that a measure has computed.

    Attributes:
        protocol: settings of the measure, in one line.
        decimals: number of decimals that are shown.
    """

    protocol: str
    rows: Rows
    decimals: int = 1

    @property
    def lines(self) -> list[list[str]]:
        """Heading and rows as texts. The first text of a row is its name."""
        columns = list(dict.fromkeys(column for cells in self.rows.values() for column in cells))
        shown = [[name, *(self._show(cells.get(column)) for column in columns)] for name, cells in self.rows.items()]
        return [["", *columns], *shown]

    def __str__(self) -> str:
        return f"{self.protocol}\n{align(self.lines)}"

    def _show(self, cell: Cell | None) -> str:
        if cell is None:
            return ""
        deviation = f" ± {cell['deviation']:.{self.decimals}f}" if "deviation" in cell else ""
        return f"{cell['value']:z.{self.decimals}f}{deviation}"


class Measure(ABC):
    """One measure of features, which is computed for several encoders.

    Attributes:
        name: name of the measure on the command line of test.py, and in results.json.
        meaning: what the measure says of an encoder, in one line, for `--help`.
        cost: main work of the measure, in one line, for `--help`.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    cost: ClassVar[str]

    def obstacle(self, experiment: Experiment) -> str | None:
        """Returns the reason why the measure cannot be applied to the experiment's images, or None."""
        return None

    @abstractmethod
    def measure(self, subjects: Subjects) -> Measured:
        """Collective. Measures all encoders of `subjects`. Returns the same table on all ranks."""


class MeasureOfClasses(Measure):
    """A measure that needs test images with labels."""

    def obstacle(self, experiment: Experiment) -> str | None:
        return "the images have no labels" if experiment.test is None else None
