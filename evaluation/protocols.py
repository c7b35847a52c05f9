"""Evaluation protocols: named ways to turn features into accuracies.

To add one, write a subclass of Protocol and put it into `all_protocols`, for the table of test.py and of ablations.
Those in `config_protocols` also judge a run while it trains.
"""

import typing
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from config.schema import KNN, Config, Probe, ProbeView, View
from evaluation.knn import knn_votes
from evaluation.linear_probe import LinearProbe


class Classifier(typing.Protocol):
    """A classifier that sees the training features once or in several epochs, then scores test features."""

    def train_epoch(self, features: Tensor, labels: Tensor) -> None:
        """See the training features (N, D) float32 and labels (N,) int64 of one epoch."""

    def scores(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, num_classes); the highest score is the guess."""


@dataclass(frozen=True, kw_only=True)
class Protocol(ABC):
    """One way to turn features into accuracies; `str` describes it in one line.

    Attributes:
        metric: its name in metrics.jsonl and TensorBoard.
        view: augmentation of the training images, drawn anew each epoch; None: none.
        features: name of the features, such as "z".
        normalize: scale features to length 1.
        note: printed behind the description.
    """

    metric: ClassVar[str]
    view: View | None = None
    features: str = "z"
    normalize: bool = True
    note: str = ""

    @property
    @abstractmethod
    def epochs(self) -> int:
        """Number of times that the training features are extracted and shown to the classifier."""

    @abstractmethod
    def classifier(
        self, num_features: int, num_classes: int, generator: torch.Generator, device: torch.device
    ) -> Classifier:
        """An untrained classifier."""

    @abstractmethod
    def describe(self, features: str, view: str) -> str:
        """The settings in one line, which includes the given words for features and view."""

    @property
    def view_name(self) -> str:
        """The view in a few words; views that differ have different names."""
        return "clean" if self.view is None else str(self.view)

    def __str__(self) -> str:
        text = self.describe(f"{'unit ' if self.normalize else ''}{self.features}", self.view_name)
        return f"{text} ({self.note})" if self.note else text


@dataclass(frozen=True, kw_only=True)
class KNNProtocol(Protocol):
    """k-nearest-neighbour classification by the training features, in Euclidean distance."""

    metric = "knn"
    settings: KNN

    @property
    def epochs(self) -> int:
        return 1

    def classifier(
        self, num_features: int, num_classes: int, generator: torch.Generator, device: torch.device
    ) -> Classifier:
        temperature = self.settings.temperature if self.settings.weights == "temperature" else None
        return _Neighbours(self.settings.k, num_classes, temperature)

    def describe(self, features: str, view: str) -> str:
        s = self.settings
        votes = "uniform" if s.weights == "uniform" else f"T={s.temperature:g}"
        return f"k-NN k={s.k} {votes}, {features}, bank: {view}"


class _Neighbours:
    def __init__(self, k: int, num_classes: int, temperature: float | None) -> None:
        self._k, self._num_classes, self._temperature = k, num_classes, temperature

    def train_epoch(self, features: Tensor, labels: Tensor) -> None:
        self._bank, self._labels = features, labels

    def scores(self, features: Tensor) -> Tensor:
        return knn_votes(self._bank, self._labels, features, self._k, self._num_classes, self._temperature)


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol(Protocol):
    """A linear probe, trained by Adam for some epochs."""

    metric = "probe"
    settings: Probe

    @property
    def epochs(self) -> int:
        return self.settings.epochs

    def classifier(
        self, num_features: int, num_classes: int, generator: torch.Generator, device: torch.device
    ) -> Classifier:
        s = self.settings
        return LinearProbe(
            num_features,
            num_classes,
            epochs=s.epochs,
            lr=s.lr,
            batch_size=s.batch_size,
            generator=generator,
            device=device,
        )

    def describe(self, features: str, view: str) -> str:
        s = self.settings
        return f"linear {s.epochs} epochs lr {s.lr:g} batch {s.batch_size}, {features}, views: {view}"


def config_protocols(config: Config) -> list[Protocol]:
    """The k-NN and the probe that the config's `evaluation` section asks for."""
    evaluation, augmented = config.evaluation, config.views.probe
    features, normalize = evaluation.features, evaluation.normalize
    return [
        KNNProtocol(
            settings=evaluation.knn,
            view=augmented if evaluation.knn.bank == "augmented" else None,
            features=features,
            normalize=normalize,
        ),
        ProbeProtocol(
            settings=evaluation.probe,
            view=augmented if evaluation.probe.transform == "augmented" else None,
            features=features,
            normalize=normalize,
        ),
    ]


def all_protocols(config: Config, num_train: int) -> list[Protocol]:
    """The protocols of test.py: the reference's, the config's own, and the usual ones of the field.

    The reference implementation's bank and probe see the views that are the defaults of `views.probe`. k = 200 with
    temperature 0.1 is lightly's benchmark (Wu et al. 2018). k is at most `num_train`, the number of training images.
    """
    few = KNN(k=min(20, num_train))
    many = KNN(k=min(200, num_train), weights="temperature", temperature=0.1)
    protocols: list[Protocol] = [
        KNNProtocol(settings=few, view=ProbeView(), note="the reference's"),
        ProbeProtocol(settings=Probe(), view=ProbeView(), note="the reference's"),
        *config_protocols(config),
    ]
    for features in ("z", "pooled"):
        protocols += [
            KNNProtocol(settings=few, features=features),
            KNNProtocol(settings=many, features=features),
            ProbeProtocol(settings=Probe(), features=features),
        ]
    # The config's own may be one of the others: the first of equal ones stays.
    return list({str(replace(protocol, note="")): protocol for protocol in reversed(protocols)}.values())[::-1]
