"""Evaluation protocols: named ways to turn features into accuracies.

To add a protocol, write a subclass of Protocol and add it to `all_protocols`. It then appears in the tables of test.py
and of the ablations. The protocols in `config_protocols` are also used for the evaluations during training.
"""

import typing
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from config.schema import KNN, Config, Probe, ProbeView, View
from evaluation.features import feature_name
from evaluation.knn import knn_votes
from evaluation.linear_probe import LinearProbe
from evaluation.logistic_regression import LogisticProbe
from evaluation.mlp_probe import DROPOUT, HIDDEN, MLPProbe

METRICS = {"knn": "k-NN", "probe": "linear probe", "mlp": "MLP"}
"""Names, in figures, of the metrics of protocols."""


class Classifier(typing.Protocol):
    """Interface of a classifier that is trained on features for one or more epochs and then scores test features."""

    def train_epoch(self, features: Tensor, labels: Tensor) -> None:
        """Trains on the features (N, D) float32 and labels (N,) int64 of one epoch."""

    def scores(self, features: Tensor) -> Tensor:
        """Returns the scores (N, num_classes) of features (N, D). The highest score is the predicted class."""


@dataclass(frozen=True, kw_only=True)
class Protocol(ABC):
    """A named way to turn features into accuracies. Its name is `str(protocol)`: its settings, in one line.

    Attributes:
        metric: short name of the kind of classifier, a key of METRICS.
        view: augmentation of the training images, drawn again in each epoch; None: no augmentation.
        features: kind of the features, such as "z".
        timestep: timestep of the features of a time-dependent encoder; None: they do not depend on the timestep.
        normalize: True scales each feature vector to length 1.
        note: text that is added to the name in parentheses.
    """

    metric: ClassVar[str]
    view: View | None = None
    features: str = "z"
    timestep: int | None = None
    normalize: bool = True
    note: str = ""

    @property
    def epochs(self) -> int:
        """Number of epochs that the classifier is trained for. Augmented features are extracted again in each epoch."""
        return 1

    @abstractmethod
    def classifier(
        self, num_features: int, num_classes: int, generator: torch.Generator, device: torch.device
    ) -> Classifier:
        """Returns an untrained classifier."""

    @abstractmethod
    def describe(self, features: str, view: str) -> str:
        """Returns the settings in one line, which includes the descriptions `features` and `view`."""

    def prepare(self, features: Tensor) -> Tensor:
        """Returns features (N, D) as the classifier takes them: scaled to length 1 if `normalize` is True."""
        return F.normalize(features, dim=1) if self.normalize else features

    @property
    def feature_name(self) -> str:
        """Name of the features, such as "z" or "z@500"."""
        return feature_name(self.features, self.timestep)

    @property
    def logged_as(self) -> str:
        """Name of the accuracies in metrics.jsonl and TensorBoard: the metric and the timestep, such as "knn@500"."""
        return feature_name(self.metric, self.timestep)

    @property
    def view_name(self) -> str:
        """Short description of the view. Different views have different descriptions."""
        return "clean" if self.view is None else str(self.view)

    def __str__(self) -> str:
        text = self.describe(f"{'unit ' if self.normalize else ''}{self.feature_name}", self.view_name)
        return f"{text} ({self.note})" if self.note else text


