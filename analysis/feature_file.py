"""Features of named images, and the file that stores names and features."""

import json
import logging
import math
import shlex
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.image_encoder import ImageEncoder
from config.schema import RunConfig
from datasets.decoding import decode_batches, num_cores, rules_of
from datasets.findings import GREY_BITS, Findings, log_findings, raise_if_unreadable
from datasets.folder_layouts import list_images
from datasets.images import DatasetError, Images
from datasets.listing import Listing
from datasets.split_names import holds_splits
from evaluation.features import Features, extract_features
from utils.device import autocast, memory_for
from utils.distributed.collectives import all_equal, all_gather_object
from utils.distributed.processes import local_world_size, my_range, world_size
from utils.files import replacing
from utils.logging import progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedImages:
    """Images to encode, in order, with their names, and with their labels if there are any.

    Attributes:
        images: an object with a length, and with `batches(ranges, pin_memory)`, which yields the pixels of each range.
        names: a name for each image.
        labels: (N,) int64, or None if the images have no labels.
        classes: names of the classes, by label.
        attributes: (N, A) uint8, 0/1 values in the order of `attribute_names`, or None if the images have none.
    """

    images: Any
    names: list[str]
    labels: np.ndarray | None
    classes: list[str]
    attributes: np.ndarray | None = None
    attribute_names: list[str] = field(default_factory=list)


def images_of_split(images: Images, split: str) -> NamedImages:
    """Returns the images of a split. Images without file names are named `split`:0, `split`:1, and so on."""
    names = images.names or [f"{split}:{index}" for index in range(len(images))]
    labels, attributes = (None if each is None else each.numpy() for each in (images.labels, images.attributes))
    return NamedImages(images, names, labels, images.classes, attributes, images.attribute_names)


def images_of_folder(folder: Path, config: RunConfig, grey_bits: int | None) -> NamedImages:
    """Collective. Returns the images below a folder, with the sub-folders as classes if almost all images are in them.

    Raises DatasetError if there are no images, if the sub-folders are splits, or if the ranks find different images.

    Args:
        grey_bits: range of the training images' greys (see `Rules.grey_bits`).
    """
    listing = list_images(folder)
    if holds_splits(listing.classes):
        train = folder / next(name for name in listing.classes if holds_splits([name, "test"]))
        choice = shlex.quote(str(train))
        raise DatasetError(f"{folder} holds splits, not classes: choose one split, e.g. --folder {choice}")
    return images_of_listing(listing, config, grey_bits)


def images_of_files(files: list[str], config: RunConfig, grey_bits: int | None) -> NamedImages:
    """Collective. Returns image files in the given order. Raises DatasetError if a file does not exist.

    Args:
        grey_bits: range of the training images' greys (see `Rules.grey_bits`).
    """
    missing = next((file for file in files if not Path(file).is_file()), None)
    if missing is not None:
        hint = "; put key=value before --files" if "=" in missing else ""
        raise DatasetError(f"the image {missing} does not exist: give paths of existing files{hint}")
    return images_of_listing(Listing(Path(), files, None, []), config, grey_bits)


