"""Judging features by k-NN and linear probe, each number named with its protocol.

Nothing here knows a model or a data set: encoders and views are callables, images come with what they need.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.features import Features, extract_features
from evaluation.knn import knn_votes, topk_accuracy
from evaluation.linear_probe import LinearProbe

__all__ = ["CLEAN", "MakeView", "Protocol", "evaluate"]

CLEAN = "clean"  # the name of the plain test view

# (pixels (N, 3, H, W) uint8, their indices in the data set, epoch) -> views (N, 3, H, W)
MakeView = Callable[[Tensor, range, int], Tensor]


@dataclass(frozen=True)
class Protocol:
    """One way to turn features into a number.

    Attributes:
        kind: "knn" or "probe".
        settings: the config's `evaluation.knn` or `evaluation.probe` section, accordingly.
        view: the name of the view that the training images get; the probe sees it anew each epoch.
        features: the name of those that are looked at, such as "z".
        normalize: whether features are scaled to length 1.
        note: printed behind it.
    """

    kind: str
    settings: Any
    view: str
    features: str
    normalize: bool
    note: str = ""

    @property
    def epochs(self) -> int:
        """How many times the training features are looked at."""
        return 1 if self.kind == "knn" else self.settings.epochs

    def __str__(self) -> str:
        s, features = self.settings, f"{'unit ' if self.normalize else ''}{self.features}"
        if self.kind == "knn":
            votes = "uniform" if s.weights == "uniform" else f"T={s.temperature:g}"
            what = f"k-NN k={s.k} {votes}, {features}, bank: {self.view}"
        else:
            what = f"linear {s.epochs} epochs lr {s.lr:g} batch {s.batch_size}, {features}, views: {self.view}"
        return what + (f" ({self.note})" if self.note else "")


def evaluate(
    encoders: Mapping[str, Callable[[Tensor, range], Mapping[str, Tensor]]],
    train: Any,
    test: Any,
    views: Mapping[str, MakeView],
    protocols: list[Protocol],
    num_classes: int,
    batch_size: int,
    generator: Callable[[], torch.Generator],
    device: torch.device,
    share: Callable[[int], range] = range,
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracies in per cent: {protocol: {encoder: {"top1": ..., "top3": ...}}}.

    All encoders and protocols share each pass over the views. An encoder that lacks a protocol's features is
    left out under it.

    Args:
        encoders: name -> function from a batch of views and its indices to features by name.
        train, test: each split, with `labels` (N,) int64 and `batches` as in `extract_features`.
        views: name -> view, CLEAN among them; a k-NN with an augmented bank takes that of epoch 0.
        generator: gives each probe its source of randomness, the same for all.
        share, all_reduce: how processes share the encoding, as in `extract_features`.
    """

    def extract(split: Any, view: str, epoch: int) -> Features:
        def encode(pixels: Tensor, indices: range) -> Features:
            batch = views[view](pixels, indices, epoch)
            features: Features = {}
            for encoder, run in encoders.items():
                for kind, values in run(batch, indices).items():
                    if (kind, False) in wanted:
                        features[encoder, kind, False] = values.float()
                    if (kind, True) in wanted:
                        features[encoder, kind, True] = F.normalize(values.float(), dim=1)
            return features

        return extract_features(encode, split, batch_size, device, share, all_reduce)

    wanted = {(protocol.features, protocol.normalize) for protocol in protocols}
    train_labels, test_labels = train.labels.to(device), test.labels.to(device)
    queries = extract(test, CLEAN, 0)
    accuracies: dict[str, dict[str, dict[str, float]]] = {str(protocol): {} for protocol in protocols}
    for view in dict.fromkeys(protocol.view for protocol in protocols):
        cells = [
            (protocol, encoder, (encoder, protocol.features, protocol.normalize))
            for protocol in protocols
            for encoder in encoders
            if protocol.view == view and (encoder, protocol.features, protocol.normalize) in queries
        ]
        probes: dict[tuple[Protocol, str], LinearProbe] = {}
        for epoch in range(max(protocol.epochs for protocol, _, _ in cells)):
            if epoch == 0 or view != CLEAN:
                features: Features = {}  # lets go of the last ones, before others take as much memory
                features = extract(train, view, epoch)
            for protocol, encoder, name in cells:
                s = protocol.settings
                if protocol.kind == "knn" and epoch == 0:
                    temperature = s.temperature if s.weights == "temperature" else None
                    votes = knn_votes(features[name], train_labels, queries[name], s.k, num_classes, temperature)
                    accuracies[str(protocol)][encoder] = topk_accuracy(votes, test_labels)
                elif protocol.kind == "probe" and epoch < protocol.epochs:
                    if epoch == 0:
                        probes[protocol, encoder] = LinearProbe(
                            queries[name].shape[1], num_classes, s.epochs, s.lr, s.batch_size, generator(), device
                        )
                    probes[protocol, encoder].train_epoch(features[name], train_labels)
                    if epoch == protocol.epochs - 1:
                        scores = probes[protocol, encoder].scores(queries[name])
                        accuracies[str(protocol)][encoder] = topk_accuracy(scores, test_labels)
    return accuracies