@dataclass(frozen=True, kw_only=True)
class KNNProtocol(Protocol):
    """k-NN classification: the nearest training features, by Euclidean distance, vote for the class."""

    metric = "knn"
    settings: KNN

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
    """Linear probe, trained by Adam for several epochs."""

    metric = "probe"
    trained: ClassVar[type[LinearProbe]] = LinearProbe
    name: ClassVar[str] = "linear"
    settings: Probe

    @property
    def epochs(self) -> int:
        return self.settings.epochs

    def classifier(
        self, num_features: int, num_classes: int, generator: torch.Generator, device: torch.device
    ) -> Classifier:
        s = self.settings
        return self.trained(
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
        return f"{self.name} {s.epochs} epochs lr {s.lr:g} batch {s.batch_size}, {features}, views: {view}"


@dataclass(frozen=True, kw_only=True)
class MLPProtocol(ProbeProtocol):
    """MLP with one hidden layer, trained like the linear probe."""

    metric = "mlp"
    trained = MLPProbe
    name = f"mlp {HIDDEN} hidden dropout {DROPOUT:g}"


@dataclass(frozen=True, kw_only=True)
class FinishedProbeProtocol(Protocol):
    """Linear probe that converges: logistic regression by L-BFGS, on the features of one epoch of views."""

    metric = "probe"

    def classifier(
        self, num_features: int, num_classes: int, generator: torch.Generator, device: torch.device
    ) -> Classifier:
        return LogisticProbe(num_features, num_classes, generator=generator, device=device)

    def describe(self, features: str, view: str) -> str:
        return f"linear L-BFGS, {features}, views: {view}"


def config_protocols(config: Config) -> list[Protocol]:
    """Returns the protocols that the `evaluation` section of the config describes: k-NN, linear probe, MLP if wanted.

    The MLP has the settings of the linear probe. Features of a time-dependent encoder are judged at each timestep.
    """
    evaluation, augmented = config.evaluation, config.views.probe
    features, normalize = evaluation.features, evaluation.normalize
    view = augmented if evaluation.probe.transform == "augmented" else None
    probe: Protocol
    if evaluation.probe.solver == "lbfgs":
        probe = FinishedProbeProtocol(view=view, features=features, normalize=normalize)
    else:
        probe = ProbeProtocol(settings=evaluation.probe, view=view, features=features, normalize=normalize)
    mlp = MLPProtocol(settings=evaluation.probe, view=view, features=features, normalize=normalize)
    knn = KNNProtocol(
        settings=evaluation.knn,
        view=augmented if evaluation.knn.bank == "augmented" else None,
        features=features,
        normalize=normalize,
    )
    protocols: list[Protocol] = [knn, probe, *([mlp] if evaluation.mlp else [])]
    return protocols if features.startswith("decoder.") else over_timesteps(protocols, config)


def over_timesteps(protocols: list[Protocol], config: Config) -> list[Protocol]:
    """Returns each protocol at each judged timestep. They are unchanged if the encoder has no timesteps."""
    return [replace(protocol, timestep=timestep) for protocol in protocols for timestep in config.judged_timesteps]


def all_protocols(config: Config, num_train: int) -> list[Protocol]:
    """Returns the protocols of test.py: the reference implementation's, the config's, and common ones.

    The k-NN bank and the probe of the reference implementation use the augmentation that is the default of
    `views.probe`. k = 200 with temperature 0.1 is the protocol of lightly's benchmark (Wu et al. 2018). k is limited to
    `num_train`, the number of training images. Images with cameras are not judged by the protocols of the reference
    implementation, because crops do not fit their rays.

    The curves of a time-dependent encoder have fewer protocols: the config's, k-NN, and the probe that converges.
    """
    few = KNN(k=min(20, num_train))
    if config.encoder.time_dependent:
        curves = [KNNProtocol(settings=few), FinishedProbeProtocol(normalize=False)]
        return _distinct([*config_protocols(config), *over_timesteps(curves, config)])
    many = KNN(k=min(200, num_train), weights="temperature", temperature=0.1)
    references: list[Protocol] = [
        KNNProtocol(settings=few, view=ProbeView(), note="the reference's"),
        ProbeProtocol(settings=Probe(), view=ProbeView(), note="the reference's"),
    ]
    protocols = [*([] if config.data.has_cameras else references), *config_protocols(config)]
    for features in ("z", "pooled"):
        protocols += [
            KNNProtocol(settings=few, features=features),
            KNNProtocol(settings=many, features=features),
            ProbeProtocol(settings=Probe(), features=features),
            FinishedProbeProtocol(features=features, normalize=False),  # it standardises the features itself
        ]
    return _distinct(protocols)


def _distinct(protocols: list[Protocol]) -> list[Protocol]:
    """Returns the protocols without repetitions. Of equal ones the first is kept, because it may have a note."""
    return list({str(replace(protocol, note="")): protocol for protocol in reversed(protocols)}.values())[::-1]
