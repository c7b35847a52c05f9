"""Data sets by name. To add a data set, write a function that returns its splits and add it to SOURCES."""

import gzip
import logging
import pickle
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets as torchvision_datasets

from config.schema import Data
from datasets.folder_layouts import list_folder
from datasets.holdout import hold_out
from datasets.images import DatasetError, Images, StoredImages, from_arrays
from datasets.labelled_images import list_labelled
from datasets.listing import Listing
from datasets.posed import open_posed
from datasets.splits import open_splits
from datasets.tiny_imagenet import list_tiny_imagenet
from datasets.walking import all_images
from utils.files import replacing, waiting_lock

logger = logging.getLogger(__name__)

Splits = tuple[Images, Images | None]
"""Training split and test split. The test split is None if there is none, or if a folder's images have no labels."""

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
DOWNLOAD_TIMEOUT_S = 30


def load_digits(image_size: int) -> tuple[StoredImages, StoredImages]:
    """Loads the UCI handwritten digits that scikit-learn contains: 1,797 images of 8x8 with 17 grey levels.

    The test split is a fixed fifth of each class.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    digits = sklearn_digits()
    arrays = (digits.images * (255 / 16)).round().astype(np.uint8)
    classes = [str(name) for name in digits.target_names]
    splits = train_test_split(arrays, digits.target, test_size=360, random_state=0, stratify=digits.target)
    train_arrays, test_arrays, train_labels, test_labels = splits
    train = from_arrays(train_arrays, train_labels, classes, image_size)
    return train, from_arrays(test_arrays, test_labels, classes, image_size)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Sets the default time-out of sockets.

    torchvision's downloads have no time-out, so a server that does not answer would block the run forever.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _open(build: Callable[..., Any], root: Path, what: str, url: str, advice: str) -> tuple[Any, Any]:
    """Opens both splits from a copy on disk, or downloads them if there is no copy.

    Raises DatasetError with a message that ends with `advice`.
    """
    try:
        try:
            return build(root=root, train=True, download=False), build(root=root, train=False, download=False)
        except RuntimeError as error:
            if "not found" not in str(error):  # the files are there, but they do not have the size of their images
                raise ValueError(str(error)) from None
            logger.info("unpacking or downloading %s into %s from %s (if this is slow: %s)", what, root, url, advice)
        # torchvision writes directly to the final files, so only one process at a time may do so.
        with waiting_lock(root / ".lock", f"downloads {what} into {root}"), _socket_timeout(DOWNLOAD_TIMEOUT_S):
            return build(root=root, train=True, download=True), build(root=root, train=False, download=False)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{what} is not in {root} and could not be downloaded ({reason}): {advice}") from None
    except (ValueError, IndexError, KeyError, EOFError, AssertionError, pickle.UnpicklingError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise DatasetError(f"{what} in {root} is damaged ({reason}): remove it, then {advice}") from None


def load_cifar(root: Path, image_size: int, num_classes: int) -> tuple[StoredImages, StoredImages]:
    """Loads CIFAR-10 or CIFAR-100 (Krizhevsky 2009) through torchvision: 50,000 + 10,000 images of 32x32."""
    build = torchvision_datasets.CIFAR10 if num_classes == 10 else torchvision_datasets.CIFAR100
    advice = f"put {build.filename} (md5 {build.tgz_md5}) into {root}, or set data.root to the folder that contains it"
    splits = _open(build, root, f"CIFAR-{num_classes}", build.url, advice)
    train, test = (from_arrays(s.data, s.targets, list(s.classes), image_size) for s in splits)
    return train, test


def load_fashion_mnist(root: Path, image_size: int) -> tuple[StoredImages, StoredImages]:
    """Loads Fashion-MNIST (Xiao et al. 2017) through torchvision: 60,000 + 10,000 greyscale images of 28x28."""
    build = torchvision_datasets.FashionMNIST
    raw = root / "FashionMNIST" / "raw"
    names = [name for name, _ in build.resources]
    # Unpacked here, because torchvision rejects Debian's archives: they hold the same files, compressed differently.
    for folder in (raw, root, DEBIAN_FASHION_MNIST):
        for name in names:
            unpacked = raw / Path(name).stem
            if (folder / name).exists() and not unpacked.exists():
                try:
                    raw.mkdir(parents=True, exist_ok=True)
                    with gzip.open(folder / name) as source, replacing(unpacked) as partial, open(partial, "wb") as out:
                        shutil.copyfileobj(source, out)
                except (OSError, EOFError, zlib.error) as error:
                    raise DatasetError(
                        f"cannot unpack {folder / name} into {raw} ({error}): check this file and this folder"
                    ) from None
    advice = f"put {', '.join(names)} into {root}, or install Debian's package dataset-fashion-mnist"
    splits = _open(build, root, "Fashion-MNIST", build.mirrors[0], advice)
    train, test = (from_arrays(s.data.numpy(), s.targets.numpy(), list(s.classes), image_size) for s in splits)
    return train, test


def open_folder(data: Data, processes: int, grey_bits: int | None = None) -> Splits:
    """Opens a folder of image files, with a test split that is held out if `data.holdout` asks for it.

    Images without labels have no test split. Raises DatasetError.
    """
    root, held_out = Path(data.root), data.holdout > 0
    train, test = list_labelled(root, Path(data.labels), held_out) if data.labels else list_folder(root, held_out)
    if held_out and test is None:
        train, test = hold_out(train, data.holdout)
    elif held_out:
        logger.info("data.holdout=%g is ignored, because there is a test split", data.holdout)
    if train.labels is None:
        if test is not None:
            logger.info("the %d test images have attributes, but no labels: they are not used", len(test.files))
        test = None
    splits = open_splits(train, test, data, processes, grey_bits)
    if train.attributes:
        names = splits[0].names or []
        splits[0].attributes = torch.tensor([train.attributes[name] for name in names], dtype=torch.uint8)
        splits[0].attribute_names = train.attribute_names
    return splits


def open_unlabelled(root: Path, data: Data, processes: int, grey_bits: int | None) -> Images:
    """Opens all images below `root`, without labels, decoded as `data` says. Raises DatasetError.

    Args:
        grey_bits: range of the greys of the images that these are used with (see `Rules.grey_bits`).
    """
    if not root.is_dir():
        raise DatasetError(f"no folder {root}: set `unlabelled` to a folder with images")
    # "flat" shares its cache with a run of train.py on this folder
    return _open_unsplit(Listing(root, all_images(root), None, [], "flat"), data, processes, grey_bits)


def open_files(root: Path, files: list[str], data: Data, processes: int, grey_bits: int | None) -> Images:
    """Opens files below `root`, without labels, as `open_unlabelled` opens a folder. Raises DatasetError."""
    return _open_unsplit(Listing(root, files, None, [], "listed"), data, processes, grey_bits)


def _open_unsplit(listing: Listing, data: Data, processes: int, grey_bits: int | None) -> Images:
    images, _ = open_splits(listing, None, data.model_copy(update={"root": str(listing.root)}), processes, grey_bits)
    return images


SOURCES: dict[str, Callable[[Data, int, int | None], Splits]] = {
    "digits": lambda data, *_: load_digits(data.kept_size),
    "fashion_mnist": lambda data, *_: load_fashion_mnist(Path(data.root), data.kept_size),
    "cifar10": lambda data, *_: load_cifar(Path(data.root), data.kept_size, 10),
    "cifar100": lambda data, *_: load_cifar(Path(data.root), data.kept_size, 100),
    "tiny": lambda data, *more: open_splits(*list_tiny_imagenet(Path(data.root)), data, *more),
    "folder": open_folder,
    "posed": open_posed,
}
"""Function of each `data.name`: (`data` section, processes that share this machine's cores, grey_bits) -> splits.

`build_dataset` describes grey_bits.
"""


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a data set for the views and the evaluation. `mean` and `std` are on the scale of [0, 1].

    Attributes:
        grey_bits: range of greys by which image files are decoded (see `Rules.grey_bits`).
    """

    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    grey_bits: int | None = None


def build_dataset(
    data: Data, processes: int = 1, grey_bits: int | None = None
) -> tuple[Images, Images | None, DatasetInfo]:
    """Returns (training split, test split or None, info). Raises DatasetError if images are missing or unusable.

    Args:
        processes: number of processes that share this machine's cores.
        grey_bits: range by which greys are decoded (see `Rules.grey_bits`); None: that of these images.
    """
    train, test = SOURCES[data.name](data, processes, grey_bits)
    mean, std = train.summary.statistics
    grey_bits = grey_bits or train.grey_bits or (test.grey_bits if test else None)
    return train, test, DatasetInfo(train.classes, mean, tuple(max(s, 1e-3) for s in std), grey_bits)
