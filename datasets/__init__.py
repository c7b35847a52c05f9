"""Data sets by name, each as uint8 images, in memory or on disk, with a DatasetInfo."""

from dataclasses import dataclass
from pathlib import Path

from datasets.builtin import load_cifar, load_digits, load_fashion_mnist
from datasets.files import choose_stream, open_listing
from datasets.images import DatasetError, Images, Statistics, StoredImages
from datasets.listing import list_folder, list_tiny_imagenet
from datasets.loader import Loader
from datasets.views import Draw, Views

__all__ = ["DatasetError", "DatasetInfo", "Draw", "Images", "Loader", "StoredImages", "Views", "build_dataset"]

# Mean and deviation over all pixels of the training split. For CIFAR-10 the widely copied deviations
# (0.2023, 0.1994, 0.2010) are averages of per-image deviations and not these.
STATISTICS: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@dataclass(frozen=True)
class DatasetInfo:
    """What the views and the evaluation need to know of a data set; mean and std are on the scale of [0, 1]."""

    image_size: int
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def build_dataset(
    name: str,
    root: str,
    cache_dir: str,
    image_size: int,
    stream: bool | None = None,
    num_workers: int | None = None,
    processes: int = 1,
) -> tuple[Images, Images | None, DatasetInfo]:
    """(training split, test split or None, info); raises DatasetError when the images cannot be had.

    The arguments are the keys of the config's `data` section, and how many processes share this machine's cores.
    """
    folder = Path(root)
    train: Images
    test: Images | None
    if name == "digits":
        train, test = load_digits(image_size)
    elif name in ("cifar10", "cifar100"):
        train, test = load_cifar(folder, image_size, int(name.removeprefix("cifar")))
    elif name == "fashion_mnist":
        train, test = load_fashion_mnist(folder, image_size)
    else:
        list_files = list_tiny_imagenet if name == "tiny" else list_folder
        train_files, test_files = list_files(folder)
        count = len(train_files.files) + len(test_files.files if test_files else [])
        how = (image_size, Path(cache_dir), choose_stream(stream, folder, count, image_size), num_workers, processes)
        train = open_listing(train_files, *how)
        test = open_listing(test_files, *how) if test_files else None
    mean, std = STATISTICS.get(name) or train.summary.statistics
    return train, test, DatasetInfo(image_size, train.classes, mean, tuple(max(s, 1e-3) for s in std))
