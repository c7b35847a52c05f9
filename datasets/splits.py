"""Opening of the training and test files of a data set, as stored or as streamed images."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from config.schema import Data
from datasets.cache import cannot_cache, digest_of_folder, open_listing
from datasets.decoding import rules_of
from datasets.findings import UnreadableError
from datasets.images import DatasetError, Images
from datasets.listing import Listing
from utils.text import join_names

logger = logging.getLogger(__name__)


def memory_bytes() -> int:
    """Returns the bytes of memory that this process may use: the machine's, or the container's limit if it is lower.

    On Windows, which has no `sysconf`, the memory counts as unlimited.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or `max`, which means no limit
            limits.append(int(Path(file).read_text(encoding="utf-8")))
    return min(limits)


def choose_stream(setting: bool | None, root: Path, count: int, image_size: int) -> bool:
    """Returns True if `count` images must be streamed.

    A `setting` of True or False is returned unchanged. If `setting` is None, the images are streamed if they need more
    than half of the memory. Raises DatasetError if `setting` is False and the images are larger than the memory.
    """
    needed, there = count * 3 * image_size**2, memory_bytes()
    size = f"the {count:,} images in {root} take {needed / 1e9:.1f} GB at {image_size} px"
    if setting is None and needed > there / 2:
        logger.info("%s, which is more than half of the %.1f GB of memory: streaming them", size, there / 1e9)
        return True
    if setting is False and needed > there:
        raise DatasetError(f"{size}, but the memory is {there / 1e9:.1f} GB: remove data.stream=false")
    return bool(setting)


def open_splits(
    train: Listing, test: Listing | None, data: Data, processes: int, grey_bits: int | None = None
) -> tuple[Images, Images | None]:
    """Opens the images of the training and test files, stored or streamed, as the section `data` of the config says.

    Raises DatasetError. If images of both splits cannot be read, the error names the images of both.

    Args:
        grey_bits: range of the greys (see `Rules.grey_bits`); None: that of the training images, or of the test images
            if no training image has greys of more than 8 bits.
    """
    root, cache_dir = Path(data.root), Path(data.cache_dir)
    stream = choose_stream(data.stream, root, len(train.files) + len(test.files if test else []), data.kept_size)
    opened: list[Images | None] = []
    unreadable: list[UnreadableError] = []
    for listing in (train, test):
        images = None
        if listing is not None:
            try:
                images = open_listing(
                    listing,
                    data.kept_size,
                    cache_dir,
                    stream,
                    data.num_workers,
                    processes,
                    rules_of(data, grey_bits),
                    skip=data.unreadable == "skip",
                )
                grey_bits = grey_bits or images.grey_bits
            except UnreadableError as error:
                unreadable.append(error)
        opened.append(images)
    if unreadable:
        try:
            file = f"unreadable-{digest_of_folder(root)}.txt"
            reasons = {path: reason for error in unreadable for path, reason in error.reasons.items()}
            together = UnreadableError(reasons, all(error.can_skip for error in unreadable))
            raise together.with_advice(cache_dir, file) from None
        except OSError as error:
            raise cannot_cache(cache_dir, error, stream) from None
    assert opened[0] is not None
    if data.unreadable == "skip":
        _check_classes(opened[0], opened[1], root)
    return opened[0], opened[1]


def _check_classes(train: Images, test: Images | None, root: Path) -> None:
    """Logs the classes whose test images are all unreadable. Raises DatasetError if training images of a class are."""
    for split, images in (("training", train), ("test", test)):
        if images is None or images.labels is None:
            continue
        counts = images.labels.bincount(minlength=len(images.classes)).tolist()
        empty = join_names([name for name, count in zip(images.classes, counts, strict=True) if not count])
        if empty and split == "training":
            raise DatasetError(
                f"data.unreadable=skip leaves no training images in {root} of the classes {empty}: restore some of "
                "them, or remove these classes"
            )
        if empty:
            logger.info("classes without test images that can be read, which are not judged: %s", empty)
