"""Lists of the image files of a data set: Tiny-ImageNet in its official layout, and any folder."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from datasets.images import DatasetError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """Image files of one split in a fixed order, with their labels if there are any. Paths are relative to `root`.

    Attributes:
        kind: word for the way in which the files were found. Listings of one root with different kinds have separate
            caches.
    """

    root: Path
    files: list[str]
    labels: list[int] | None
    classes: list[str]
    kind: str = "files"


def _image_files(folder: Path) -> list[str]:
    """Returns the sorted paths of all images below `folder`, relative to it. Hidden files and folders are skipped.

    Links are followed, but each real folder is read only once. Raises DatasetError if a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise DatasetError(
            f"cannot read the folder {error.filename} ({error.strerror}): restore it, or make it readable"
        ) from None

    found, seen = [], set()
    for base, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(base)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in seen)
        if real not in seen:
            relative = Path(base).relative_to(folder)
            found += [str(relative / name) for name in names if _is_image(name)]
        seen.add(real)
    return sorted(found)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _class_folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _list_classes(folder: Path, classes: list[str], kind: str) -> Listing:
    """Lists `folder`/<class>/**/<image> for each of `classes`. Raises DatasetError if a class has no images."""
    files, labels = [], []
    for label, name in enumerate(classes):
        inside = _image_files(folder / name)
        if not inside:
            raise DatasetError(f"no images in {folder / name}: add files that end in {' '.join(IMG_EXTENSIONS)}")
        files += [f"{name}/{file}" for file in inside]
        labels += [label] * len(inside)
    return Listing(folder, files, labels, classes, kind)


def list_folder(root: Path) -> tuple[Listing, Listing | None]:
    """Lists the training and test files of a folder.

    A folder with classes has its files in `root`/train/<class>/ and `root`/test/<class>/, at any depth. The folder
    `test` may also be called `val`. A flat folder has its files directly in `root`/train, or, if there
    is no `train`, anywhere below `root`. It has no labels and no test split.

    Raises DatasetError if there are no images, or if the classes or the test split are unusable.
    """
    if not root.is_dir():
        raise DatasetError(f"no folder {root}: set data.root to a folder with train/<class>/* and test/<class>/*")
    train = root / "train" if (root / "train").is_dir() else root
    classes = _class_folders(train)
    if train == root or not classes:
        files = _image_files(train)
        if not files:
            raise DatasetError(f"no images in {train}: add files that end in {' '.join(IMG_EXTENSIONS)}")
        return Listing(train, files, None, [], "flat"), None
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test is None:
        raise DatasetError(f"{root} has train/ but neither test/ nor val/: add test/, which the evaluation needs")
    if _class_folders(test) != classes:
        odd = sorted(set(classes) ^ set(_class_folders(test)))
        raise DatasetError(f"{train} and {test} have different classes: add or remove the folders {', '.join(odd[:5])}")
    if len(classes) == 1:
        raise DatasetError(
            f"{train} has only one class: add another class, or move the images of this class into {train} and remove "
            "its folder"
        )
    for split in (train, test):
        beside = sum(_is_image(path.name) for path in split.iterdir())
        if beside:
            logger.info("%d images in %s are left out because they are not in a class folder", beside, split)
    return _list_classes(train, classes, "classes"), _list_classes(test, classes, "classes")


def list_images(folder: Path) -> Listing:
    """Lists all images below `folder`. If none is directly in `folder`, the sub-folders are the classes.

    Raises DatasetError if there are no images.
    """
    if not folder.is_dir():
        raise DatasetError(f"no folder {folder}: name a folder with images")
    files = _image_files(folder)
    if not files:
        raise DatasetError(f"no images in {folder}: add files that end in {' '.join(IMG_EXTENSIONS)}")
    inside = [Path(file).parts[0] for file in files if len(Path(file).parts) > 1]
    if len(inside) < len(files):
        return Listing(folder, files, None, [])
    classes = sorted(set(inside))
    return Listing(folder, files, [classes.index(name) for name in inside], classes)


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
    except (OSError, ValueError, IndexError) as error:
        raise DatasetError(f"{base} is not a complete Tiny-ImageNet ({error}): unpack the archive again") from None
    if not rows:
        raise DatasetError(f"{base / 'val' / 'val_annotations.txt'} is empty: unpack tiny-imagenet-200.zip again")
    test = Listing(base / "val" / "images", [row[0] for row in rows], labels, classes, "tiny")
    return _list_classes(base / "train", classes, "tiny"), test
