"""Images and classes that a user names on the command line."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config.errors import ConfigError
from datasets.decoding import DEFAULT_RULES, Rules, decode
from datasets.images import DatasetError, Images
from utils.randomness import generator
from utils.text import compose

SYNTAX = "12 (a test image), train:12, or the path of an existing file"


@dataclass(frozen=True)
class Chosen:
    """Images with their names.

    Attributes:
        pixels: (N, 3, H, W) uint8 on the host.
        names: a caption for each image.
        train_indices: index of each image in the training split, or None for an image that is not from this split.
    """

    pixels: Tensor
    names: list[str]
    train_indices: list[int | None]

    def __len__(self) -> int:
        return len(self.names)

    def pairs(self) -> tuple["Chosen", "Chosen"]:
        """Returns the first images of all pairs, and the second images."""
        assert len(self) % 2 == 0, "the number of images must be even"
        halves = (slice(None, None, 2), slice(1, None, 2))
        first, second = (Chosen(self.pixels[h], self.names[h], self.train_indices[h]) for h in halves)
        return first, second


def image_name(images: Images, split: str, index: int) -> str:
    """Returns a caption for an image: its class, and its split and index, such as train:12.

    Without labels, the caption is the name of the file, if there is one, instead of the class.
    """
    if images.labels is not None:
        name = images.classes[int(images.labels[index])]
    elif images.names is not None:
        name = Path(images.names[index]).name
    else:
        return f"{split}:{index}"
    return f"{name if len(name) <= 30 else name[:27] + '...'}\n{split}:{index}"


def choose_images(
    splits: Mapping[str, Images],
    references: Sequence[str] | None,
    count: int,
    seed: int,
    rules: Rules = DEFAULT_RULES,
) -> Chosen:
    """Returns the images that `references` name.

    Args:
        splits: "train" and, if it exists, "test". An index without a split means "test" if it exists.
        references: texts such as 12, train:12 or a path. None: the first `count` images of the run's sample grids.
        seed: seed of the run.
        rules: rules by which files are decoded.

    Raises:
        ConfigError: a reference names no image.
        DatasetError: an image cannot be read.
    """
    default = "test" if "test" in splits else "train"
    if references is None:
        order = torch.randperm(len(splits[default]), generator=generator(seed, "grid images"))
        references = [str(index) for index in order[:count].tolist()]
    pixels, names, train_indices = zip(
        *(_read(reference, splits, default, rules) for reference in references), strict=True
    )
    return Chosen(torch.stack(pixels), list(names), list(train_indices))


def _read(reference: str, splits: Mapping[str, Images], default: str, rules: Rules) -> tuple[Tensor, str, int | None]:
    """Returns pixels, name, and index in the training split (None for other images)."""
    place = re.fullmatch(r"(?:(train|test):)?(\d+)", reference) or _find_file(reference, splits)
    if place is None:
        return _read_file(reference, splits[default].shape[-1], rules)
    split, index = place[1] or default, int(place[2])
    if split not in splits:
        raise ConfigError(f"no image {reference}: the data set has no test split, so write train:{index}")
    images = splits[split]
    if index >= len(images):
        raise ConfigError(f"no image {reference}: the {split} images are numbered from 0 to {len(images) - 1}")
    (pixels,) = images.batches([range(index, index + 1)])
    return pixels[0].cpu(), image_name(images, split, index), index if split == "train" else None


def _find_file(reference: str, splits: Mapping[str, Images]) -> tuple[str, str, str] | None:
    """Returns (reference, split, index) of a file that is an image of the data set; None for other files."""
    for split, images in splits.items():
        if images.folder is None or images.names is None:
            continue
        # The data set may have links to folders, and the reference may be a link into the data set.
        for path, folder in (
            (Path(reference).absolute(), images.folder.absolute()),
            (Path(reference).resolve(), images.folder.resolve()),
        ):
            name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else ""
            if name in images.names:
                return reference, split, str(images.names.index(name))
    return None


def _read_file(reference: str, image_size: int, rules: Rules) -> tuple[Tensor, str, None]:
    path = Path(reference)
    if not path.is_file():
        hint = "; put key=value before the images" if "=" in reference else ""
        raise ConfigError(f"no image {reference}: write {SYNTAX}{hint}")
    try:
        return torch.from_numpy(decode(path, image_size, rules).copy()).permute(2, 0, 1), path.name, None
    except DatasetError as error:
        raise DatasetError(f"{error}: choose another image") from None


def find_column(images: Images, name: str) -> int:
    """Returns the index of an attribute by its name.

    Raises ConfigError if there is no such attribute, or if all images have the same value of it.
    """
    if images.attributes is None:
        raise ConfigError(
            f"no column {name}: the images have no attributes: set data.labels to a list with 0/1 columns"
        )
    names = images.attribute_names
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        known = ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])}, ..."
        raise ConfigError(
            f"no column {name}: " + (f"did you mean {near[0]}? " if near else "") + f"the columns are {known}"
        )
    column = names.index(name)
    if len(images.attributes[:, column].unique()) < 2:
        raise ConfigError(f"column {name} has the same value for all training images: choose another column")
    return column


def find_class(classes: list[str], name: str) -> int:
    """Returns the index of a class by its name. Raises ConfigError if there is no such class."""
    if not classes:
        raise ConfigError(f"no class {name}: the images have no labels: leave --class out, or name images as terms")
    name = compose(name)
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
        known = ", ".join(classes) if len(classes) <= 20 else f"{', '.join(classes[:20])}, ..."
        raise ConfigError(
            f"no class {name}: " + (f"did you mean {near[0]}? " if near else "") + f"the classes are {known}"
        )
    return classes.index(name)
