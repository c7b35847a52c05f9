"""What a user names on the command line: images, by place or by file, and classes."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datasets import DatasetError, Images
from datasets.decoding import decode
from training.experiment import Experiment
from utils.config import ConfigError
from utils.randomness import generator

SYNTAX = "12 (of the test images), train:12, or a file"


@dataclass(frozen=True)
class Chosen:
    """Images (N, 3, H, W) uint8 on the host, and what to call each."""

    pixels: Tensor
    names: list[str]
    train_indices: list[int | None]  # of those that are training images

    def __len__(self) -> int:
        return len(self.names)

    def pairs(self) -> tuple["Chosen", "Chosen"]:
        """The first of each pair, and the second."""
        assert len(self) % 2 == 0, "there are whole pairs"
        halves = (slice(None, None, 2), slice(1, None, 2))
        first, second = (Chosen(self.pixels[h], self.names[h], self.train_indices[h]) for h in halves)
        return first, second


def describe(images: Images, split: str, index: int) -> str:
    """An image's name for a reader: its class, if it has one, and its place."""
    if images.labels is None:
        return f"{split}:{index}"
    name = images.classes[int(images.labels[index])]
    return f"{name if len(name) <= 30 else name[:27] + '...'}\n{split}:{index}"


def choose_images(experiment: Experiment, references: Sequence[str] | None, count: int) -> Chosen:
    """The images named, else `count` of those of the training's grids; raises ConfigError and DatasetError."""
    splits = {"train": experiment.train} | ({} if experiment.test is None else {"test": experiment.test})
    default = "test" if "test" in splits else "train"
    if references is None:
        order = torch.randperm(len(splits[default]), generator=generator(experiment.config.seed, "grid images"))
        references = [str(index) for index in order[:count].tolist()]
    found = [_read(reference, splits, default, experiment.info.image_size) for reference in references]
    pixels, names, train_indices = zip(*found, strict=True)
    return Chosen(torch.stack(pixels), list(names), list(train_indices))


def _read(reference: str, splits: dict[str, Images], default: str, image_size: int) -> tuple[Tensor, str, int | None]:
    """Pixels, name, and place among the training images."""
    place = re.fullmatch(r"(?:(train|test):)?(\d+)", reference)
    if place is None:
        path = Path(reference)
        if not path.is_file():
            hint = "; key=value comes before it" if "=" in reference else ""
            raise ConfigError(f"no image {reference}: write {SYNTAX}{hint}")
        try:
            return torch.from_numpy(decode(path, image_size).copy()).permute(2, 0, 1), path.name, None
        except DatasetError as error:
            raise DatasetError(f"{error}: name another") from None
    split, index = place[1] or default, int(place[2])
    if split not in splits:
        raise ConfigError(f"no image {reference}: these images have no test split; write train:{index}")
    images = splits[split]
    if index >= len(images):
        raise ConfigError(f"no image {reference}: those of the {split} split go from 0 to {len(images) - 1}")
    (pixels,) = images.batches([range(index, index + 1)])
    return pixels[0].cpu(), describe(images, split, index), index if split == "train" else None


def find_class(experiment: Experiment, name: str) -> int:
    """A class's number by its name; raises ConfigError."""
    classes = experiment.info.classes
    if not classes:
        raise ConfigError(f"no class {name}: these images have no labels")
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
        known = ", ".join(classes) if len(classes) <= 20 else f"{', '.join(classes[:20])}, ..."
        raise ConfigError(f"no class {name}: " + (f"did you mean {near[0]}? " if near else "") + f"there are {known}")
    return classes.index(name)
