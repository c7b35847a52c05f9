"""Measures of features in addition to the protocols' accuracies, for `test.py --measures`.

To add a measure, write a module with a subclass of Measure and add the class to MEASURES. Heavy modules are imported in
the functions that use them, so that `test.py --help` and errors in options do not wait for the import of torch.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import TYPE_CHECKING

from config.errors import ConfigError
from evaluation.measures.anomalies import Anomalies
from evaluation.measures.attributes import Attributes
from evaluation.measures.base import Measure, Measured
from evaluation.measures.disentanglement import Disentanglement
from evaluation.measures.few_labels import FewLabels
from evaluation.measures.robustness import Robustness
from evaluation.measures.uniformity import Uniformity
from utils.cli import path_option

__all__ = ["MEASURES", "Measure", "Measured", "add_options", "check_options", "describe_measures", "find_measures"]

if TYPE_CHECKING:
    from experiment.opening import Experiment

MEASURES: dict[str, type[Measure]] = {
    measure.name: measure for measure in (FewLabels, Robustness, Anomalies, Disentanglement, Attributes, Uniformity)
}
"""Class of each measure, by its name on the command line of test.py."""

ALL = "all"

logger = logging.getLogger(__name__)


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of the measures to `parser`."""
    parser.add_argument(
        "--measures",
        type=_names,
        default=[],
        metavar="NAMES",
        help="measures to print instead of the accuracies: all, or names in the list below, separated by commas; with "
        "--report, the accuracies are printed as well",
    )
    parser.add_argument(
        "--others",
        type=path_option,
        metavar="FOLDER",
        help="images that the measure anomalies compares with the test images; default: synthetic shapes",
    )


def check_options(args: Namespace) -> None:
    """Raises ConfigError if an option of a measure is given, but not the measure."""
    if args.others and not {ALL, "anomalies"} & set(args.measures):
        raise ConfigError(f"--others {args.others} is for the measure anomalies: add --measures anomalies")


def _names(text: str) -> list[str]:
    """Returns the names in the option --measures, for argparse. Raises ArgumentTypeError if a name is unknown."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in (ALL, *MEASURES):
            raise ArgumentTypeError(f"there is no measure {name!r}: choose from {ALL}, {', '.join(MEASURES)}")
    return names


def describe_measures() -> str:
    """Returns the names of the measures with their meaning and their cost, one per line, for `--help`."""
    return "\n".join(f"  {name:<16} {each.meaning}; {each.cost}" for name, each in MEASURES.items())


def find_measures(names: list[str], experiment: Experiment) -> list[Measure]:
    """Returns the measures with these names. ALL stands for all that can be applied; the others are logged.

    Raises ConfigError if a measure that is named cannot be applied to the images.
    """
    found = []
    for name in MEASURES if ALL in names else names:
        measure = MEASURES[name]()
        obstacle = measure.obstacle(experiment)
        if obstacle is None:
            found.append(measure)
        elif name in names:
            raise ConfigError(f"the measure {name} cannot be applied, because {obstacle}: remove it from --measures")
        else:
            logger.info("skipping the measure %s, because %s", name, obstacle)
    return found
