"""Indices of the images of each step: a pure function of the step, so that a run can resume at any step."""

from collections.abc import Callable

import torch
from torch import Tensor


class Loader:
    """Global batches of indices into a data set, addressed by step.

    Each epoch has its own permutation of the data set and floor(N / batch_size) steps. The rest of the permutation is
    left out.

    Args:
        num_samples: N, at least `batch_size`.
        batch_size: samples per step, over all ranks.
        epoch_generator: epoch -> generator that draws the permutation of this epoch.
    """

    def __init__(self, num_samples: int, batch_size: int, epoch_generator: Callable[[int], torch.Generator]) -> None:
        assert num_samples >= batch_size
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.steps_per_epoch = num_samples // batch_size
        self._epoch_generator = epoch_generator
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int, positions: range) -> Tensor:
        """Returns the indices (len(positions),) int64 of the samples at `positions` of the global batch of `step`."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(self.num_samples, generator=self._epoch_generator(epoch))
            self._epoch = epoch
        start = batch * self.batch_size
        return self._order[start + positions.start : start + positions.stop]
