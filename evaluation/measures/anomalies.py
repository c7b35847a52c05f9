"""Detection of images of an unknown class, or of another data set, by their distance to known images."""

from __future__ import annotations

from collections.abc import Callable, Collection
from statistics import fmean
from typing import TYPE_CHECKING

from evaluation.measures.base import Inputs, Measured, MeasureOfClasses, Rows

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.measures.subjects import Subjects
    from experiment.opening import Experiment

NEIGHBOUR = 5
MAX_OTHERS = 2000  # images of another data set
MAX_ROWS = 20  # largest number of classes for which each class has a row


class Anomalies(MeasureOfClasses):
    """AUROC of the distance to the fifth nearest training image as a score of anomalies (Sun et al. 2022).

    One class at a time is held out: the training images are those of all other classes. The anomalies are the test
    images of the class, against all other test images. The last row compares images of another data set with all test
    images. The encoder has been trained on all classes, but without labels. Features have length 1. An AUROC of 50 % is
    chance.
    """

    name = "anomalies"
    meaning = "AUROC of a k-NN distance: one class held out, and another data set against this one"
    cost = "encodes both splits, then one k-NN search per encoder, divided among the processes by class"

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        labels = experiment.train.labels
        if not experiment.has_test_labels or labels is None:
            return super().obstacle(experiment, inputs)
        rest = len(labels) - int(labels.bincount().max())
        few = f"it needs {NEIGHBOUR} training images that are not of the largest class, and there are only {rest}"
        return few if rest < NEIGHBOUR else None

    def measure(self, subjects: Subjects) -> Measured:
        import torch.nn.functional as F

        from evaluation.features import random_subset

        experiment, classes = subjects.experiment, subjects.experiment.info.classes
        assert subjects.inputs.others is not None, "the measure needs another data set"
        other_name, others = subjects.inputs.others
        title = f"another data set: {other_name}"  # not the name of a class
        chosen = random_subset(others, MAX_OTHERS, experiment.config.seed, "images of another data set")
        of_others = subjects.features(chosen)
        summaries: dict[str, Callable[[Collection[float]], float]] = {"mean of the classes": fmean}
        if len(classes) > MAX_ROWS:
            summaries |= {"lowest of the classes": min, "highest of the classes": max}
        shown = classes if len(classes) <= MAX_ROWS else []
        rows: Rows = {row: {} for row in (*shown, *summaries, title)}
        for name, train in subjects.train.items():
            bank, test = F.normalize(train), F.normalize(subjects.test[name])
            scores = held_out_scores(bank, subjects.train_labels, test)
            found = held_out_aurocs(scores, subjects.test_labels)
            for place, value in found.items() if shown else ():
                rows[classes[place]][name] = {"value": value}
            for row, summary in summaries.items() if found else ():
                rows[row][name] = {"value": summary(found.values())}
            known, other = (kth_distance(bank, queries) for queries in (test, F.normalize(of_others[name])))
            rows[title][name] = {"value": auroc(other, known)}
        protocol = (
            f"AUROC (%) of the distance to the {NEIGHBOUR}th nearest training image, unit {subjects.feature}; the "
            f"training images of the named class are left out, and its test images are the anomalies; last row: "
            f"{len(chosen)} images of another data set against all test images"
        )
        return Measured(protocol, {name: cells for name, cells in rows.items() if cells})


def auroc(anomalies: Tensor, others: Tensor) -> float:
    """Returns in per cent how often a random anomaly has a higher score than another image; ties count half."""
    import torch
    from sklearn.metrics import roc_auc_score

    is_anomaly = torch.cat([torch.ones(len(anomalies)), torch.zeros(len(others))])
    return 100 * float(roc_auc_score(is_anomaly.numpy(), torch.cat([anomalies, others]).cpu().numpy()))


def kth_distance(bank: Tensor, queries: Tensor) -> Tensor:
    """Returns the distance (Q,) of each of `queries` (Q, D) to its NEIGHBOUR-th nearest entry of `bank` (N, D)."""
    from evaluation.knn import neighbour_distances

    return neighbour_distances(bank, queries, NEIGHBOUR)[:, -1]


def held_out_scores(bank: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Collective. Returns `kth_distance` (Q, C) of queries to the bank without one of C classes.

    The ranks divide the classes among them. Each searches the nearest entries of a class once. The nearest entries of
    all other classes are among these. The bank must have NEIGHBOUR entries without any of the classes.

    Args:
        bank: (N, D) features.
        labels: (N,) classes.
        queries: (Q, D) features.
    """
    import torch

    from evaluation.knn import neighbour_distances
    from utils.distributed.collectives import all_reduce
    from utils.distributed.processes import my_range

    num_classes = int(labels.max()) + 1
    nearest = torch.zeros(len(queries), num_classes, NEIGHBOUR, device=queries.device)
    for label in my_range(num_classes):
        of_class = bank[labels == label]
        k = min(NEIGHBOUR, len(of_class))
        nearest[:, label, k:] = torch.inf
        if k:
            nearest[:, label, :k] = neighbour_distances(of_class, queries, k)
    # A class has at most NEIGHBOUR of the 2 * NEIGHBOUR nearest entries, so that enough of the others remain.
    flat = all_reduce(nearest).flatten(1)  # (Q, C * NEIGHBOUR)
    distances, places = flat.topk(2 * NEIGHBOUR, largest=False)
    scores = []
    for label in range(num_classes):
        rest = distances.masked_fill(places // NEIGHBOUR == label, torch.inf)
        scores.append(rest.sort(dim=1).values[:, NEIGHBOUR - 1])
    return torch.stack(scores, dim=1)


def held_out_aurocs(scores: Tensor, labels: Tensor) -> dict[int, float]:
    """Returns the AUROC of each class that has some, but not all, of the test images, by the index of the class.

    Args:
        scores: (Q, C) scores of the test images, with each class held out.
        labels: (Q,) classes of the test images.
    """
    found = {}
    for label in range(scores.shape[1]):
        held_out, score = labels == label, scores[:, label]
        if held_out.any() and not held_out.all():
            found[label] = auroc(score[held_out], score[~held_out])
    return found
