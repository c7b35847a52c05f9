"""The linear probe: a linear classifier on frozen features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from utils.device import FUSED

EPS = 1e-6  # BatchNorm's eps
GATHERED = 2**24  # largest number of values that one operation gathers: 64 MB in float32


class LinearProbe:
    """Linear classifier: BatchNorm without affine parameters, then a linear layer, trained by Adam.

    This is the protocol of the reference implementation. BatchNorm's eps is 1e-6. The learning rate is constant within
    an epoch. It falls from epoch to epoch by a cosine that reaches zero after the last epoch.

    Call `train_epoch` once for each epoch. The features may differ between epochs, because augmented views are drawn
    and encoded again in each epoch.

    Args:
        num_features: D.
        epochs: number of calls of `train_epoch`.
        lr: learning rate of the first epoch.
        batch_size: samples per training step. The last batch of an epoch may be smaller. It is skipped if it has only
            one sample.
        generator: draws the initial weights and the order of the samples in each epoch.
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
        layers = self.layers(num_features, num_classes)
        self._model = nn.Sequential(nn.BatchNorm1d(num_features, eps=EPS, affine=False), *layers).to(device)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=lr, fused=device.type in FUSED)

    def layers(self, num_features: int, num_classes: int) -> list[nn.Module]:
        """Returns the layers after BatchNorm, with initial weights: (N, num_features) -> (N, num_classes)."""
        return [self.linear(num_features, num_classes)]

    def linear(self, num_inputs: int, num_outputs: int) -> nn.Linear:
        """Returns a linear layer whose initial weights have nn.Linear's distribution, but come from our generator."""
        layer = skip_init(nn.Linear, num_inputs, num_outputs)  # does not draw from torch's default generator
        for parameter in (layer.weight, layer.bias):
            nn.init.uniform_(parameter, -(num_inputs**-0.5), num_inputs**-0.5, generator=self._generator)
        return layer

    def train_epoch(self, features: Tensor, labels: Tensor) -> None:
        """Trains for one epoch on features (N, D) float32 and labels (N,) int64, both on the probe's device."""
        assert self._epoch < self.epochs
        self._optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * self._epoch / self.epochs)) / 2
        order = torch.randperm(len(features), generator=self._generator).to(features.device)
        self._model.train()
        # One operation gathers many batches, because this is faster than one operation per batch. The number of batches
        # is limited, because the gathered features are a copy.
        batches_at_once = max(1, GATHERED // (self.batch_size * features.shape[1]))
        for chosen in order.split(batches_at_once * self.batch_size):
            batches = features[chosen].split(self.batch_size), labels[chosen].split(self.batch_size)
            for x, y in zip(*batches, strict=True):
                if len(x) > 1:  # BatchNorm cannot train on a single sample
                    loss = F.cross_entropy(self._model(x), y)
                    self._optimizer.zero_grad()
                    loss.backward()
                    self._optimizer.step()
        self._epoch += 1

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Returns the scores (N, num_classes) of features (N, D). The highest score is the predicted class."""
        return self._model.eval()(features)
