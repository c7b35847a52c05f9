"""Lists of the image files of a data set: Tiny-ImageNet in its official layout, any folder, and a file of labels."""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from datasets.formats import count_others, image_endings
from datasets.images import DatasetError
from datasets.label_list import read_label_list
from utils.run_folder.folder import OUTPUTS, is_run_folder
from utils.text import compose, few

logger = logging.getLogger(__name__)

# Folders with the images of a split, in any capitals. If several test folders fit, the first of these words wins.
SPLIT_WORDS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation", "eval")}
SPLIT_NAME = re.compile(r"([a-z]+?)[ _-]?(?:set|split|data|images)?", re.IGNORECASE)

# Folders of operating systems and storage devices, in small letters. They hold thumbnails and deleted files.
SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot"),
    *("__macosx", "network trash folder", "temporary items"),
    *("lost+found", "$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),
}

NEEDS_TEST = "set data.holdout=0.1 to hold out a tenth of each class"


@dataclass(frozen=True)
class Listing:
    """Image files of one split in a fixed order, with their labels if there are any. Paths are relative to `root`.

    Attributes:
        kind: word for the way in which the files were found. Listings of one root with different kinds have separate
            caches.
        attributes: 0/1 values of each file, in the order of `attribute_names`; empty if there are none.
    """

    root: Path
    files: list[str]
    labels: list[int] | None
    classes: list[str]
    kind: str = "files"
    attributes: dict[str, list[int]] = field(default_factory=dict)
    attribute_names: list[str] = field(default_factory=list)


Listings = tuple[Listing, Listing | None]
"""Training files, and test files if there are any."""


def _image_files(folder: Path, left_out: list[Path]) -> list[str]:
    """Returns the sorted paths of all images below `folder`, relative to it. Hidden files and folders are skipped.

    Links are followed, but each real folder is read only once. Raises DatasetError if a folder cannot be read.

    Args:
        left_out: folders of systems and of runs, which are not read, are added to this list.
    """
    found, seen = [], set()
    for base, folders, names in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        real = os.path.realpath(base)
        folders[:] = [] if real in seen else _input_folders(Path(base), folders, left_out)
        if real not in seen:
            relative = Path(base).relative_to(folder)
            found += [str(relative / name) for name in names if _is_image(name)]
        seen.add(real)
    return sorted(found, key=lambda file: (compose(file), file))


def _raise_unreadable(error: OSError) -> None:
    raise DatasetError(
        f"cannot read the folder {error.filename} ({error.strerror}): restore it, or make it readable"
    ) from None


def _is_image(name: str) -> bool:
    return name.lower().endswith(image_endings()) and not name.startswith(".")


def _no_images(folder: Path) -> DatasetError:
    others = count_others(folder)
    return DatasetError(
        f"no images in {folder}{f' (left out: {others})' if others else ''}: add files that Pillow reads, for example "
        ".jpg, .png or .webp"
    )


def _input_folders(folder: Path, names: Iterable[str], left_out: list[Path]) -> list[str]:
    """Returns the sorted `names` of sub-folders of `folder` that may hold images, and adds the others to `left_out`."""
    outputs = OUTPUTS if is_run_folder(folder) else ()
    kept = []
    for name in sorted(name for name in names if not name.startswith(".")):
        if name.casefold() in SYSTEM_FOLDERS or name in outputs or is_run_folder(folder / name):
            left_out.append(folder / name)
        else:
            kept.append(name)
    return kept


def is_listed(path: Path, root: Path) -> bool:
    """Returns True if a file at `path` counts as an image of the data set in the folder `root`."""
    path, folder = path.resolve(), root.resolve()
    if not path.is_relative_to(folder) or not _is_image(path.name):
        return False
    for name in path.relative_to(folder).parts[:-1]:
        if not _input_folders(folder, [name], []):
            return False
        folder /= name
    return True


def _folders_in(folder: Path, left_out: list[Path]) -> list[str]:
    _, names, _ = next(os.walk(folder, onerror=_raise_unreadable))
    return _input_folders(folder, names, left_out)


def _class_folders(folder: Path, left_out: list[Path]) -> dict[str, list[str]]:
    """Returns the sub-folders of each class, by the name of the class.

    Names are equal if their composed forms are equal: a class may have a folder of each form.
    """
    found: dict[str, list[str]] = {}
    for name in _folders_in(folder, left_out):
        found.setdefault(compose(name), []).append(name)
    return dict(sorted(found.items()))


def _log_left_out(left_out: list[Path]) -> None:
    if left_out:
        logger.info("left out %s, made by systems or by runs", few(sorted({str(folder) for folder in left_out})))


