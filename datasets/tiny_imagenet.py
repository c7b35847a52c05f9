"""Listing of Tiny-ImageNet in its official layout."""

from pathlib import Path

from datasets.images import DatasetError
from datasets.listing import Listing, list_classes
from datasets.walking import Walker


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
    walker = Walker()
    try:
        classes = sorted((base / "wnids.txt").read_text(encoding="utf-8").split())
        label_of = {name: label for label, name in enumerate(classes)}
        annotations = (base / "val" / "val_annotations.txt").read_text(encoding="utf-8")
        rows = [line.split("\t") for line in annotations.splitlines()]
        labels = [label_of[row[1]] for row in rows]
        train = list_classes(base / "train", "tiny", walker, classes)
    except (OSError, ValueError, LookupError) as error:
        raise DatasetError(f"{base} is not a complete Tiny-ImageNet ({error}): unpack the archive again") from None
    walker.log_left_out(base)
    if not rows:
        raise DatasetError(f"{base / 'val' / 'val_annotations.txt'} is empty: unpack tiny-imagenet-200.zip again")
    missing = sorted(set(range(len(classes))).difference(train.labels or []))
    if missing:
        raise walker.no_images(base / "train" / classes[missing[0]])
    test = Listing(base / "val" / "images", [row[0] for row in rows], labels, classes, "tiny")
    return train, test
