"""Measures of features in addition to the protocols' accuracies, for `test.py --measures`.

To add a measure, write a module with a subclass of Measure and add the class to MEASURES. Heavy modules are imported in
the functions that use them, so that `test.py --help` and errors in options do not wait for the import of torch.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import TYPE_CHECKING, Any

from config.errors import ConfigError
from evaluation.measures.anomalies import Anomalies
from evaluation.measures.attributes import Attributes
from evaluation.measures.base import NUM_SAMPLES, Inputs, Measure, Measured
from evaluation.measures.disentanglement import Disentanglement
from evaluation.measures.few_labels import FewLabels
from evaluation.measures.generation import FID, FeatureDistance, Memorization
from evaluation.measures.prior import Prior
from evaluation.measures.reconstruction import LPIPS, Reconstruction
from evaluation.measures.robustness import Robustness
from evaluation.measures.uniformity import Uniformity
from utils.cli import path_option

__all__ = ["MEASURES", "Measure", "Measured", "add_options", "check_options", "describe_measures", "find_measures"]

if TYPE_CHECKING:
    from experiment.opening import Experiment

MEASURES: dict[str, type[Measure]] = {
    measure.name: measure
    for measure in (
        *(FewLabels, Robustness, Anomalies, Disentanglement, Attributes, Uniformity),
        *(Prior, Reconstruction, LPIPS, FeatureDistance, FID, Memorization),
    )
}
"""Class of each measure, by its name on the command line of test.py."""

ALL = "all"
SAMPLING = ("feature_distance", "fid", "memorization")  # measures of generated images


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 10:
        raise ArgumentTypeError(f"{text} is not a number of images: use an integer of at least 10")
    return int(text)


OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "others": (
        ("anomalies",),
        {
            "type": path_option,
            "metavar": "FOLDER",
            "help": "images that the measure anomalies compares with the test images; default: synthetic shapes",
        },
    ),
    "factors": (
        ("disentanglement",),
        {
            "type": path_option,
            "metavar": "FILE",
            "help": "CSV file for the measure disentanglement: a heading, a column of image files, relative to its "
            "folder, and columns of known factors (a name that ends in _degrees: angles); default: synthetic shapes",
        },
    ),
    "features_of": (
        ("feature_distance",),
        {
            "type": path_option,
            "metavar": "CHECKPOINT",
            "help": "checkpoint of train.py whose encoder compares generated images with real ones (feature_distance)",
        },
    ),
    "inception": (
        ("fid",),
        {"type": path_option, "metavar": "FILE", "help": "Inception weights of torch-fidelity, for the measure fid"},
    ),
    "lpips": (
        ("lpips",),
        {"type": path_option, "metavar": "FILE", "help": "AlexNet weights of torchvision, for the measure lpips"},
    ),
    "num_samples": (
        SAMPLING,
        {
            "type": _count,
            "metavar": "N",
            "help": f"number of generated images of each prior ({', '.join(SAMPLING)}); default: {NUM_SAMPLES}, or the "
            "number of test images if these are fewer",
        },
    ),
}
"""Options of the measures: name -> (measures that use it, arguments of `ArgumentParser.add_argument`)."""

logger = logging.getLogger(__name__)


def add_options(parser: ArgumentParser) -> None:
    """Adds the options of the measures to `parser`."""
    parser.add_argument(
        "--measures",
        type=_names,
        action="extend",
        default=[],
        metavar="NAMES",
        help="measures to print instead of the accuracies: all, or names in the list below, separated by commas; with "
        "--report, the accuracies are printed as well",
    )
    for name, (_, settings) in OPTIONS.items():
        parser.add_argument(f"--{name}", **settings)


def check_options(args: Namespace) -> None:
    """Raises ConfigError if an option is given without a measure that uses it."""
    for name, (measures, _) in OPTIONS.items():
        value = getattr(args, name)
        if value is not None and not {ALL, *measures} & set(args.measures):
            use = f"measure {measures[0]}" if len(measures) == 1 else f"measures {', '.join(measures)}"
            add = f"add {measures[0]} to --measures" if args.measures else f"add --measures {measures[0]}"
            raise ConfigError(f"--{name} {value} is for the {use}: {add}")


def _names(text: str) -> list[str]:
    """Returns the names in the option --measures, for argparse. Raises ArgumentTypeError if a name is unknown."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in (ALL, *MEASURES):
            raise ArgumentTypeError(f"there is no measure {name!r}: choose from {ALL}, {', '.join(MEASURES)}")
    return names


def describe_measures() -> str:
    """Returns the names of the measures with their meaning and their cost, one per line, for `--help`."""
    return "\n".join(f"  {name:<16} {each.meaning}; {each.cost}" for name, each in MEASURES.items())


def find_measures(names: list[str], experiment: Experiment, inputs: Inputs) -> tuple[list[Measure], dict[str, str]]:
    """Returns the measures with these names, and the reason for each one that is named but cannot be applied.

    ALL stands for all that can be applied; the others are logged.
    """
    found, left_out = [], {}
    for name in dict.fromkeys(MEASURES if ALL in names else names):
        measure = MEASURES[name]()
        obstacle = measure.missing() or measure.obstacle(experiment, inputs)
        if obstacle is None:
            found.append(measure)
        elif name in names:
            left_out[name] = obstacle
        else:
            logger.info("skipping the measure %s: %s", name, obstacle)
    return found, left_out
