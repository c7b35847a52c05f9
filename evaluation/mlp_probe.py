"""The MLP probe: a classifier with one hidden layer on frozen features."""

import torch
from torch import Tensor, nn

from evaluation.linear_probe import LinearProbe

HIDDEN, DROPOUT = 512, 0.25


class MLPProbe(LinearProbe):
    """MLP classifier: BatchNorm as in the linear probe, a hidden layer with ReLU and dropout, then a linear layer.

    The hidden layer and the dropout are those of Diffusion-Based Representation Learning (arXiv 2105.14257), which
    judges its encoders in this way. The training is that of the linear probe.
    """

    def layers(self, num_features: int, num_classes: int) -> list[nn.Module]:
        hidden = self.linear(num_features, HIDDEN)
        return [hidden, nn.ReLU(), nn.Dropout(DROPOUT), self.linear(HIDDEN, num_classes)]

    def train_epoch(self, features: Tensor, labels: Tensor) -> None:
        """Trains for one epoch, as in the linear probe. Seeds torch's default generators, which draw the dropout."""
        torch.manual_seed(int(torch.randint(2**62, (), generator=self._generator)))
        super().train_epoch(features, labels)
