"""Images of each training step: a pure function of the step, so that a run can resume at any step."""

from itertools import accumulate

import torch
from torch import Tensor

from config.finetune_schema import FinetuneConfig
from transfer.methods import Method
from utils.randomness import generator


class Draws:
    """Indices of the training images of each step: first the labelled images of the batch, then the others.

    Labelled images and others are two endless sequences of permutations. Each batch takes the next images of both. So
    all images are used equally often, even if a batch needs more than there are.

    Attributes:
        steps_per_epoch: floor(all training images / batch size), but at least 1. It is the same for all methods.
    """

    def __init__(self, config: FinetuneConfig, method: Method, labelled: Tensor, unlabelled: Tensor) -> None:
        self._seed = config.seed
        self._pools = {"labelled": labelled, "unlabelled": unlabelled}
        self._orders: dict[tuple[str, int], Tensor] = {}
        self.steps_per_epoch = max(1, (len(labelled) + len(unlabelled)) // config.training.batch_size)
        # For each pool: images of each step of an epoch, and images that are used before an epoch.
        of_epochs = [method.stage(epoch).num_unlabelled for epoch in range(config.training.epochs)]
        self._sizes = {"labelled": [config.training.batch_size - size for size in of_epochs], "unlabelled": of_epochs}
        self._used = {
            pool: list(accumulate((size * self.steps_per_epoch for size in sizes), initial=0))
            for pool, sizes in self._sizes.items()
        }

    def indices(self, step: int) -> Tensor:
        """Returns the indices (batch_size,) int64 of the global batch of `step`."""
        return torch.cat([self._next(pool, step) for pool in self._pools])

    def _next(self, pool: str, step: int) -> Tensor:
        """Returns the images of a pool that belong to `step`: the next part of its sequence."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        size, count, parts = self._sizes[pool][epoch], len(self._pools[pool]), [self._pools[pool][:0]]
        position = self._used[pool][epoch] + step_of_epoch * size
        end = position + size
        while position < end:
            round_, offset = divmod(position, count)
            parts.append(self._order(pool, round_)[offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts)

    def _order(self, pool: str, round_: int) -> Tensor:
        """Returns the permutation of a pool in a round. The last two are kept, because images are read ahead."""
        if (pool, round_) not in self._orders:
            images = self._pools[pool]
            order = torch.randperm(len(images), generator=generator(self._seed, f"{pool} order", round_))
            self._orders = {key: kept for key, kept in self._orders.items() if key[0] != pool or key[1] == round_ - 1}
            self._orders[pool, round_] = images[order]
        return self._orders[pool, round_]
