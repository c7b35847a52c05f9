"""The linear probe: a linear classifier on frozen features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from utils.device import FUSED

EPS = 1e-6  # of BatchNorm
GATHERED = 2**24  # numbers that are gathered at once, 64 MB


class LinearProbe:
    """BatchNorm without affine parameters, then a linear layer, trained by Adam.

    The protocol of the reference implementation: BatchNorm's eps is 1e-6, and the learning rate falls by a cosine, an
    epoch at a time, to zero after the last epoch. Features may differ from epoch to epoch, since augmented views are
    drawn and encoded anew; `train_epoch` is called once for each epoch.

    Args:
        num_features: D.
        epochs, lr, batch_size: the last batch of an epoch is smaller, and left out if it is a single sample.
        generator: source of the initial weights and of each epoch's order.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        epochs: int,
        lr: float,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.epochs, self.lr, self.batch_size = epochs, lr, batch_size
        self._generator = generator
        self._epoch = 0
        linear = skip_init(nn.Linear, num_features, num_classes)  # draws nothing from the default generator
        for parameter in (linear.weight, linear.bias):  # nn.Linear's distribution, drawn from our generator
            nn.init.uniform_(parameter, -(num_features**-0.5), num_features**-0.5, generator=generator)
        self._model = nn.Sequential(nn.BatchNorm1d(num_features, eps=EPS, affine=False), linear).to(device)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=lr, fused=device.type in FUSED)

    def train_epoch(self, features: Tensor, labels: Tensor) -> None:
        """Train one epoch on features (N, D) float32 and labels (N,) int64, both on the probe's device."""
        assert self._epoch < self.epochs
        self._optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * self._epoch / self.epochs)) / 2
        order = torch.randperm(len(features), generator=self._generator).to(features.device)
        self._model.train()
        # Many batches are gathered at once, which is faster than one by one, and bounded, since it copies them.
        batches_at_once = max(1, GATHERED // (self.batch_size * features.shape[1]))
        for chosen in order.split(batches_at_once * self.batch_size):
            batches = features[chosen].split(self.batch_size), labels[chosen].split(self.batch_size)
            for x, y in zip(*batches, strict=True):
                if len(x) > 1:  # BatchNorm refuses to train on one
                    loss = F.cross_entropy(self._model(x), y)
                    self._optimizer.zero_grad()
                    loss.backward()
                    self._optimizer.step()
        self._epoch += 1

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, num_classes)."""
        return self._model.eval()(features)
