"""The judge, which applies named protocols to encoders and returns their accuracies."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

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

Key = tuple[str, str]
"""Key of features: (name of the encoder, name of the features)."""

Table = dict[str, dict[str, dict[str, float]]]
"""Accuracies in per cent: {protocol: {encoder: {"top1": ..., "top3": ...}}}."""


@dataclass(frozen=True)
class _Cell:
    """A cell of the table whose classifier is still being trained: one protocol applied to one encoder.

    Attributes:
        key: key of the cell's features.
    """

    protocol: Protocol
    key: Key
    classifier: Classifier


def check_can_judge(experiment: Experiment) -> None:
    """Raises DatasetError if there are no test images with labels, or fewer training images than neighbours."""
    if not experiment.has_test_labels:
        raise DatasetError(
            f"{experiment.config.data.root} has no test images with labels: set data.root to images with labels, "
            "hold out some of them with data.holdout, or judge without labels by --measures all"
        )
    check_neighbours(experiment.config, experiment.train)


def judge_trained(experiment: Experiment, soda: SODA, protocols: list[Protocol], with_baselines: bool = True) -> Table:
    """Collective. Returns the accuracies of the encoder of `soda`, and of the baselines if wanted, by protocol.

    With baselines, the encoder is also judged as "settled": its BatchNorm statistics are then computed as for the
    untrained encoder.
    """
    encoders = {"trained": encode_with(experiment, soda)}
    if with_baselines:
        encoders |= {"settled": encode_with(experiment, settled(experiment, soda)), **baselines(experiment)}
    return judge(experiment, encoders, protocols)


def judge(experiment: Experiment, encoders: Mapping[str, Encode], protocols: list[Protocol]) -> Table:
    """Collective. Returns the accuracies of `encoders` on the experiment's test images, under each protocol.

    Classifiers are trained on the training images. Each view of them is made only once per epoch, for all encoders and
    for all protocols that use it. Test images are not augmented. If an encoder does not return the features of a
    protocol, the table has no cell for this pair.
    """
    config, train, test, device = experiment.config, experiment.train, experiment.test, experiment.device
    assert test is not None and train.labels is not None and test.labels is not None, "the judge needs labels"
    train_labels, test_labels = train.labels.to(device), test.labels.to(device)
    num_classes = len(experiment.info.classes)

    def extract(split: Images, view: View | None, epoch: int, keys: Collection[Key], what: str) -> dict[Key, Tensor]:
        """Collective. Returns the features with these keys, if the encoders have them. Others are not kept."""

        def encode(pixels: Tensor, indices: range) -> Features:
            bar.update(len(indices))
            made = evaluation_view(experiment, split, pixels, indices, view, epoch)
            features: Features = {}
            for name, encoder in encoders.items():
                for kind, values in encoder(made, indices).items():
                    if (name, kind) in keys:
                        features[name, kind] = values.float()
            return features

        with progress(len(split) // world_size(), f"encoding {what}", "img") as bar:
            return extract_features(encode, split, config.evaluation.batch_size, device)  # type: ignore[return-value]

    keys = {(name, protocol.feature_name) for name in encoders for protocol in protocols}
    queries = extract(test, None, 0, keys, "test images")
    table: Table = {str(protocol): {} for protocol in protocols}
    for view in unique([protocol.view for protocol in protocols]):
        cells = []
        for protocol in protocols:
            for name in encoders:
                if protocol.view == view and (key := (name, protocol.feature_name)) in queries:
                    source = generator(config.seed, "probe")  # all classifiers draw the same random numbers
                    classifier = protocol.classifier(queries[key].shape[1], num_classes, source, device)
                    cells.append(_Cell(protocol, key, classifier))
        features: dict[Key, Tensor] = {}
        epochs = max((cell.protocol.epochs for cell in cells), default=0)
        for epoch in range(epochs):
            if epoch == 0 or view is not None:  # clean views are the same in each epoch
                features = {}  # frees the features of the previous epoch before new ones are allocated
                of_epochs = "" if view is None else f", epoch {epoch + 1} of {epochs}"
                features = extract(train, view, epoch, {cell.key for cell in cells}, f"training images{of_epochs}")
            unfinished = []
            while cells:
                cell = cells.pop(0)  # frees the classifier before it, which may hold a copy of its features
                cell.classifier.train_epoch(cell.protocol.prepare(features[cell.key]), train_labels)
                if epoch == cell.protocol.epochs - 1:
                    scores = cell.classifier.scores(cell.protocol.prepare(queries[cell.key]))
                    table[str(cell.protocol)][cell.key[0]] = topk_accuracy(scores, test_labels)
                else:
                    unfinished.append(cell)
            cells = unfinished
    return table


def unique(views: list[View | None]) -> list[View | None]:
    """Returns the views without repetitions, in the same order. Views contain lists, so they cannot be hashed."""
    return [view for i, view in enumerate(views) if view not in views[:i]]
