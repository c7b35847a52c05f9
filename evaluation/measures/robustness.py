"""Accuracy on corrupted test images of classifiers that are trained on clean images."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from evaluation.measures.base import Measured, MeasureOfClasses, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.measures.subjects import Subjects
    from evaluation.protocols import Classifier, Protocol

MAX_IMAGES = 2000  # per kind and severity; the means over severities have 5 times as many
REFERENCE = "raw pixels"

Accuracies = dict[tuple[str, str], list[float]]
"""Top-1 in per cent by (kind of corruption, encoder): one per severity."""


class Robustness(MeasureOfClasses):
    """Top-1 accuracy of k-NN and of a linear probe on corrupted test images, and the mean corruption error.

    Both classifiers are those of test.py, trained on clean images: k-NN with k = 20 and uniform votes on features of
    length 1, and the linear probe that converges, on standardised features. `corruptions.py` has the kinds and their
    parameters. The row of a kind is the mean over severities 1 to 5.

    The mean corruption error (Hendrycks & Dietterich 2019) is the mean over the kinds c of
    100 * sum_s E(s, c) / sum_s E_ref(s, c). E(s, c) is the error at severity s. The reference is the same classifier on
    raw pixels, in place of the paper's AlexNet, so the raw pixels have 100.
    """

    name = "robustness"
    meaning = "accuracy of k-NN and linear probe on corrupted test images, and mean corruption error"
    cost = f"encodes both splits, then at most {MAX_IMAGES} test images 55 times; fits one probe per encoder"

    def measure(self, subjects: Subjects) -> Measured:
        from config.schema import KNN
        from datasets.operations import resize
        from evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
        from evaluation.features import random_subset
        from evaluation.knn import topk_accuracy
        from evaluation.protocols import FinishedProbeProtocol, KNNProtocol

        experiment = subjects.experiment
        seed, size = experiment.config.seed, experiment.config.encoder_size
        knn = KNNProtocol(settings=KNN(k=min(20, len(experiment.train))))
        protocols = {"k-NN": knn, "probe": FinishedProbeProtocol(normalize=False)}
        classifiers = {
            (kind, name): _trained(protocol, train, subjects)
            for kind, protocol in protocols.items()
            for name, train in subjects.train.items()
        }

        def accuracies(features: dict[str, Tensor]) -> dict[tuple[str, str], float]:
            return {
                (kind, name): topk_accuracy(classifier.scores(protocols[kind].prepare(features[name])), labels)["top1"]
                for (kind, name), classifier in classifiers.items()
            }

        assert experiment.test is not None, "the measure needs test images"
        chosen = random_subset(experiment.test, MAX_IMAGES, seed, "corrupted images")
        labels = subjects.test_labels[chosen.indices.to(experiment.device)]

        clean = accuracies({name: test[chosen.indices.to(test.device)] for name, test in subjects.test.items()})
        found: dict[str, Accuracies] = {kind: {} for kind in protocols}
        for corruption in CORRUPTIONS:
            for severity in SEVERITIES:

                def make_view(
                    pixels: Tensor, indices: range, corruption: str = corruption, severity: int = severity
                ) -> Tensor:
                    small = pixels if pixels.shape[-1] == size else resize(pixels, size)
                    corrupted = corrupt(small, indices, corruption, severity, seed)
                    return experiment.views.evaluation(corrupted.to(experiment.device))

                for (kind, encoder), accuracy in accuracies(subjects.features(chosen, make_view)).items():
                    found[kind].setdefault((corruption, encoder), []).append(accuracy)
        rows: Rows = {}
        for kind, by_corruption in found.items():
            encoders = list(subjects.encoders)
            rows[f"{kind}, clean"] = {name: {"value": clean[kind, name]} for name in encoders}
            for corruption in CORRUPTIONS:
                rows[f"{kind}, {corruption}"] = {
                    name: {"value": fmean(by_corruption[corruption, name])} for name in encoders
                }
            for title, summary in (("mean of all kinds", mean_accuracy), ("mean corruption error", corruption_error)):
                values = {name: summary(by_corruption, name) for name in encoders}
                rows[f"{kind}, {title}"] = {name: {"value": v} for name, v in values.items() if v is not None}
        protocol = (
            f"top-1 (%) on {len(chosen)} test images with the corruptions of CIFAR-10-C, mean of severities 1 to 5, of "
            f"classifiers trained on clean images; k-NN k={knn.settings.k} uniform on unit {subjects.feature}, probe "
            f"L-BFGS on standardised {subjects.feature}; mean corruption error: 100 for raw pixels"
        )
        return Measured(protocol, rows)


def _trained(protocol: Protocol, features: Tensor, subjects: Subjects) -> Classifier:
    """Collective. Returns the protocol's classifier, trained on the features (N, D) of the training images."""
    from utils.randomness import generator

    experiment = subjects.experiment
    source = generator(experiment.config.seed, "probe")
    classifier = protocol.classifier(features.shape[1], len(experiment.info.classes), source, experiment.device)
    classifier.train_epoch(protocol.prepare(features), subjects.train_labels)
    return classifier


def mean_accuracy(accuracies: Accuracies, encoder: str) -> float:
    """Returns the mean accuracy of an encoder over all kinds and severities."""
    return fmean(fmean(each) for (_, name), each in accuracies.items() if name == encoder)


def corruption_error(accuracies: Accuracies, encoder: str) -> float | None:
    """Returns the mean corruption error of an encoder; None if the reference makes no error under one of the kinds."""
    ratios = []
    for (kind, name), each in accuracies.items():
        if name == encoder:
            error, of_reference = (sum(100 - top1 for top1 in top1s) for top1s in (each, accuracies[kind, REFERENCE]))
            if not of_reference:
                return None
            ratios.append(100 * error / of_reference)
    return fmean(ratios)
