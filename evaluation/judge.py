"""The judge, which applies named protocols to encoders and returns their accuracies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from config.schema import View
from datasets.images import DatasetError, Images
from evaluation.encoders import Encode, baselines, encode_with, settled
from evaluation.features import Features, extract_features
from evaluation.knn import topk_accuracy
from evaluation.protocols import Classifier, Protocol
from experiment.batch import evaluation_view
from experiment.opening import Experiment, check_neighbours
from model.soda import SODA
from utils.distributed.processes import world_size
from utils.logging import progress
from utils.randomness import generator

MakeView = Callable[[Images, Tensor, range, View | None, int], Tensor]
"""Function (split, pixels (N, 3, P, P) uint8, their indices in it, augmentation or None, epoch) -> encoder's input."""

Table = dict[str, dict[str, dict[str, float]]]
"""Accuracies in per cent: {protocol: {encoder: {"top1": ..., "top3": ...}}}."""


@dataclass(frozen=True)
class _Cell:
    """A cell of the table whose classifier is still being trained: one protocol applied to one encoder.

    Attributes:
        encoder: name of the encoder.
        key: key of the cell's features: (name of the encoder, name of the features, normalize).
    """

    protocol: Protocol
    encoder: str
    key: tuple[str, str, bool]
    classifier: Classifier


def check_can_judge(experiment: Experiment) -> None:
    """Raises DatasetError if there are no test images with labels, or fewer training images than neighbours."""
    if not experiment.has_test_labels:
        raise DatasetError(
            f"{experiment.config.data.root} has no test images with labels: set data.root to images with labels, "
            "hold out some of them with data.holdout, or judge without labels by --measures all"
        )
    check_neighbours(experiment.config, experiment.train)


def judge_trained(experiment: Experiment, soda: SODA, protocols: list[Protocol]) -> Table:
    """Collective. Returns the accuracies of the encoder of `soda` and of the baselines, under each protocol.

    The encoder is judged twice. As "settled", its BatchNorm statistics are computed as for the untrained encoder.
    """
    encoders = {
        "trained": encode_with(experiment, soda),
        "settled": encode_with(experiment, settled(experiment, soda)),
        **baselines(experiment),
    }
    return judge(experiment, encoders, protocols)


def judge(experiment: Experiment, encoders: Mapping[str, Encode], protocols: list[Protocol]) -> Table:
    """Collective. Returns the accuracies of `encoders` on the experiment's test images, under each protocol."""
    config = experiment.config
    assert experiment.test is not None, "the judge needs test images with labels"
    return accuracy_table(
        encoders,
        experiment.train,
        experiment.test,
        partial(evaluation_view, experiment),
        protocols,
        num_classes=len(experiment.info.classes),
        batch_size=config.evaluation.batch_size,
        source=lambda: generator(config.seed, "probe"),
        device=experiment.device,
    )


def accuracy_table(
    encoders: Mapping[str, Encode],
    train: Images,
    test: Images,
    make_view: MakeView,
    protocols: list[Protocol],
    *,
    num_classes: int,
    batch_size: int,
    source: Callable[[], torch.Generator],
    device: torch.device,
) -> Table:
    """Collective. Returns the accuracies of `encoders` under `protocols`.

    Each view is made only once per epoch, for all encoders and for all protocols that use it. If an encoder does not
    return the features of a protocol, the table has no cell for this pair.

    Args:
        train: images that the classifiers are trained on.
        test: images that the accuracies are measured on, always without augmentation.
        batch_size: images per forward pass of each encoder.
        source: function that returns a generator of random numbers for one classifier. All generators have the same
            seed.
    """
    wanted = list(dict.fromkeys((protocol.feature_name, protocol.normalize) for protocol in protocols))

    def extract(split: Images, view: View | None, epoch: int, what: str) -> Features:
        def encode(pixels: Tensor, indices: range) -> Features:
            bar.update(len(indices))
            batch = make_view(split, pixels, indices, view, epoch)
            features: Features = {}
            for name, encoder in encoders.items():
                found = encoder(batch, indices)
                for kind, normalize in wanted:
                    if kind in found:
                        values = found[kind].float()
                        features[name, kind, normalize] = F.normalize(values, dim=1) if normalize else values
            return features

        with progress(len(split) // world_size(), f"encoding {what}", "img") as bar:
            return extract_features(encode, split, batch_size, device)

    assert train.labels is not None and test.labels is not None, "the judge needs images with labels"
    train_labels, test_labels = train.labels.to(device), test.labels.to(device)
    queries = extract(test, None, 0, "test images")
    table: Table = {str(protocol): {} for protocol in protocols}
    for view in unique([protocol.view for protocol in protocols]):
        cells = [
            _Cell(protocol, name, key, protocol.classifier(queries[key].shape[1], num_classes, source(), device))
            for protocol in protocols
            for name in encoders
            if protocol.view == view and (key := (name, protocol.feature_name, protocol.normalize)) in queries
        ]
        features: Features = {}
        epochs = max((cell.protocol.epochs for cell in cells), default=0)
        for epoch in range(epochs):
            if epoch == 0 or view is not None:  # clean views are the same in each epoch
                features = {}  # frees the features of the previous epoch before new ones are allocated
                of_epochs = "" if view is None else f", epoch {epoch + 1} of {epochs}"
                features = extract(train, view, epoch, f"training images{of_epochs}")
            for cell in cells:
                cell.classifier.train_epoch(features[cell.key], train_labels)
                if epoch == cell.protocol.epochs - 1:
                    scores = cell.classifier.scores(queries[cell.key])
                    table[str(cell.protocol)][cell.encoder] = topk_accuracy(scores, test_labels)
            cells = [cell for cell in cells if epoch < cell.protocol.epochs - 1]  # frees finished classifiers
    return table


def unique(views: list[View | None]) -> list[View | None]:
    """Returns the views without repetitions, in the same order. Views contain lists, so they cannot be hashed."""
    return [view for i, view in enumerate(views) if view not in views[:i]]
