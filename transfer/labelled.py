"""Choice of the training images whose labels are used: drawn evenly from all classes, or named in a file."""

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from config.errors import ConfigError
from config.finetune_schema import FinetuneConfig
from datasets.images import Images
from datasets.split_names import split_of
from utils.files import read_names
from utils.randomness import generator
from utils.text import compose, join_names


def choose_labelled(config: FinetuneConfig, images: Images) -> Tensor:
    """Returns the indices (n,) int64 of the labelled training images, in rising order.

    Raises ConfigError if labels are asked for that do not exist, or if a class has no labelled image.
    """
    assert images.labels is not None
    if config.labelled:
        chosen = _read_indices(Path(config.labelled), images, config.data.root)
    elif config.num_labels is None:
        chosen = torch.arange(len(images))
    else:
        chosen = draw_evenly(images.labels, images.classes, config.num_labels, config.label_split)
    found = set(images.labels[chosen].tolist())
    without = [name for label, name in enumerate(images.classes) if label not in found]
    if without:
        origin = f"{config.labelled} names" if config.labelled else f"{config.data.root} has"
        raise ConfigError(f"{origin} no labelled images of the classes {join_names(without)}: add some of each class")
    return chosen


def draw_evenly(labels: Tensor, classes: list[str], num_labels: int, split: int) -> Tensor:
    """Draws the same number of images of each class, or one more of some classes. Returns their indices, rising.

    Each class has a random order that depends only on `split`, and its first images are taken. So the images of a
    smaller `num_labels` are among those of a larger one. Raises ConfigError if the images are too few.

    Args:
        labels: (N,) int64.
    """
    members = [labels.eq(label).nonzero()[:, 0] for label in range(len(classes))]
    if num_labels < len(classes):
        raise ConfigError(
            f"num_labels={num_labels} is less than the {len(classes)} classes: each class needs a labelled image"
        )
    if num_labels > len(labels):
        raise ConfigError(f"num_labels={num_labels} is more than the {len(labels)} training images: lower it")
    share, rest = divmod(num_labels, len(classes))
    gets_one_more = torch.randperm(len(classes), generator=generator(split, "classes with one more label"))[:rest]
    chosen = []
    for label, inside in enumerate(members):
        count = share + int(label in gets_one_more)
        if count > len(inside):
            raise ConfigError(
                f"num_labels={num_labels} needs {count} images of each class, but {classes[label]} has only "
                f"{len(inside)}: lower num_labels, or name the labelled images in a file (labelled=PATH)"
            )
        order = torch.randperm(len(inside), generator=generator(split, "labelled images", label))
        chosen.append(inside[order[:count]])
    return torch.cat(chosen).sort().values


def _read_indices(path: Path, images: Images, root: str) -> Tensor:
    """Returns the indices of the images that a file names, in ascending order. Paths may begin with that of `root`.

    Raises ConfigError if a line names no training image, or a class that is not the image's own.
    """
    assert images.labels is not None
    names = images.names or [str(index) for index in range(len(images))]
    index_of = {compose(name): index for index, name in enumerate(names)}
    class_of = {compose(name): name for name in images.classes}

    def find(name: str) -> int | None:
        name = os.path.normpath(name)
        name = os.path.relpath(name, compose(str(Path(root).absolute()))) if Path(name).is_absolute() else name
        split, _, inside = name.partition("/")
        return index_of.get(name, index_of.get(inside) if split_of(split) == "train" else None)

    chosen = set()
    for line in map(compose, read_names(path)):
        name, label = line, None
        if find(line) is None:
            # The class follows the name, after a separator. After a tab, `;` or `,`, both may contain blanks.
            parts = re.split(r"[\t;,]", line) if re.search(r"[\t;,]", line) else line.rsplit(maxsplit=1)
            name, label = parts[0].strip(), parts[-1].strip() if len(parts) > 1 else None
        index = find(name)
        if index is None:
            kind = f"path of one relative to {root}" if images.names else "index of one"
            raise ConfigError(f"{path}: there is no training image {name}: write the {kind}, such as {names[0]}")
        own = images.classes[int(images.labels[index])]
        if label is not None and label not in class_of:
            raise ConfigError(f"{path}: {label} of {name} is no class: choose from {join_names(images.classes, 20)}")
        if label is not None and class_of[label] != own:
            raise ConfigError(f"{path}: {name} is of class {own} in the data set, not {label}: correct one of the two")
        chosen.add(index)
    return torch.tensor(sorted(chosen))
