"""The linear probe: a linear classifier on frozen features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearProbe:
    """BatchNorm without affine parameters, then a linear layer, trained by Adam.

    The protocol of the reference implementation: BatchNorm's eps is 1e-6, the learning rate falls by a cosine, an
    epoch at a time, and would be zero after the last. Features may differ from epoch to epoch, since augmented
    views are drawn and encoded anew; `train_epoch` is called once for each.

    Args:
        num_features: D.
        epochs, lr, batch_size: the last batch of an epoch holds what is left, if that is more than one sample.
        generator: source of the initial weights and of each epoch's order.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        epochs: int,
        lr: float,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.epochs, self.lr, self.batch_size = epochs, lr, batch_size
        self._generator = generator
        self._epoch = 0
        linear = nn.Linear(num_features, num_classes)
        bound = 1 / math.sqrt(num_features)  # as nn.Linear starts, but from this generator
        with torch.no_grad():
            linear.weight.uniform_(-bound, bound, generator=generator)
            linear.bias.uniform_(-bound, bound, generator=generator)
        self._model = nn.Sequential(nn.BatchNorm1d(num_features, affine=False, eps=1e-6), linear).to(device)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=lr)

    def train_epoch(self, features: Tensor, labels: Tensor) -> None:
        """One epoch over features (N, D) float32 and labels (N,) int64, both on the probe's device."""
        assert self._epoch < self.epochs
        self._model.train()
        self._optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * self._epoch / self.epochs)) / 2
        order = torch.randperm(len(features), generator=self._generator).to(features.device)
        for batch in order.split(self.batch_size):
            if len(batch) > 1:  # BatchNorm refuses to train on one
                loss = F.cross_entropy(self._model(features[batch]), labels[batch])
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()
        self._epoch += 1

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, num_classes)."""
        self._model.eval()
        return self._model(features)