def _split_word(name: str) -> tuple[str, int] | None:
    """Returns ("train" or "test", rank of the word) for the name of a folder with a split, and None for others."""
    matched = SPLIT_NAME.fullmatch(name)
    for split, words in SPLIT_WORDS.items():
        if matched and matched[1].lower() in words:
            return split, words.index(matched[1].lower())
    return None


def _split_folders(names: Iterable[str], split: str) -> list[str]:
    """Returns the names of folders with `split` ("train" or "test"), the best name first."""
    ranked = [
        (word[1], name != name.lower(), name) for name in names if (word := _split_word(name)) and word[0] == split
    ]
    return [name for *_, name in sorted(ranked)]


def _list_classes(folder: Path, kind: str, left_out: list[Path], classes: list[str] | None = None) -> Listing:
    """Lists `folder`/<class>/**/<image>. Logs the images that are in no class folder.

    Args:
        classes: names of the classes. Folders of other classes are left out. None: all folders with images are classes.
    """
    found = {
        name: [f"{inner}/{file}" for inner in inners for file in _image_files(folder / inner, left_out)]
        for name, inners in _class_folders(folder, left_out).items()
    }
    empty = [name for name, inside in found.items() if not inside]
    if empty:
        logger.info("left out the folders without images in %s: %s", folder, few(empty))
    unknown = [name for name, inside in found.items() if inside and classes is not None and name not in classes]
    if unknown:
        count = sum(len(found[name]) for name in unknown)
        logger.info("left out the %d images in %s of classes without training images: %s", count, folder, few(unknown))
    beside = sum(_is_image(path.name) for path in folder.iterdir())
    if beside:
        logger.info("%d images in %s are left out because they are not in a class folder", beside, folder)
    classes = [name for name, inside in found.items() if inside] if classes is None else classes
    files, labels = [], []
    for label, name in enumerate(classes):
        files += found.get(name, [])
        labels += [label] * len(found.get(name, []))
    return Listing(folder, files, labels, classes, kind)


def _check_classes(train: Listing, advice: str) -> Listing:
    """Returns the training files. Raises DatasetError if there are none, or if they have only one class."""
    if not train.files:
        raise _no_images(train.root)
    if len(train.classes) == 1:
        raise DatasetError(f"{train.root} has only one class: add another class, or {advice}")
    return train


def _log_unjudged(train: Listing, test: Listing) -> None:
    """Logs the classes that have training images, but no test images."""
    tested = set(test.labels or [])
    missing = [name for label, name in enumerate(train.classes) if label not in tested]
    if missing:
        logger.info("classes without test images in %s, which are not judged: %s", test.root, few(missing))


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
    left_out: list[Path] = []
    inside = _folders_in(root, left_out)
    found = _list_splits(root, inside, held_out, left_out) or _list_together(root, held_out, left_out)
    _log_left_out(left_out)
    return found


def _list_splits(root: Path, inside: list[str], held_out: bool, left_out: list[Path]) -> Listings | None:
    """Lists the files in the split folders among `inside`, sub-folders of `root`; None: there is no training folder."""
    trains, tests = _split_folders(inside, "train"), _split_folders(inside, "test")
    if not trains:
        filled = [name for name in tests if _image_files(root / name, left_out)]
        if filled:
            raise DatasetError(
                f"{root} has {filled[0]}/, but no train/: rename the folder of the training images to train, or set "
                "data.root to the folder that holds both"
            )
        return None
    name = next((name for name in trains if _class_folders(root / name, left_out)), trains[0])
    train = root / name
    if not _class_folders(train, left_out):
        if held_out and not tests and len(inside) > 1:
            return None  # `train` is one of several classes
        return _list_flat(root, name, inside, held_out, left_out), None
    listing = _list_classes(train, "classes", left_out)
    _check_classes(listing, f"move the images of this class into {train} and remove its folder")
    shared = {
        test: sum(
            any(_image_files(root / test / inner, left_out) for inner in inners)
            for name, inners in _class_folders(root / test, left_out).items()
            if name in listing.classes
        )
        for test in tests
    }
    best = max(shared, key=lambda test: shared[test], default=None)
    test = _list_classes(root / best, "classes", left_out, listing.classes) if best and shared[best] else None
    if test is not None and test.files:
        others = [each for each in inside if each not in (name, best)]
        if others or (name, best) not in (("train", "test"), ("train", "val")):
            unread = f"; not read: {few(others)}" if others else ""
            logger.info("in %s, %s/ is the training split and %s/ the test split%s", root, name, best, unread)
        _log_unjudged(listing, test)
        return listing, test
    if not held_out and not tests:
        raise DatasetError(
            f"{root} has {name}/ but neither test/ nor val/: add test/, which the evaluation needs, or {NEEDS_TEST}"
        )
    reason = (
        f"{' and '.join(tests)} in {root} {'has' if len(tests) == 1 else 'have'} no images in the classes of {train}"
    )
    if not held_out:
        raise DatasetError(f"{reason} ({few(listing.classes)}): add them, or {NEEDS_TEST}")
    if tests:
        logger.info("%s: the test split is held out from %s", reason, train)
    return listing, None


