"""Objects with the angles from which they are seen, and the target views that a model is judged on."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from datasets.cameras import azimuth_of, polar_of
from datasets.images import group_by_object
from evaluation.features import Subset, random_subset
from experiment.opening import Experiment
from experiment.posed import draw_sources, source_images

SAME = 0.5  # degrees; smaller differences are rounding
NEAR = 15.0  # degrees from the pose that was asked for
FEWEST_AROUND = 4  # views of an object at one height, for the azimuth tests


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
        """Number (N,) of the pose of each image. Images with the same angles have the same number."""
        azimuth = self.azimuth % 360
        azimuth = torch.where((azimuth > 360 - SAME) | (self.polar < SAME) | (self.polar > 180 - SAME), 0, azimuth)
        # Rounded to tenths, because the last bits of angles differ.
        return torch.stack([self.polar, azimuth]).mul(10).round().unique(dim=1, return_inverse=True)[1]

    @cached_property
    def known(self) -> dict[int, dict[int, int]]:
        """{pose: {object: index of the training image}}, for poses that training images have."""
        found: dict[int, dict[int, int]] = {}
        objects, poses = self.objects.tolist(), self.poses.tolist()
        for index in range(len(self.train)):
            found.setdefault(poses[index], {})[objects[index]] = index
        return found

    def around(self, index: int) -> Tensor:
        """Returns the indices of all views of the same object at the same height, with the image itself."""
        members = self.members[self.objects[index]]
        members = members[members >= 0]
        return members[(self.polar[members] - self.polar[index]).abs() <= SAME]

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
    """A target view, its sources and what it is compared with. Images are indices into `Scenes`.

    Attributes:
        sources: indices into the split that sources come from (`source_images`).
        around: views of the same object at the same height; empty: they are too few for the azimuth tests.
        beside: another view of the object, 15 degrees off; None: there is none.
        candidates: pairs of training images of one object, from the first source's pose and from the target's.
    """

    index: int
    sources: list[int]
    around: list[int]
    beside: int | None
    candidates: list[tuple[int, int]]


def choose_targets(scenes: Scenes, count: int, seed: int) -> tuple[Subset, list[Target]]:
    """Returns `count` test images, drawn by the seed, or all if they are fewer, and what each is compared with."""
    experiment = scenes.experiment
    config, test, first = experiment.config, scenes.test, len(scenes.train)
    subset = random_subset(test, count, seed, "novel views")
    others = source_images(scenes.train, test, config)
    but = subset.indices if others is test else None
    objects = _needed(test.objects)[subset.indices]
    sources = draw_sources(others, objects, but, config.views.num_sources, range(len(subset)), seed, "novel view ")
    targets = []
    for index, of_target in zip((subset.indices + first).tolist(), sources.tolist(), strict=True):
        around = scenes.around(index)
        turns = scenes.turns(around, index)
        beside = around[(turns.abs() - NEAR).abs() <= SAME].tolist()
        is_ring = len(around) >= FEWEST_AROUND and SAME < scenes.polar[index] < 180 - SAME
        of_source = of_target[0] + (first if others is test else 0)
        here = scenes.known.get(int(scenes.poses[of_source]), {})
        there = scenes.known.get(int(scenes.poses[index]), {})
        own = int(scenes.objects[index])
        pairs = [(here[each], there[each]) for each in sorted(here.keys() & there.keys()) if each != own]
        targets.append(Target(index, of_target, around.tolist() if is_ring else [], next(iter(beside), None), pairs))
    return subset, targets


def _needed(value: Any) -> Any:
    assert value is not None
    return value
