"""Judging features by k-NN and linear probe, each number named with its protocol.

Nothing here knows a model or a data set: encoders are callables, and images and views come with what they need.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.features import Features, calibrate_batch_norm, extract_features, normalize_features
from evaluation.knn import knn_votes, topk_accuracy
from evaluation.linear_probe import LinearProbe

__all__ = ["Protocol", "calibrate_batch_norm", "evaluate", "protocols_of"]

Accuracies = dict[str, float]  # {"top1": per cent, "top3": per cent}


@dataclass(frozen=True)
class Protocol:
    """One way to turn features into a number.

    Attributes:
        kind: "knn" or "probe".
        settings: the config's `evaluation.knn` or `evaluation.probe` section, accordingly.
        features: "z" or "pooled"; an encoder that has no such features is judged on its only ones.
        normalize: whether features are scaled to length 1.
        note: printed behind it.
    """

    kind: str
    settings: Any
    features: str
    normalize: bool
    note: str = ""

    @property
    def augmented(self) -> bool:
        return "augmented" in (self.settings.bank if self.kind == "knn" else self.settings.transform)

    @property
    def epochs(self) -> int:
        """How many times the training features are looked at."""
        return 1 if self.kind == "knn" else self.settings.epochs

    def __str__(self) -> str:
        s, where = self.settings, "augmented" if self.augmented else "clean"
        if self.kind == "knn":
            votes = "uniform" if s.weights == "uniform" else f"T={s.temperature:g}"
            what = f"k-NN: k={s.k}, {votes}, {where} bank"
        else:
            what = f"linear: {s.epochs} epochs, lr {s.lr:g}, batch {s.batch_size}, {where}"
        return (
            f"{what}, {self.features}{', length 1' if self.normalize else ''}{f' ({self.note})' if self.note else ''}"
        )


def protocols_of(config: Any) -> list[Protocol]:
    """The k-NN and the probe that the config's `evaluation` section asks for."""
    return [Protocol(kind, getattr(config, kind), config.features, config.normalize) for kind in ("knn", "probe")]


def evaluate(
    encoders: Mapping[str, Callable[[Tensor], Features]],
    train: Any,
    test: Any,
    clean_view: Callable[[Tensor], Tensor],
    augmented_view: Callable[[Tensor, range, int], Tensor],
    protocols: list[Protocol],
    num_classes: int,
    batch_size: int,
    generator: Callable[[], torch.Generator],
    device: torch.device,
) -> dict[str, dict[str, Accuracies]]:
    """Top-1 and top-3 of every encoder under every protocol: {protocol: {encoder: accuracies}}.

    All encoders and protocols share each pass over the views.

    Args:
        encoders: name -> function from a batch of views to named features.
        train, test: `pixels` (N, 3, H, W) uint8 and `labels` (N,) int64 of each split.
        clean_view: pixels -> views.
        augmented_view: (pixels, their indices, epoch) -> views; the k-NN's augmented bank is epoch 0.
        generator: gives each probe its source of randomness, the same for all.
    """

    def encode(views: Tensor) -> Features:
        return {f"{name}/{kind}": f for name, run in encoders.items() for kind, f in run(views).items()}

    def choose(features: Features, encoder: str, protocol: Protocol) -> Tensor:
        only = next(name for name in features if name.startswith(f"{encoder}/"))
        chosen = features.get(f"{encoder}/{protocol.features}", features[only])
        return normalize_features(chosen.to(device), protocol.normalize)

    train_labels, test_labels = train.labels.to(device), test.labels.to(device)
    queries = extract_features(lambda r: encode(clean_view(test.pixels[r.start : r.stop])), len(test), batch_size)
    clean: Features = {}
    if not all(protocol.augmented for protocol in protocols):
        clean = extract_features(lambda r: encode(clean_view(train.pixels[r.start : r.stop])), len(train), batch_size)

    probes = {
        (protocol, encoder): LinearProbe(
            choose(queries, encoder, protocol).shape[1],
            num_classes,
            protocol.settings.epochs,
            protocol.settings.lr,
            protocol.settings.batch_size,
            generator(),
            device,
        )
        for protocol in protocols
        if protocol.kind == "probe"
        for encoder in encoders
    }
    scores: dict[tuple[Protocol, str], Tensor] = {}
    for epoch in range(max(protocol.epochs for protocol in protocols)):
        current = [protocol for protocol in protocols if epoch < protocol.epochs]
        augmented: Features = {}
        if any(protocol.augmented for protocol in current):

            def encode_augmented(r: range, epoch: int = epoch) -> Features:
                return encode(augmented_view(train.pixels[r.start : r.stop], r, epoch))

            augmented = extract_features(encode_augmented, len(train), batch_size)
        for protocol in current:
            for encoder in encoders:
                features = choose(augmented if protocol.augmented else clean, encoder, protocol)
                if protocol.kind == "probe":
                    probes[protocol, encoder].train_epoch(features, train_labels)
                else:
                    s, q = protocol.settings, choose(queries, encoder, protocol)
                    temperature = s.temperature if s.weights == "temperature" else None
                    votes = knn_votes(features, train_labels, q, s.k, num_classes, temperature)
                    scores[protocol, encoder] = votes
    for (protocol, encoder), probe in probes.items():
        scores[protocol, encoder] = probe.scores(choose(queries, encoder, protocol))
    return {
        str(protocol): {name: topk_accuracy(scores[protocol, name], test_labels) for name in encoders}
        for protocol in protocols
    }
