"""Data sets that a library reads: scikit-learn's digits, torchvision's CIFAR and Fashion-MNIST."""

import gzip
import logging
import pickle
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets as torchvision_datasets

from datasets.images import DatasetError, StoredImages, from_arrays

logger = logging.getLogger(__name__)

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
DOWNLOAD_TIMEOUT_S = 30


def load_digits(image_size: int) -> tuple[StoredImages, StoredImages]:
    """UCI handwritten digits as scikit-learn ships them: 1,797 of 8x8 in 17 grey levels.

    A fifth, drawn once and for all within each class, is the test split.
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
    """torchvision opens its downloads without a time-out: a silent server would hang the run for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _open(build: Callable[..., Any], root: Path, what: str, url: str, advice: str) -> tuple[Any, Any]:
    """Both splits from a copy on disk if there is one, else downloaded; `advice` says what a user can do."""
    try:
        try:
            return build(root=root, train=True, download=False), build(root=root, train=False, download=False)
        except RuntimeError:
            logger.info("unpacking or downloading %s into %s from %s (if that is slow: %s)", what, root, url, advice)
        with _socket_timeout(DOWNLOAD_TIMEOUT_S):
            return build(root=root, train=True, download=True), build(root=root, train=False, download=False)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"{what} is not in {root} and could not be downloaded ({reason}): {advice}") from None
    except (ValueError, IndexError, KeyError, EOFError, AssertionError, pickle.UnpicklingError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise DatasetError(f"{what} in {root} is damaged ({reason}): remove it, then {advice}") from None


def load_cifar(root: Path, image_size: int, num_classes: int) -> tuple[StoredImages, StoredImages]:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), 50,000 and 10,000 of 32x32, through torchvision."""
    build = torchvision_datasets.CIFAR10 if num_classes == 10 else torchvision_datasets.CIFAR100
    advice = f"put {build.filename} (md5 {build.tgz_md5}) into {root}, or give its folder as data.root"
    splits = _open(build, root, f"CIFAR-{num_classes}", build.url, advice)
    train, test = (from_arrays(s.data, s.targets, list(s.classes), image_size) for s in splits)
    return train, test


def load_fashion_mnist(root: Path, image_size: int) -> tuple[StoredImages, StoredImages]:
    """Fashion-MNIST (Xiao et al. 2017), 60,000 and 10,000 of 28x28 grey, through torchvision."""
    build = torchvision_datasets.FashionMNIST
    raw = root / "FashionMNIST" / "raw"
    names = [name for name, _ in build.resources]
    # Debian's archives hold the same files in another compression, so torchvision's digests do not know them.
    for folder in (raw, root, DEBIAN_FASHION_MNIST):
        for name in names:
            unpacked = raw / Path(name).stem
            if (folder / name).exists() and not unpacked.exists():
                partial = unpacked.with_suffix(".partial")
                try:
                    raw.mkdir(parents=True, exist_ok=True)
                    with gzip.open(folder / name) as source, open(partial, "wb") as target:
                        shutil.copyfileobj(source, target)
                    partial.replace(unpacked)
                except (OSError, EOFError, zlib.error) as error:
                    raise DatasetError(f"cannot unpack {folder / name} into {raw}: {error}") from None
    advice = f"put {', '.join(names)} into {root}, or install Debian's package dataset-fashion-mnist"
    splits = _open(build, root, "Fashion-MNIST", build.mirrors[0], advice)
    train, test = (from_arrays(s.data.numpy(), s.targets.numpy(), list(s.classes), image_size) for s in splits)
    return train, test