def _list_flat(root: Path, name: str, inside: list[str], held_out: bool, left_out: list[Path]) -> Listing:
    """Lists the images in the training folder `name`, which has no classes."""
    train = root / name
    files = _image_files(train, left_out)
    if not files:
        raise _no_images(train)
    if held_out:
        raise _no_labels(train)
    others = [each for each in inside if each != name]
    if others or name != "train":
        unread = f"; not read: {few(others)}" if others else ""
        logger.info("the images in %s have no labels, because %s/ has no class folders%s", root, name, unread)
    return Listing(train, files, None, [], "flat")


def _no_labels(folder: Path) -> DatasetError:
    return DatasetError(
        f"data.holdout needs labels, but {folder} has no class folders: remove data.holdout, move the images into "
        "folders of their classes, or set data.labels"
    )


def _list_together(root: Path, held_out: bool, left_out: list[Path]) -> Listings:
    """Lists the images of a folder without split folders: flat, or, if `held_out` is set, its class folders.

    If one folder further down holds split folders, that folder is read instead.
    """
    files = _image_files(root, left_out)
    if not files:
        raise _no_images(root)
    holders = _split_holders(files)
    if len(holders) == 1:
        place = root / holders[0]
        others = sum(Path(holders[0]) not in Path(file).parents for file in files)
        logger.info("reading %s, because the training and test folders are there; not read: %d images", place, others)
        left_out.clear()  # they are listed again
        return list_folder(place, held_out)
    if holders:
        raise DatasetError(
            f"{root} holds several folders with training and test images ({few(holders)}): set data.root to one of them"
        )
    classes = list(_class_folders(root, left_out))
    if held_out:
        if not classes:
            raise _no_labels(root)
        listing = _list_classes(root, "classes", left_out)
        return _check_classes(listing, "remove data.holdout, to train without labels"), None
    within = sorted({compose(Path(file).parts[0]) for file in files if len(Path(file).parts) > 1})
    if len(within) > 1:
        logger.info(
            "%s has no train/ folder: all %d images below it are training images. The folders in it (%s) are not "
            "read as classes, because there is no test split. If they are classes, %s",
            root,
            len(files),
            few(within),
            NEEDS_TEST,
        )
    return Listing(root, files, None, [], "flat"), None


def _split_holders(files: list[str]) -> list[str]:
    """Returns the outermost folders that hold both a training folder and a test folder with some of `files`."""
    found: dict[str, set[str]] = {}
    for folder in {Path(file).parent for file in files}:
        for depth, part in enumerate(folder.parts):
            if word := _split_word(part):
                found.setdefault(str(Path(*folder.parts[:depth])), set()).add(word[0])
    both = {holder for holder, splits in found.items() if len(splits) == 2}
    return sorted(holder for holder in both if not both.intersection(map(str, Path(holder).parents)))


def list_labelled(root: Path, labels: Path, held_out: bool = False) -> Listings:
    """Lists the files below `root` that the file `labels` names, with their labels or attributes.

    Files in a test folder (a name of SPLIT_WORDS) are the test split. If there are files in a training folder, they are
    the training split, otherwise all files outside of test folders are.

    Raises DatasetError if `labels` cannot be used, or if there is no test split although there are labels.

    Args:
        labels: path of the file; it may be relative to `root`. `read_label_list` describes its contents.
        held_out: True if the caller holds out a test split of files that have none.
    """
    if not root.is_dir():
        raise DatasetError(f"no folder {root}: set data.root to the folder of the images that {labels} names")
    left_out: list[Path] = []
    files = _image_files(root, left_out)
    if not files:
        raise _no_images(root)
    _log_left_out(left_out)
    place = labels if labels.is_file() else root / labels
    found = read_label_list(place, files, root)
    kind = "labels" if found.labels else f"{len(found.names)} attributes"
    logger.info("%d images in %s have %s in %s", len(found.files), root, kind, place)
    train_files, test_files = _divide_by_folder(found.files, place)
    if not found.labels:
        train, test = (
            Listing(root, inside, None, [], kind, {file: found.attributes[file] for file in inside}, found.names)
            for inside, kind in ((train_files, "train-list"), (test_files, "test-list"))
        )
        return train, test if test.files else None
    known = {found.labels[file] for file in train_files}
    if len(known) == 1:
        raise DatasetError(f"{place} has only one class: add another class, or remove data.labels")
    unknown = {file: found.labels[file] for file in test_files if found.labels[file] not in known}
    if unknown:
        names = few(sorted(set(unknown.values())))
        logger.info("left out the %d test images of classes without training images: %s", len(unknown), names)
    classes = sorted(known, key=(lambda name: (int(name), name)) if all(map(_is_number, known)) else None)
    index = {name: label for label, name in enumerate(classes)}
    train, test = (
        Listing(root, inside, [index[found.labels[file]] for file in inside], classes, kind)
        for inside, kind in (
            (train_files, "train-list"),
            ([file for file in test_files if file not in unknown], "test-list"),
        )
    )
    if test.files:
        _log_unjudged(train, test)
        return train, test
    if not held_out:
        raise DatasetError(f"{place} names no images in a folder test/ or val/: add some, or {NEEDS_TEST}")
    return train, None


