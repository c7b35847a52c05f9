"""Mixup (Zhang et al., arXiv 1710.09412): images and labels of a batch are mixed in pairs."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.device import copy_to
from utils.randomness import derive_seed, generator


@dataclass(frozen=True)
class Pairs:
    """Pairs of images of the global batch that one rank mixes.

    Attributes:
        rows: (M,) int64, positions in the global batch of the images that the rank needs, rising.
        own: (n,) int64, indices into `rows` of the rank's share of the batch.
        partner: (n,) int64, indices into `rows` of the image that each of these is mixed with.
        weight: weight of `own`, in [0, 1]; `partner` has the rest. 1: nothing is mixed.
    """

    rows: Tensor
    own: Tensor
    partner: Tensor
    weight: float

    def to(self, device: torch.device) -> "Pairs":
        """Copies `own` and `partner` to the device without synchronising with it. `rows` stays on the host."""
        return replace(self, own=copy_to(self.own, device), partner=copy_to(self.partner, device))

    def mix(self, x: Tensor) -> Tensor:
        """Returns the mixed images (n, 3, H, W) of the images (M, 3, H, W) of `rows`."""
        return x[self.own] if self.weight == 1 else torch.lerp(x[self.partner], x[self.own], self.weight)


def draw_pairs(batch_size: int, share: range, alpha: float, seed: int, step: int) -> Pairs:
    """Returns the pairs of a step for the rank that has the `share` of the global batch.

    They are drawn for the whole global batch, so they do not depend on how it is divided.

    Args:
        alpha: the weight is drawn from Beta(alpha, alpha); 0: nothing is mixed.
    """
    own = torch.arange(share.start, share.stop)
    if alpha == 0:
        return Pairs(own, own - share.start, own - share.start, 1.0)
    partner = torch.randperm(batch_size, generator=generator(seed, "mixup partners", step))[own]
    rows = torch.cat([own, partner]).unique()
    weight = np.random.default_rng(derive_seed(seed, "mixup weight", step)).beta(alpha, alpha)
    return Pairs(rows, torch.searchsorted(rows, own), torch.searchsorted(rows, partner), float(weight))


def mixed_cross_entropy(logits: Tensor, labels: Tensor, partner_labels: Tensor, weight: float) -> Tensor:
    """Returns weight x cross-entropy of `labels` + (1 - weight) x cross-entropy of `partner_labels`, in float32.

    Both are means over the samples (N,). Samples with the label -1 add 0.
    """

    def mean(targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum") / len(targets)

    return mean(labels) if weight == 1 else weight * mean(labels) + (1 - weight) * mean(partner_labels)
