"""The linear probe: a linear classifier on frozen features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPS, MOMENTUM = 1e-6, 0.1  # of BatchNorm
BLOCK = 2**24  # numbers that are normalised at once


class LinearProbe:
    """BatchNorm without affine parameters, then a linear layer, trained by Adam.

    The protocol of the reference implementation: BatchNorm's eps is 1e-6, the learning rate falls by a cosine, an
    epoch at a time, and would be zero after the last. Features may differ from epoch to epoch, since augmented
    views are drawn and encoded anew; `train_epoch` is called once for each.

    A batch is too little work for a module: what does not depend on the weights is done for many batches at once, and
    the gradient of softmax and cross-entropy, (p - onehot)^T x / n, is written out.

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
        bound = 1 / math.sqrt(num_features)  # as nn.Linear starts
        weight = torch.empty(num_classes, num_features).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(num_classes, 1).uniform_(-bound, bound, generator=generator)
        self._weight = torch.cat([weight, bias], dim=1).to(device)  # (num_classes, D + 1): of features and a one
        self._weight.grad = torch.zeros_like(self._weight)
        self._optimizer = torch.optim.Adam([self._weight], lr=lr, fused=device.type in ("cpu", "cuda"))
        self._mean, self._var = torch.zeros(num_features, device=device), torch.ones(num_features, device=device)

    @torch.no_grad()
    def train_epoch(self, features: Tensor, labels: Tensor) -> None:
        """One epoch over features (N, D) float32 and labels (N,) int64, both on the probe's device."""
        assert self._epoch < self.epochs
        self._optimizer.param_groups[0]["lr"] = self.lr * (1 + math.cos(math.pi * self._epoch / self.epochs)) / 2
        order = torch.randperm(len(features), generator=self._generator).to(features.device)
        whole = len(order) // self.batch_size * self.batch_size
        step = max(1, BLOCK // (self.batch_size * features.shape[1])) * self.batch_size
        for start in range(0, whole, step):
            block = order[start : min(start + step, whole)]
            self._train(features[block], labels[block], self.batch_size)
        if len(order) - whole > 1:  # BatchNorm refuses to train on one
            self._train(features[order[whole:]], labels[order[whole:]], len(order) - whole)
        self._epoch += 1

    def _train(self, features: Tensor, labels: Tensor, n: int) -> None:
        """Over features (B n, D) and labels (B n,), in B batches of n."""
        x = features.view(-1, n, features.shape[1])
        var, mean = torch.var_mean(x, dim=1, correction=0)  # (B, D) each
        # The running averages after B batches.
        ages = torch.arange(len(x) - 1, -1, -1, device=x.device)
        weights, kept = MOMENTUM * (1 - MOMENTUM) ** ages, (1 - MOMENTUM) ** len(x)
        self._mean = kept * self._mean + weights @ mean
        self._var = kept * self._var + weights @ var * (n / (n - 1))
        x = _with_one((x - mean[:, None]) * (var[:, None] + EPS).rsqrt())  # (B, n, D + 1)
        minus_one = -torch.ones(n, 1, device=x.device)
        for x_batch, label in zip(x, labels.view(len(x), n, 1), strict=True):
            error = torch.softmax(x_batch @ self._weight.T, dim=1).scatter_add_(1, label, minus_one)
            torch.addmm(self._weight, error.T, x_batch, beta=0, alpha=1 / n, out=self._weight.grad)
            self._optimizer.step()

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, num_classes)."""
        return _with_one((features - self._mean) * (self._var + EPS).rsqrt()) @ self._weight.T


def _with_one(x: Tensor) -> Tensor:
    """(..., D) -> (..., D + 1), the last being 1: the bias's feature."""
    return F.pad(x, (0, 1), value=1.0)