def _divide_by_folder(files: list[str], source: Path) -> tuple[list[str], list[str]]:
    """Returns (training files, test files), divided by the first folder of each path that has the name of a split."""
    folders = {file: next(filter(_split_word, Path(file).parts[:-1]), "") for file in files}
    trains, tests = _split_folders(set(folders.values()), "train"), _split_folders(set(folders.values()), "test")[:1]
    train = [file for file in files if folders[file] in (trains or [""])]
    test = [file for file in files if folders[file] in tests]
    if not train:
        raise DatasetError(f"{source} names only images in {tests[0]}/: add the training images to it")
    if trains or tests:
        logger.info(
            "of these images, %d are training images (in %s), %d are test images (in %s), and %d are left out",
            len(train),
            ", ".join(trains) or "other folders",
            len(test),
            ", ".join(tests) or "no folder",
            len(files) - len(train) - len(test),
        )
    return train, test


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def list_images(folder: Path) -> Listing:
    """Lists all images below `folder`. The sub-folders are the classes if most images are in them.

    A few images directly in `folder`, such as a cover picture, are then left out. The other images have no labels if
    most images are directly in `folder`, or if there is only one sub-folder beside them.

    Raises DatasetError if there are no images.
    """
    if not folder.is_dir():
        raise DatasetError(f"no folder {folder}: name a folder with images")
    left_out: list[Path] = []
    files = _image_files(folder, left_out)
    _log_left_out(left_out)
    if not files:
        raise _no_images(folder)
    inside = [file for file in files if len(Path(file).parts) > 1]
    names = [compose(Path(file).parts[0]) for file in inside]
    classes, beside = sorted(set(names)), len(files) - len(inside)
    if beside and (len(classes) < 2 or beside >= len(inside)):
        if inside:
            logger.info(
                "the images have no labels: %d are directly in %s, and %d in its sub-folders",
                beside,
                folder,
                len(inside),
            )
        return Listing(folder, files, None, [])
    if beside:
        logger.info("%d images in %s are left out because they are not in a class folder", beside, folder)
    return Listing(folder, inside, [classes.index(name) for name in names], classes)


def holds_splits(classes: Iterable[str]) -> bool:
    """Returns True if the folders of this name are splits, not classes: there is a training and a test folder."""
    return {word[0] for word in map(_split_word, classes) if word} == {"train", "test"}


def list_tiny_imagenet(root: Path) -> tuple[Listing, Listing]:
    """Lists the training and test files of Tiny-ImageNet in its official layout.

    The official validation split, with the labels in val_annotations.txt, is the test split. Raises DatasetError if the
    layout is not complete.
    """
    base = next((f for f in (root, root / "tiny-imagenet-200") if (f / "wnids.txt").is_file()), None)
    if base is None:
        raise DatasetError(
            f"no Tiny-ImageNet in {root}: unpack tiny-imagenet-200.zip there (it contains wnids.txt, train/ and val/)"
        )
    try:
        classes = sorted((base / "wnids.txt").read_text().split())
        rows = [line.split("\t") for line in (base / "val" / "val_annotations.txt").read_text().splitlines()]
        labels = [classes.index(row[1]) for row in rows]
        train = _list_classes(base / "train", "tiny", [], classes)
    except (OSError, ValueError, IndexError) as error:
        raise DatasetError(f"{base} is not a complete Tiny-ImageNet ({error}): unpack the archive again") from None
    if not rows:
        raise DatasetError(f"{base / 'val' / 'val_annotations.txt'} is empty: unpack tiny-imagenet-200.zip again")
    missing = sorted(set(range(len(classes))).difference(train.labels or []))
    if missing:
        raise _no_images(base / "train" / classes[missing[0]])
    test = Listing(base / "val" / "images", [row[0] for row in rows], labels, classes, "tiny")
    return train, test
