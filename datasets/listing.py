"""The list of a split's image files, and helpers of the functions that make such lists."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from datasets.walking import Walker
from utils.text import join_names

logger = logging.getLogger(__name__)

NEEDS_TEST = "set data.holdout=0.1 to hold out a tenth of each class"


@dataclass(frozen=True)
class Listing:
    """Image files of one split in a fixed order, with their labels if there are any. Paths are relative to `root`.

    Attributes:
        cache_name: beginning of the names of the files that cache the pixels. Listings of one root with different
            names have separate caches.
        attributes: 0/1 values of each file, in the order of `attribute_names`; empty if there are none.
    """

    root: Path
    files: list[str]
    labels: list[int] | None
    classes: list[str]
    cache_name: str = "files"
    attributes: dict[str, list[int]] = field(default_factory=dict)
    attribute_names: list[str] = field(default_factory=list)


Listings = tuple[Listing, Listing | None]
"""Training files, and test files if there are any."""


def list_classes(folder: Path, cache_name: str, walker: Walker, classes: list[str] | None = None) -> Listing:
    """Lists `folder`/<class>/**/<image>. Logs the images that are in no class folder.

    Args:
        classes: names of the classes. Folders of other classes are left out. None: all folders with images are classes.
    """
    within: dict[str, list[str]] = {}  # images by the folder directly below `folder`
    for file in walker.images_in(folder):
        within.setdefault(next(iter(Path(file).parent.parts), ""), []).append(file)
    found = {
        name: [file for inner in folders for file in within.get(inner, [])]
        for name, folders in walker.class_folders(folder).items()
    }
    empty = [name for name, files in found.items() if not files]
    if empty:
        logger.info("left out the folders without images in %s: %s", folder, join_names(empty))
    if classes is None:
        classes = [name for name, files in found.items() if files]
    unknown = [name for name, files in found.items() if files and name not in set(classes)]
    if unknown:
        logger.info(
            "left out the %d images in %s of classes without training images: %s",
            sum(len(found[name]) for name in unknown),
            folder,
            join_names(unknown),
        )
    log_loose(folder, len(within.get("", [])))
    files, labels = [], []
    for label, name in enumerate(classes):
        files += found.get(name, [])
        labels += [label] * len(found.get(name, []))
    return Listing(folder, files, labels, classes, cache_name)


def log_loose(folder: Path, count: int) -> None:
    """Logs that `count` images directly in `folder` are left out, if there are any."""
    if count:
        logger.info("%d images in %s are left out because they are not in a class folder", count, folder)


def log_unjudged(train: Listing, test: Listing) -> None:
    """Logs the classes that have training images, but no test images."""
    tested = set(test.labels or [])
    missing = [name for label, name in enumerate(train.classes) if label not in tested]
    if missing:
        logger.info("classes without test images in %s, which are not judged: %s", test.root, join_names(missing))
