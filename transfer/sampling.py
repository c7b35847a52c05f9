"""Images of each training step: a pure function of the step, so that a run can resume at any step."""

import torch
from torch import Tensor

from config.finetune_schema import FinetuneConfig
from transfer.methods import Method
from utils.randomness import generator


class Draws:
    """Indices of the training images of each step: first the labelled images of the batch, then the others.

    Labelled images and others are two endless sequences of permutations. Each batch takes the next images of both. So
    all images are used equally often, also if there are fewer than a batch needs.

    Attributes:
        steps_per_epoch: floor(all training images / batch size), but at least 1. It is the same for all methods.
    """

    def __init__(self, config: FinetuneConfig, method: Method, labelled: Tensor, unlabelled: Tensor) -> None:
        self._seed, self._batch_size, self._method = config.seed, config.training.batch_size, method
        self._pools = {"labelled": labelled, "unlabelled": unlabelled}
        self._order: dict[str, tuple[int, Tensor]] = {}
        self.steps_per_epoch = max(1, (len(labelled) + len(unlabelled)) // self._batch_size)

    def indices(self, step: int) -> Tensor:
        """Returns the indices (batch_size,) int64 of the global batch of `step`."""
        num_unlabelled = self._method.stage(step // self.steps_per_epoch).num_unlabelled
        num_labelled = self._batch_size - num_unlabelled
        return torch.cat([self._next("labelled", step, num_labelled), self._next("unlabelled", step, num_unlabelled)])

    def _next(self, pool: str, step: int, size: int) -> Tensor:
        """Returns `size` images of a pool: the part of its sequence that belongs to `step`."""
        images, position, parts = self._pools[pool], step * size, [self._pools[pool][:0]]
        end = position + size
        while position < end:
            round_, offset = divmod(position, len(images))
            if self._order.get(pool, (-1,))[0] != round_:
                order = torch.randperm(len(images), generator=generator(self._seed, f"{pool} order", round_))
                self._order[pool] = round_, images[order]
            parts.append(self._order[pool][1][offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts)
