"""Features of images, with what is needed to know which is whose, in a file."""

import json
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from analysis.encoder import ImageEncoder
from datasets import DatasetError, Images
from datasets.decoding import decode_batches, num_cores
from datasets.listing import Listing, list_images
from evaluation.features import extract_features
from training.experiment import Experiment
from utils.config import Config
from utils.device import autocast, memory_for
from utils.distributed import all_reduce, local_world_size, same_everywhere, share, world_size
from utils.files import replacing
from utils.logging import progress


@dataclass(frozen=True)
class Source:
    """Images to encode, in order: what to call each, and their labels if there are any.

    Attributes:
        images: of known length, with `batches` as in `evaluation.features`.
    """

    images: Any
    names: list[str]
    labels: np.ndarray | None
    classes: list[str]


def of_split(experiment: Experiment, split: str) -> Source:
    """The images of `train` or `test`; raises DatasetError."""
    images: Images | None = getattr(experiment, split)
    if images is None:
        raise DatasetError(f"{experiment.config.data.root} has no {split} split: take --split train")
    names = images.names or [f"{split}:{index}" for index in range(len(images))]
    return Source(images, names, None if images.labels is None else images.labels.numpy(), images.classes)


def of_folder(folder: Path, config: Config) -> Source:
    """All images below a folder; where each lies in a sub-folder of it, these are the classes. Raises DatasetError."""
    listing = list_images(folder)
    if {"train"} < set(listing.classes) <= {"train", "test", "val"}:
        raise DatasetError(f"{folder} holds splits, not classes: give one of them, as in --folder {folder / 'train'}")
    return _of_listing(listing, config)


def of_files(files: list[str], config: Config) -> Source:
    """Image files in the order given; raises DatasetError."""
    files = [file for file in files if file]  # a list may end in an empty line
    missing = next((file for file in files if not Path(file).is_file()), None)
    if missing is not None:
        raise DatasetError(f"no image {missing}: name files that exist")
    return _of_listing(Listing(Path(), files, None, []), config)


class _Decoded:
    def __init__(self, listing: Listing, config: Config) -> None:
        self._listing, self._image_size = listing, config.data.image_size
        self._num_workers = config.data.num_workers or max(1, num_cores() // local_world_size())

    def __len__(self) -> int:
        return len(self._listing.files)

    def batches(self, wanted: Iterable[range], pin_memory: bool = False) -> Generator[Tensor, None, None]:
        try:
            yield from decode_batches(self._listing, self._image_size, wanted, self._num_workers, pin_memory)
        except DatasetError as error:
            raise DatasetError(f"{error}: mend or leave it out") from None


def _of_listing(listing: Listing, config: Config) -> Source:
    if not same_everywhere((listing.files, listing.labels, listing.classes)):
        raise DatasetError("the processes see different images: give them all the same")
    labels = None if listing.labels is None else np.array(listing.labels)
    return Source(_Decoded(listing, config), listing.files, labels, listing.classes)


def encode(encoder: ImageEncoder, source: Source, config: Config, amp_dtype: Any) -> dict[Any, Tensor]:
    """z (N, latent_dim) and pooled (N, pooled_dim), float32; processes share the work. Raises DatasetError."""
    device = encoder.mean.device

    def run(pixels: Tensor, indices: range) -> dict[Any, Tensor]:
        bar.update(len(indices))
        with autocast(device, amp_dtype):
            return dict(encoder(pixels.to(device, non_blocking=True)))

    batch_size = config.evaluation.batch_size
    smaller, mine = f"set evaluation.batch_size={max(1, batch_size // 2)}", len(source.images) // world_size()
    with memory_for(lambda: smaller), progress(mine, "encoding", "img") as bar:
        return extract_features(run, source.images, batch_size, device, share, all_reduce)


def save_features(path: Path, features: dict[Any, Tensor], source: Source, checkpoint: str) -> None:
    """As .npz: arrays z, pooled, names, checkpoint and, if there are any, labels, classes. As .safetensors: tensors z,
    pooled and labels; names and classes as JSON, and checkpoint, in the metadata."""
    arrays = {str(name): values.cpu().numpy() for name, values in features.items()}
    arrays |= {} if source.labels is None else {"labels": source.labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        if path.suffix == ".npz":
            words: dict[str, Any] = {"names": source.names, "checkpoint": checkpoint}
            words |= {} if source.labels is None else {"classes": source.classes}
            contents: dict[str, Any] = {name: np.array(value) for name, value in (arrays | words).items()}
            np.savez(partial, **contents)
        else:
            from safetensors.numpy import save_file

            listed = {"names": json.dumps(source.names), "classes": json.dumps(source.classes)}
            save_file(arrays, partial, listed | {"checkpoint": checkpoint})
