"""Listing of images whose labels or attributes are in a text file (`data.labels`)."""

import logging
from pathlib import Path

from datasets.images import DatasetError
from datasets.label_list import read_label_list
from datasets.listing import NEEDS_TEST, Listing, Listings, log_unjudged
from datasets.split_names import split_folders, split_of
from datasets.walking import all_images
from utils.text import join_names

logger = logging.getLogger(__name__)


def list_labelled(root: Path, labels: Path, held_out: bool = False) -> Listings:
    """Lists the files below `root` that the file `labels` names, with their labels or attributes.

    Files in a test folder (a name of SPLIT_WORDS) are the test split. All other files are training images. Of several
    test folders, the one with the first of these names is used, and the others are left out.

    Raises DatasetError if `labels` cannot be used, if there is no test split although there are labels, or if a test
    split is to be held out although there are only attributes.

    Args:
        labels: path of the file; it may be relative to `root`. `read_label_list` describes its contents.
        held_out: True if the caller holds out a test split of files that have none.
    """
    if not root.is_dir():
        raise DatasetError(f"no folder {root}: set data.root to the folder of the images that {labels} names")
    path = next((path for path in (labels, root / labels) if path.is_file()), None)
    if path is None:
        searched = "" if labels.is_absolute() else f" in the current folder or in {root}"
        raise DatasetError(f"no file {labels}{searched}: set data.labels to the path of the file of labels")
    files = all_images(root)
    found = read_label_list(path, files, root)
    train_files, test_files = _divide_by_folder(found.files, path)
    if not found.labels:
        train, test = (
            Listing(root, part, None, [], name, {file: found.attributes[file] for file in part}, found.attribute_names)
            for part, name in ((train_files, "train-list"), (test_files, "test-list"))
        )
        if held_out and not test.files:
            raise DatasetError(
                f"data.holdout needs labels, but {path} gives attributes: remove data.holdout (the measure "
                "attributes holds out images by itself)"
            )
        return train, test if test.files else None
    known = {found.labels[file] for file in train_files}
    if len(known) == 1:
        raise DatasetError(
            f"all {len(train_files)} training images that {path} names have the label {known.pop()}: add images with "
            "another label, or remove data.labels to train without labels"
        )
    judged = [file for file in test_files if found.labels[file] in known]
    if len(judged) < len(test_files):
        unknown = sorted({found.labels[file] for file in test_files} - known)
        logger.info(
            "left out the %d test images of classes without training images: %s",
            len(test_files) - len(judged),
            join_names(unknown),
        )
    classes = sorted(known, key=(lambda name: (int(name), name)) if all(map(_is_number, known)) else None)
    label_of = {name: label for label, name in enumerate(classes)}
    train, test = (
        Listing(root, part, [label_of[found.labels[file]] for file in part], classes, name)
        for part, name in ((train_files, "train-list"), (judged, "test-list"))
    )
    if test.files:
        log_unjudged(train, test)
        return train, test
    if not held_out:
        reason = (
            f"the {len(test_files)} test images that {path} names have no label of a training image"
            if test_files
            else f"{path} names no images in a folder test/ or val/"
        )
        raise DatasetError(f"{reason}: add such images, or {NEEDS_TEST}")
    return train, None


def _divide_by_folder(files: list[str], path: Path) -> tuple[list[str], list[str]]:
    """Returns (training files, test files), divided by the first folder of each path that has the name of a split.

    Args:
        path: file that names `files`.
    """
    folders = {file: next(filter(split_of, Path(file).parts[:-1]), "") for file in files}
    tests = split_folders(set(folders.values()), "test")
    train = [file for file in files if folders[file] not in tests]
    test = [file for file in files if folders[file] in tests[:1]]
    if not train:
        raise DatasetError(
            f"{path} names only images in {join_names([f'{name}/' for name in tests])}: add the training images to it, "
            "or, if this is not a test split, rename the folder"
        )
    if tests:
        logger.info(
            "of these images, the %d in %s/ are test images%s, and the other %d are training images",
            len(test),
            tests[0],
            f", the {len(files) - len(train) - len(test)} in {join_names(tests[1:])} are left out" if tests[1:] else "",
            len(train),
        )
    return train, test


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()