class _DecodedImages:
    """Images of a listing, decoded while they are read, at the size of the data set's images.

    Attributes:
        rules: rules by which the files are decoded.
        findings: facts about the files that were read. A file that could not be read is a black image.
    """

    def __init__(self, listing: Listing, config: RunConfig, grey_bits: int | None) -> None:
        self.listing, self.skip = listing, config.data.unreadable == "skip"
        self.rules, self.findings = rules_of(config.data, grey_bits), Findings()
        self._image_size = config.data.kept_size
        self._num_workers = config.data.num_workers or max(1, num_cores() // local_world_size())

    def __len__(self) -> int:
        return len(self.listing.files)

    def batches(self, wanted: Iterable[range], pin_memory: bool = False) -> Generator[Tensor, None, None]:
        yield from decode_batches(
            self.listing, self._image_size, wanted, self._num_workers, pin_memory, self.rules, self.findings
        )


def images_of_listing(listing: Listing, config: RunConfig, grey_bits: int | None) -> NamedImages:
    """Collective. Returns the images of a listing, named by its files.

    Raises DatasetError if the ranks have different listings.

    Args:
        grey_bits: range of the training images' greys (see `Rules.grey_bits`).
    """
    if not all_equal((listing.files, listing.labels, listing.classes)):
        raise DatasetError("the processes see different images: give all processes the same images")
    labels = None if listing.labels is None else np.array(listing.labels)
    return NamedImages(_DecodedImages(listing, config, grey_bits), listing.files, labels, listing.classes)


def encode_named(
    encoder: ImageEncoder, named: NamedImages, batch_size: int, amp_dtype: torch.dtype | None
) -> tuple[Features, NamedImages]:
    """Collective. Encodes images (see `encode_images`); returns the features and the images that could be read.

    If the files have greys of more than 8 bits, and the training images had none, the smallest range that holds these
    greys is used. Raises UnreadableError if files cannot be read, and the errors of `encode_images`.
    """
    features = encode_images(encoder, named.images, batch_size, amp_dtype)
    if not isinstance(named.images, _DecodedImages):
        return features, named
    images, found = named.images, Findings()
    has_batches = bool(my_range(math.ceil(len(images) / batch_size)))  # otherwise it has read only image 0, for names
    for findings in all_gather_object(images.findings if has_batches else Findings()):
        found.update(findings)
    raise_if_unreadable(images.listing, found, images.skip)
    if images.rules.grey_bits is None and found.grey_bits not in (None, GREY_BITS[-1]):
        images.rules, images.findings = replace(images.rules, grey_bits=found.grey_bits), Findings()
        return encode_named(encoder, named, batch_size, amp_dtype)
    log_findings("the given folder or list", len(images), found, images.rules.grey_bits)
    kept = [index for index, name in enumerate(named.names) if name not in found.unreadable]
    names, labels = [named.names[index] for index in kept], None if named.labels is None else named.labels[kept]
    return {name: values[kept] for name, values in features.items()}, replace(named, names=names, labels=labels)


def encode_images(encoder: ImageEncoder, images: Any, batch_size: int, amp_dtype: torch.dtype | None) -> Features:
    """Collective. Encodes `NamedImages.images`; returns z (N, latent_dim) and pooled (N, pooled_dim) on every rank.

    Features are float32. Raises DatasetError if a streamed image of a split cannot be read, and OutOfMemoryError if
    memory runs out.
    """
    device = encoder.mean.device

    def encode(pixels: Tensor, indices: range) -> Features:
        bar.update(len(indices))
        with torch.no_grad(), autocast(device, amp_dtype):
            return dict(encoder(pixels.to(device, non_blocking=True)))

    smaller = f"set evaluation.batch_size={max(1, batch_size // 2)}"
    with memory_for(lambda: smaller), progress(len(images) // world_size(), "encoding", "img") as bar:
        return extract_features(encode, images, batch_size, device)


def save_features(path: Path, features: Features, named: NamedImages, checkpoint: str) -> None:
    """Writes the features of `named` to a .npz or .safetensors file.

    .npz holds the features (z and pooled, or z@500 and pooled@500), names and checkpoint, labels and classes if there
    are labels, and attributes and attribute_names if there are attributes. In .safetensors, names, classes,
    attribute_names (as JSON) and checkpoint are metadata, and the others are tensors.

    Args:
        checkpoint: SHA-256 of the checkpoint.
    """
    arrays = {str(name): values.cpu().numpy() for name, values in features.items()}
    arrays |= {} if named.labels is None else {"labels": named.labels}
    arrays |= {} if named.attributes is None else {"attributes": named.attributes}
    lists = {"names": named.names}
    lists |= {} if named.labels is None else {"classes": named.classes}
    lists |= {} if named.attributes is None else {"attribute_names": named.attribute_names}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        if path.suffix == ".npz":
            words = {**lists, "checkpoint": checkpoint}
            contents: dict[str, Any] = {**arrays, **{name: np.array(value) for name, value in words.items()}}
            np.savez(partial, **contents)
        else:
            from safetensors.numpy import save_file

            texts = {name: json.dumps(words) for name, words in lists.items()}
            save_file(arrays, partial, texts | {"checkpoint": checkpoint})
