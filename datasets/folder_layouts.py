"""Listings of folders whose layout gives the splits and the classes. If a layout has several readings, logs the choice.

A class layout is <class>/**/<image>, and a flat layout has no classes.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from datasets.images import DatasetError
from datasets.listing import NEEDS_TEST, Listing, Listings, list_classes, log_loose, log_unjudged
from datasets.split_names import split_folders, split_of
from datasets.walking import Walker, all_images
from utils.text import compose, join_names

logger = logging.getLogger(__name__)

MAX_COVERS = 5  # number of images beside class folders that can be covers


@dataclass(frozen=True)
class _Layout:
    """Sub-folders of `root`. `trains` and `tests` have the names of splits, the best name first."""

    root: Path
    trains: list[str]
    tests: list[str]
    others: list[str]

    def without(self, *used: str) -> list[str]:
        """Returns the sorted names of all sub-folders except `used`."""
        return sorted({*self.trains, *self.tests, *self.others}.difference(used))


def list_folder(root: Path, held_out: bool = False) -> Listings:
    """Lists the training and test files of a folder, and logs the reading if there are several.

    A folder with classes has its files in `root`/train/<class>/ and `root`/test/<class>/, at any depth. These two
    folders may also have another name of SPLIT_WORDS. Of several test folders, the one with the most classes of the
    training folder is used. A flat folder has its files directly in `root`/train, or, if there is no such folder,
    anywhere below `root`. It has no labels and no test split.

    Raises DatasetError if there are no images, or if the classes or the test split are unusable.

    Args:
        held_out: True if the caller holds out a test split of files that have none. In `root`/<class>/, the sub-folders
            are then the classes.
    """
    if not root.is_dir():
        raise DatasetError(f"no folder {root}: set data.root to a folder with train/<class>/* and test/<class>/*")
    walker = Walker()
    listings = _list_below(root, held_out, walker)
    walker.log_left_out(root)
    return listings


def _list_below(root: Path, held_out: bool, walker: Walker) -> Listings:
    names = walker.folders_in(root)
    others = [name for name in names if split_of(name) is None]
    layout = _Layout(root, split_folders(names, "train"), split_folders(names, "test"), others)
    if held_out and _splits_are_classes(layout, walker):
        return _list_root_classes(root, walker), None
    if layout.trains:
        return _list_splits(layout, held_out, walker)
    test = next((name for name in layout.tests if walker.has_images(root / name)), None)
    if test:
        raise DatasetError(
            f"{root} has {test}/, but no train/: rename the folder of the training images to train, set data.root to "
            f"the folder that holds both, or, if {test} is a class, {f'rename {test}' if held_out else NEEDS_TEST}"
        )
    return _list_together(root, held_out, walker)


def _splits_are_classes(layout: _Layout, walker: Walker) -> bool:
    """Returns True if the folders with names of splits are classes, like the folders beside them. Logs this reading.

    A folder that is called train or test cannot be a split with labels if it has no class folders. It is a class if
    there is no split of the other kind, and if there are other classes.
    """
    named = layout.trains + [name for name in layout.tests if walker.has_images(layout.root / name)]
    both_kinds = layout.trains and layout.tests
    if not named or both_kinds or any(_has_class_folders(layout.root / name, walker) for name in named):
        return False
    beside = [name for name in layout.others if walker.has_images(layout.root / name)]
    if len(beside) < (1 if layout.trains else 2):  # one folder beside test/ may be the training images without classes
        return False
    logger.info(
        "read as classes, not as splits: %s in %s, because data.holdout is set, and they have no class folders and are "
        "beside other folders with images (%s). If they are splits, move them out of %s",
        join_names(named),
        layout.root,
        join_names(beside),
        layout.root,
    )
    return True


def _has_class_folders(folder: Path, walker: Walker) -> bool:
    return any(walker.has_images(folder / name) for name in walker.folders_in(folder))


def _list_root_classes(root: Path, walker: Walker) -> Listing:
    return _check_classes(list_classes(root, "classes", walker), "remove data.holdout, to train without labels", walker)


def _check_classes(train: Listing, advice: str, walker: Walker) -> Listing:
    """Returns the training files. Raises DatasetError if there are none, or if they have only one class."""
    if not train.files:
        raise walker.no_images(train.root)
    if len(train.classes) == 1:
        raise DatasetError(f"{train.root} has only one class, {train.classes[0]}: add another class, or {advice}")
    return train


def _list_splits(layout: _Layout, held_out: bool, walker: Walker) -> Listings:
    """Lists the files in the split folders of a layout with at least one training folder."""
    root, tests = layout.root, layout.tests
    name = next((name for name in layout.trains if _has_class_folders(root / name, walker)), None)
    if name is None:
        return _list_flat(layout, held_out, walker), None
    train = list_classes(root / name, "classes", walker)
    _check_classes(train, f"move the images of this class into {train.root} and remove its folder", walker)
    shared = {test: _count_shared(root / test, train.classes, walker) for test in tests}
    best = max(shared, key=lambda test: shared[test], default=None)
    if best and shared[best]:
        test = list_classes(root / best, "classes", walker, train.classes)
        unread = layout.without(name, best)
        if unread or (name, best) not in (("train", "test"), ("train", "val")):
            logger.info(
                "in %s, %s/ is the training split and %s/ the test split%s", root, name, best, _not_read(unread)
            )
        log_unjudged(train, test)
        return train, test
    if not held_out and not tests:
        raise DatasetError(
            f"{root} has {name}/ but neither test/ nor val/: add test/, which the evaluation needs, or {NEEDS_TEST}"
        )
    have = "has" if len(tests) == 1 else "have"
    no_match = f"{' and '.join(tests)} in {root} {have} no images in the classes of {train.root}"
    if not held_out:
        raise DatasetError(f"{no_match} ({join_names(train.classes)}): add them, or {NEEDS_TEST}")
    unread = layout.without(name)
    if unread:
        reason = no_match if tests else f"{name}/ has class folders, and there is no test folder"
        logger.info("%s: the test split is held out from %s%s", reason, train.root, _not_read(unread))
    return train, None


def _count_shared(folder: Path, classes: list[str], walker: Walker) -> int:
    """Returns the number of `classes` that have images in `folder`."""
    folders = walker.class_folders(folder)
    return sum(any(walker.has_images(folder / inner) for inner in folders.get(name, [])) for name in classes)


def _not_read(names: list[str]) -> str:
    return f"; not read: {join_names(names)}" if names else ""


def _list_flat(layout: _Layout, held_out: bool, walker: Walker) -> Listing:
    """Lists the images in the best training folder of a layout whose training folders have no classes."""
    name = next((name for name in layout.trains if walker.has_images(layout.root / name)), layout.trains[0])
    train = layout.root / name
    files = walker.images_in(train)
    if not files:
        raise walker.no_images(train)
    if held_out:
        raise _no_labels(train, f", or, if {name} is a class, rename it" if layout.others else "")
    unread = layout.without(name)
    if unread or name != "train":
        logger.info(
            "the images in %s have no labels, because %s/ has no class folders%s%s",
            train,
            name,
            _not_read(unread),
            f". If {join_names([name, *unread])} are classes, {NEEDS_TEST}" if unread and not layout.tests else "",
        )
    return Listing(train, files, None, [], "flat")


def _no_labels(folder: Path, more_advice: str = "") -> DatasetError:
    return DatasetError(
        f"data.holdout needs labels, but {folder} has no class folders: remove data.holdout, move the images into "
        f"folders of their classes, or set data.labels{more_advice}"
    )


def _list_together(root: Path, held_out: bool, walker: Walker) -> Listings:
    """Lists the images of a folder without split folders: flat, or, if `held_out` is set, its class folders.

    If one folder further down holds split folders, that folder is read instead.
    """
    files = walker.images_in(root)
    if not files:
        raise walker.no_images(root)
    holders = _split_holders(files)
    if len(holders) == 1:
        place = root / holders[0]
        others = sum(Path(holders[0]) not in Path(file).parents for file in files)
        logger.info("reading %s, because the training and test folders are there; not read: %d images", place, others)
        return _list_below(place, held_out, walker)
    if holders:
        raise DatasetError(
            f"{root} holds several folders with training and test images ({join_names(holders)}): set data.root to one "
            "of them"
        )
    within = sorted({compose(Path(file).parts[0]) for file in files if len(Path(file).parts) > 1})
    if held_out:
        if not within:
            raise _no_labels(root)
        return _list_root_classes(root, walker), None
    if len(within) > 1:
        logger.info(
            "%s has no train/ folder: all %d images below it are training images. The folders in it (%s) are not "
            "read as classes, because there is no test split. If they are classes, %s",
            root,
            len(files),
            join_names(within),
            NEEDS_TEST,
        )
    return Listing(root, files, None, [], "flat"), None


def _split_holders(files: list[str]) -> list[str]:
    """Returns the outermost folders that hold both a training folder and a test folder with some of `files`."""
    found: dict[str, set[str]] = {}
    for folder in {Path(file).parent for file in files}:
        for depth, part in enumerate(folder.parts):
            if split := split_of(part):
                found.setdefault(str(Path(*folder.parts[:depth])), set()).add(split)
    both = {holder for holder, splits in found.items() if len(splits) == 2}
    return sorted(holder for holder in both if not both.intersection(map(str, Path(holder).parents)))


def list_images(folder: Path) -> Listing:
    """Lists all images below `folder`. The sub-folders are the classes if almost all images are in them.

    Images directly in `folder` are left out as covers if they are few: a single image, or at most MAX_COVERS images
    and a tenth of the images in the sub-folders. Otherwise, and if there is only one sub-folder beside them, no image
    has a label and none is left out. The log says which.

    Raises DatasetError if there is no such folder, or if it has no images.
    """
    files = all_images(folder)
    in_classes = [file for file in files if len(Path(file).parts) > 1]
    names = [compose(Path(file).parts[0]) for file in in_classes]
    classes = sorted(set(names))
    loose = len(files) - len(in_classes)
    are_covers = len(classes) > 1 and loose <= max(1, min(MAX_COVERS, len(in_classes) // 10))
    if loose and not are_covers:
        if in_classes:
            logger.info(
                "the images have no labels: %d are directly in %s, and %d in its sub-folders",
                loose,
                folder,
                len(in_classes),
            )
        return Listing(folder, files, None, [])
    log_loose(folder, loose)
    label_of = {name: label for label, name in enumerate(classes)}
    return Listing(folder, in_classes, [label_of[name] for name in names], classes)
