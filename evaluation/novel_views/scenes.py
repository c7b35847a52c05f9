"""Objects with the angles from which they are seen, and the target views that a model is judged on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from datasets.cameras import azimuth_of, polar_of
from datasets.images import group_by_object
from evaluation.features import random_subset
from experiment.opening import Experiment
from experiment.posed import PosedPixels, draw_sources, source_images

SAME = 0.5  # degrees; smaller differences are rounding
NEAR = 15.0  # degrees from the pose that was asked for
MAX_GAP = 90.0  # degrees between neighbouring views of an object, for the azimuth tests


class Scenes:
    """All images of an experiment, training images before test images, with their objects and angles.

    Attributes:
        objects: (N,) int64 number of the object of each image.
        polar, azimuth: (N,) angles of each camera in degrees.
    """

    def __init__(self, experiment: Experiment) -> None:
        assert experiment.test is not None, "novel views are judged on test images"
        self.experiment, self.train, self.test = experiment, experiment.train, experiment.test
        cameras = torch.cat([_needed(self.train.cameras), _needed(self.test.cameras)])
        self.objects = torch.cat([_needed(self.train.objects), _needed(self.test.objects)])
        self.polar, self.azimuth = polar_of(cameras.double()).rad2deg(), azimuth_of(cameras.double()).rad2deg()

    @cached_property
    def members(self) -> Tensor:
        """Indices (number of objects, largest number of views) of the images of each object, padded by -1."""
        return group_by_object(self.objects)

    @cached_property
    def poses(self) -> Tensor:
        """Number (N,) of the pose of each image. Images whose angles agree to a tenth of a degree share one."""
        tenths = torch.stack([self.polar * 10, self.azimuth * 10]).round()
        tenths[1] %= 3600
        return tenths.unique(dim=1, return_inverse=True)[1]

    @cached_property
    def known(self) -> dict[int, dict[int, int]]:
        """{pose: {object: index of the training image}}, for poses that training images have."""
        found: dict[int, dict[int, int]] = {}
        objects, poses = self.objects.tolist(), self.poses.tolist()
        for index in range(len(self.train)):
            found.setdefault(poses[index], {})[objects[index]] = index
        return found

    def name(self, index: int) -> str | None:
        """Returns the path of an image below the folder of all objects; None if the images are not files."""
        images, place = (self.train, index) if index < len(self.train) else (self.test, index - len(self.train))
        return images.names[place] if images.names else None

    def around(self, index: int) -> Tensor:
        """Returns the indices of all views of the same object at the same height, with the image itself."""
        members = self.members[self.objects[index]]
        members = members[members >= 0]
        return members[(self.polar[members] - self.polar[index]).abs() <= SAME]

    def is_ring(self, indices: Tensor) -> bool:
        """Returns True if views at one height go around their object, without a gap of more than MAX_GAP degrees."""
        if not len(indices) or not SAME < self.polar[indices[0]] < 180 - SAME:
            return False
        azimuth = self.azimuth[indices].sort().values
        gaps = (azimuth.roll(-1) - azimuth) % 360
        return len(indices) > 1 and bool(gaps.max() <= MAX_GAP + SAME)

    def turns(self, indices: Tensor, index: int) -> Tensor:
        """Returns the azimuths of images minus that of the image `index`, in degrees from -180 to 180."""
        return (self.azimuth[indices] - self.azimuth[index] + 180) % 360 - 180

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Returns pixels (n, 3, P, P) uint8 and cameras (n, 3, 4) of images, on the host."""
        size, count = self.experiment.config.data.kept_size, len(self.train)
        pixels, cameras = torch.zeros(len(indices), 3, size, size, dtype=torch.uint8), torch.zeros(len(indices), 3, 4)
        for images, chosen, first in ((self.train, indices < count, 0), (self.test, indices >= count, count)):
            if chosen.any():
                (found,) = images.batches([indices[chosen] - first])
                pixels[chosen], cameras[chosen] = found.cpu(), _needed(images.cameras)[indices[chosen] - first]
        return pixels, cameras

    def x_start(self, indices: Tensor) -> Tensor:
        """Returns images (n, 3, D, D) in [-1, 1], on the device."""
        return self.experiment.views.x_start(self.read(indices)[0].to(self.experiment.device))


@dataclass(frozen=True)
class Target:
    """A target view, its sources and what it is compared with. All images are indices into `Scenes`.

    Attributes:
        around: views all around the same object at the same height; empty: there are none.
        beside: another view of the object, 15 degrees off; None: there is none.
    """

    index: int
    sources: list[int]
    around: list[int]
    beside: int | None


class Targets:
    """Target views, in the form that `extract_features` takes."""

    def __init__(self, scenes: Scenes, targets: list[Target]) -> None:
        self.scenes, self._targets = scenes, targets

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, positions: range) -> list[Target]:
        return self._targets[positions.start : positions.stop]

    def __iter__(self) -> Iterator[Target]:
        return iter(self._targets)

    def batches(self, wanted: Iterable[range], pin_memory: bool = False) -> Iterator[PosedPixels]:
        """Yields the images of the targets at each range of positions, with their source images."""
        for positions in wanted:
            indices = torch.tensor([[each.index, *each.sources] for each in self[positions]])  # (n, 1 + K)
            pixels, cameras = self.scenes.read(indices.flatten())
            yield PosedPixels(pixels.unflatten(0, indices.shape), cameras.unflatten(0, indices.shape))


def choose_targets(scenes: Scenes, count: int, seed: int) -> Targets:
    """Returns `count` test images, drawn by the seed, or all if they are fewer, and what each is compared with."""
    config, test, first = scenes.experiment.config, scenes.test, len(scenes.train)
    chosen = random_subset(test, count, seed, "novel views").indices
    others = source_images(scenes.train, test, config)
    of_test = others is test
    objects, num_sources = _needed(test.objects)[chosen], config.views.num_sources
    positions = range(len(chosen))
    sources = draw_sources(others, objects, chosen if of_test else None, num_sources, positions, seed, "novel view ")
    targets = []
    for index, of_target in zip((chosen + first).tolist(), (sources + first * of_test).tolist(), strict=True):
        around = scenes.around(index)
        turns = scenes.turns(around, index)
        beside = around[(turns.abs() - NEAR).abs() <= SAME].tolist()
        ring = around.tolist() if scenes.is_ring(around) else []
        targets.append(Target(index, of_target, ring, next(iter(beside), None)))
    return Targets(scenes, targets)


def _needed(value: Any) -> Any:
    assert value is not None
    return value
