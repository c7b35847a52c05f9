"""Images that generated views are compared with: the source itself, training objects and other true views."""

import logging
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.novel_views.scenes import Target, Targets
from utils.distributed.collectives import all_reduce
from utils.distributed.processes import my_range

SOURCE, MEAN, NEAREST, BESIDE = "source", "mean object", "nearest object", "15 degrees off"
NEAREST_SIZE = 32  # source images are compared at no more than this size, in pixels
PART = 1024  # training images that are read at once

logger = logging.getLogger(__name__)


class Baselines:
    """Baselines of the views of some targets. Collective: the ranks share the reading of the training images.

    - source: the first source image.
    - mean object: the mean of the training images that are seen from the target's pose.
    - nearest object: of the training objects that are seen from both poses, the one whose image at the first source's
      pose differs least from the source (squared error). Its image at the target's pose is the baseline.
    - 15 degrees off: another true view of the object, at the same height.

    Attributes:
        names: baselines that exist for all targets, in the order of the table. The log says which are left out.
    """

    def __init__(self, targets: Targets) -> None:
        self._scenes, self._pairs = targets.scenes, cache(self._pairs_at)
        exists = {
            MEAN: sum(self._pose(each.index) in self._scenes.known for each in targets),
            NEAREST: sum(bool(len(self._candidates(each)[0])) for each in targets),
            BESIDE: sum(each.beside is not None for each in targets),
        }
        for name, count in exists.items():
            if count < len(targets):
                logger.info(
                    "novel views: the baseline %r is left out, because only %d of %d targets have it",
                    name,
                    count,
                    len(targets),
                )
        self.names = [SOURCE, *(name for name, count in exists.items() if count == len(targets))]
        if {MEAN, NEAREST} & {*self.names}:
            self._read_training_images(targets)

    def _read_training_images(self, targets: Targets) -> None:
        """Computes the mean training image of each target's pose, and all training images at NEAREST_SIZE."""
        scenes = self._scenes
        config, device, count = scenes.experiment.config, scenes.experiment.device, len(scenes.train)
        poses = scenes.poses[:count]
        self._wanted = scenes.poses[[each.index for each in targets]].unique()
        slots = torch.full((int(scenes.poses.max()) + 1,), -1)  # position in `_wanted` of each pose
        slots[self._wanted] = torch.arange(len(self._wanted))
        size = config.decoder_size
        small_size = min(NEAREST_SIZE, size)
        total = torch.zeros(len(self._wanted), 3, size, size, device=device)
        small = torch.zeros(count, 3, small_size, small_size, dtype=torch.uint8, device=device)
        for part in my_range(-(-count // PART)):
            indices = torch.arange(part * PART, min((part + 1) * PART, count))
            images, slot = scenes.x_start(indices), slots[poses[indices]]
            small[indices] = _to_small(images).mul(127.5).add(127.5).round().byte()
            total.index_add_(0, slot[slot >= 0].to(device), images[(slot >= 0).to(device)])
        of_pose = poses.bincount(minlength=len(slots))[self._wanted].to(device)
        self._means = all_reduce(total) / of_pose[:, None, None, None]
        self._small = all_reduce(small)

    def views(self, targets: Sequence[Target], sources: Tensor) -> dict[str, Tensor]:
        """Returns the images (N, 3, D, D) of each baseline, in [-1, 1].

        Args:
            sources: (N, 3, D, D) first source image of each target.
        """
        found = {SOURCE: sources}
        if MEAN in self.names:
            slots = torch.searchsorted(self._wanted, self._scenes.poses[[each.index for each in targets]])
            found[MEAN] = self._means[slots.to(sources.device)]
        if NEAREST in self.names:
            chosen = [self._nearest(each, image) for each, image in zip(targets, _to_small(sources), strict=True)]
            found[NEAREST] = self._scenes.x_start(torch.tensor(chosen))
        if BESIDE in self.names:
            found[BESIDE] = self._scenes.x_start(torch.tensor([each.beside for each in targets]))
        return found

    def _pose(self, index: int) -> int:
        return int(self._scenes.poses[index])

    def _pairs_at(self, source: int, target: int) -> tuple[Tensor, Tensor]:
        """Returns the training images at two poses, (M,) each, of the M objects that have both."""
        here, there = (self._scenes.known.get(pose, {}) for pose in (source, target))
        objects = sorted(here.keys() & there.keys())
        return torch.tensor([here[each] for each in objects]).long(), torch.tensor([there[each] for each in objects])

    def _candidates(self, target: Target) -> tuple[Tensor, Tensor]:
        """Returns the training images of other objects at the poses of a target's first source and of the target."""
        here, there = self._pairs(self._pose(target.sources[0]), self._pose(target.index))
        is_other = self._scenes.objects[here] != self._scenes.objects[target.index]
        return here[is_other], there[is_other]

    def _nearest(self, target: Target, source: Tensor) -> int:
        """Returns the index of the training image of `nearest object`, for a source of NEAREST_SIZE."""
        here, there = self._candidates(target)
        seen = self._small[here.to(source.device)].float() / 127.5 - 1
        return int(there[(seen - source).square().mean(dim=(1, 2, 3)).argmin().cpu()])


def _to_small(images: Tensor) -> Tensor:
    """Averages images (N, 3, D, D) down to at most NEAREST_SIZE pixels."""
    return F.adaptive_avg_pool2d(images, min(NEAREST_SIZE, images.shape[-1]))
