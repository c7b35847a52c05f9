"""Images and classes that a user names on the command line."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config.errors import ConfigError
from datasets.decoding import decode
from datasets.images import DatasetError, Images
from utils.randomness import generator

SYNTAX = "12 (of the test images), train:12, or a file"


@dataclass(frozen=True)
class Chosen:
    """Images with a name for each.

    Attributes:
        pixels: (N, 3, H, W) uint8 on the host.
        names: captions.
        train_indices: index of each in the training split, or None if it is not from there.
    """

    pixels: Tensor
    names: list[str]
    train_indices: list[int | None]

    def __len__(self) -> int:
        return len(self.names)

    def pairs(self) -> tuple["Chosen", "Chosen"]:
        """The first image of each pair, and the second."""
        assert len(self) % 2 == 0, "there are whole pairs"
        halves = (slice(None, None, 2), slice(1, None, 2))
        first, second = (Chosen(self.pixels[h], self.names[h], self.train_indices[h]) for h in halves)
        return first, second


def image_name(images: Images, split: str, index: int) -> str:
    """A caption for an image: its class, if it has one, and its place, such as train:12."""
    if images.labels is None:
        return f"{split}:{index}"
    name = images.classes[int(images.labels[index])]
    return f"{name if len(name) <= 30 else name[:27] + '...'}\n{split}:{index}"


def choose_images(splits: Mapping[str, Images], references: Sequence[str] | None, count: int, seed: int) -> Chosen:
    """The images that `references` name; without references the first `count` of those in the training's sample grids.

    Args:
        splits: "train" and, if there is one, "test", which is the default.
        seed: the run's.

    Raises:
        ConfigError, DatasetError: a reference names no image.
    """
    default = "test" if "test" in splits else "train"
    if references is None:
        order = torch.randperm(len(splits[default]), generator=generator(seed, "grid images"))
        references = [str(index) for index in order[:count].tolist()]
    pixels, names, train_indices = zip(*(_read(reference, splits, default) for reference in references), strict=True)
    return Chosen(torch.stack(pixels), list(names), list(train_indices))


def _read(reference: str, splits: Mapping[str, Images], default: str) -> tuple[Tensor, str, int | None]:
    """Pixels, name, and index in the training split."""
    place = re.fullmatch(r"(?:(train|test):)?(\d+)", reference)
    if place is None:
        return _read_file(reference, image_size=splits[default].shape[-1])
    split, index = place[1] or default, int(place[2])
    if split not in splits:
        raise ConfigError(f"no image {reference}: these images have no test split; write train:{index}")
    images = splits[split]
    if index >= len(images):
        raise ConfigError(f"no image {reference}: those of the {split} split go from 0 to {len(images) - 1}")
    (pixels,) = images.batches([range(index, index + 1)])
    return pixels[0].cpu(), image_name(images, split, index), index if split == "train" else None


def _read_file(reference: str, image_size: int) -> tuple[Tensor, str, None]:
    path = Path(reference)
    if not path.is_file():
        hint = "; key=value comes before it" if "=" in reference else ""
        raise ConfigError(f"no image {reference}: write {SYNTAX}{hint}")
    try:
        return torch.from_numpy(decode(path, image_size).copy()).permute(2, 0, 1), path.name, None
    except DatasetError as error:
        raise DatasetError(f"{error}: name another") from None


def find_class(classes: list[str], name: str) -> int:
    """The number of a class by its name; raises ConfigError."""
    if not classes:
        raise ConfigError(f"no class {name}: these images have no labels")
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
        known = ", ".join(classes) if len(classes) <= 20 else f"{', '.join(classes[:20])}, ..."
        raise ConfigError(f"no class {name}: " + (f"did you mean {near[0]}? " if near else "") + f"there are {known}")
    return classes.index(name)
