"""Base class of the measures, and the form of their results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean, stdev
from typing import TYPE_CHECKING, ClassVar

from utils.logging import align

if TYPE_CHECKING:
    from torch import Tensor

    from datasets.images import Images
    from evaluation.factors import KnownFactors
    from evaluation.measures.subjects import Subjects
    from experiment.opening import Experiment

NUM_SAMPLES = 1000

Cell = dict[str, float]
"""Result of a measure for one encoder: {"value": ...}, with "deviation" if it is a mean over random draws."""

Rows = dict[str, dict[str, Cell]]
"""Cells of a table: {row: {column: cell}}. Columns are encoders, or sources of images or latents."""


@dataclass(frozen=True)
class Inputs:
    """Things that options of test.py give to the measures, and that are not in the checkpoint.

    Attributes:
        others: name and images of another data set.
        other_encoder: name of another encoder, and its function pixels (N, 3, H, W) uint8 -> features (N, D).
        inception: function pixels -> features (N, 2048) of the Inception network.
        lpips: function images, sources (N, 3, H, W) in [-1, 1] -> LPIPS (N,).
        num_samples: number of generated images, of each prior.
        factors: images with known factors; None: synthetic shapes.
    """

    others: tuple[str, Images] | None = None
    other_encoder: tuple[str, Callable[[Tensor], Tensor]] | None = None
    inception: Callable[[Tensor], Tensor] | None = None
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    num_samples: int = NUM_SAMPLES
    factors: KnownFactors | None = None


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


def too_few(experiment: Experiment, needed: int) -> str | None:
    """Returns the obstacle that a split has fewer than `needed` images, or None."""
    fewest = min(len(split) for split in (experiment.train, experiment.test) if split is not None)
    return f"it needs {needed} images of each split, and one has only {fewest}" if fewest < needed else None


class Measure(ABC):
    """One measure of an encoder, a prior or a decoder.

    Attributes:
        name: name of the measure on the command line of test.py, and in results.json.
        meaning: what the measure says of an encoder, in one line, for `--help`.
        cost: main work of the measure, in one line, for `--help`.
        needs: packages that the measure needs in addition to requirements.txt.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    cost: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def missing(self) -> str | None:
        """Returns the reason why the measure cannot be computed without further packages, or None."""
        missing = [module for module in self.needs if find_spec(module) is None]
        return f"it needs {' and '.join(missing)}: run pip install -r requirements-extra.txt" if missing else None

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        """Returns the reason why the measure cannot be applied to these images and inputs, or None.

        The text says what the measure needs.
        """
        return None

    @abstractmethod
    def measure(self, subjects: Subjects) -> Measured:
        """Collective. Measures all encoders of `subjects`, or its model. Returns the same table on all ranks."""


class MeasureOfClasses(Measure):
    """A measure that needs test images with labels."""

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        return None if experiment.has_test_labels else "it needs labels of training and test images"
