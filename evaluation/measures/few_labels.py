"""Accuracy of classifiers that are trained on frozen features with few labels per class."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from evaluation.measures.base import Inputs, Measured, MeasureOfClasses, Rows, mean_cell

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.measures.subjects import Subjects
    from experiment.opening import Experiment

COUNTS = (1, 5, 10, 100)  # labels per class
DRAWS = 10
MAX_LABELLED = 20_000  # largest number of labelled images; logistic regression would take hours with more
NEIGHBOURS, TEMPERATURE = 20, 0.1
MAX_ITERATIONS = 1000

logger = logging.getLogger(__name__)


class FewLabels(MeasureOfClasses):
    """Top-1 accuracy on all test images with 1, 5, 10 and 100 labels per class: mean and deviation over 10 draws.

    Each draw is a random order of the images of each class, and the first n of them have labels. The images with n
    labels per class are therefore among those with more. Other training images are used only for the mean and the
    standard deviation of the features.

    k-NN is that of Wu et al. (2018): features of length 1, weights exp(cosine / 0.1), and k = 20, or all labelled
    images if these are fewer. Logistic regression is scikit-learn's with C = 1, on features that are standardised by
    the mean and the standard deviation of all training features.
    """

    name = "few_labels"
    meaning = "accuracy of k-NN and logistic regression from 1, 5, 10 and 100 labels per class"
    cost = "encodes both splits, then 40 small fits of each kind per encoder"

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        obstacle, labels = super().obstacle(experiment, inputs), experiment.train.labels
        if obstacle or labels is None or int(labels.bincount(minlength=len(experiment.info.classes)).min()):
            return obstacle
        return "it needs a training image of each class"

    def measure(self, subjects: Subjects) -> Measured:
        import torch.nn.functional as F

        from evaluation.measures.subjects import standardized
        from utils.distributed.collectives import map_over_ranks

        units = {name: (F.normalize(train), F.normalize(subjects.test[name])) for name, train in subjects.train.items()}
        scaled = {
            name: (standardized(train, train).cpu(), standardized(subjects.test[name], train).cpu())
            for name, train in subjects.train.items()
        }
        orders = _orders(subjects)
        rows: Rows = {}
        for count in _possible_counts(subjects.train_labels):
            tasks = [(draw, name) for draw in range(DRAWS) for name in units]

            def accuracies(task: tuple[int, str], count: int = count) -> tuple[float, float]:
                draw, name = task
                chosen = orders[draw][:, :count].flatten()
                return (
                    knn_accuracy(*units[name], chosen, subjects.train_labels, subjects.test_labels),
                    logistic_accuracy(*scaled[name], chosen, subjects.train_labels, subjects.test_labels),
                )

            found = dict(zip(tasks, map_over_ranks(accuracies, tasks), strict=True))
            for place, kind in enumerate(("k-NN", "logistic")):
                rows[f"{kind}, {count} per class"] = {
                    name: mean_cell([found[draw, name][place] for draw in range(DRAWS)]) for name in units
                }
        protocol = (
            f"top-1 (%) with few labels, mean ± standard deviation of {DRAWS} draws; k-NN k={NEIGHBOURS} "
            f"T={TEMPERATURE:g} on unit {subjects.feature}, logistic regression C=1 on standardised {subjects.feature}"
        )
        by_kind = {name: rows[name] for name in sorted(rows, key=lambda name: name.split(",")[0])}
        return Measured(protocol, by_kind)


def _possible_counts(labels: Tensor) -> list[int]:
    """Returns the numbers of labels per class for which there are enough images, and not too many in total."""
    fewest, num_classes = int(labels.bincount().min()), len(labels.bincount())
    kept = [count for count in COUNTS if count <= fewest and count * num_classes <= MAX_LABELLED]
    if len(kept) < len(COUNTS):
        logger.info(
            "few_labels leaves out %s labels per class: the smallest of the %d classes has %d training images, and at "
            "most %d images get labels",
            ", ".join(str(count) for count in COUNTS if count not in kept),
            num_classes,
            fewest,
            MAX_LABELLED,
        )
    return kept


def _orders(subjects: Subjects) -> list[Tensor]:
    """Returns the indices of the training images in each draw, (C, fewest images of a class), in random order."""
    import torch

    from utils.randomness import generator

    labels = subjects.train_labels.cpu()
    fewest = int(labels.bincount().min())
    orders = []
    for draw in range(DRAWS):
        order = torch.randperm(len(labels), generator=generator(subjects.experiment.config.seed, "few labels", draw))
        of_class = [order[labels[order] == label][:fewest] for label in range(len(labels.bincount()))]
        orders.append(torch.stack(of_class))
    return orders


def knn_accuracy(train: Tensor, test: Tensor, chosen: Tensor, train_labels: Tensor, test_labels: Tensor) -> float:
    """Returns the top-1 accuracy in per cent of k-NN whose bank is the training features at the indices `chosen`.

    Args:
        train, test: (N, D) features of length 1.
    """
    from evaluation.knn import knn_votes, topk_accuracy

    chosen, num_classes = chosen.to(train.device), int(train_labels.max()) + 1
    k = min(NEIGHBOURS, len(chosen))
    votes = knn_votes(train[chosen], train_labels[chosen], test, k, num_classes, TEMPERATURE)
    return topk_accuracy(votes, test_labels)["top1"]


def logistic_accuracy(train: Tensor, test: Tensor, chosen: Tensor, train_labels: Tensor, test_labels: Tensor) -> float:
    """Returns the top-1 accuracy in per cent of logistic regression on the training features at the indices `chosen`.

    Args:
        train, test: (N, D) standardised features, on the host.
    """
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=MAX_ITERATIONS).fit(train[chosen].numpy(), train_labels.cpu()[chosen].numpy())
    return 100 * float(fitted.score(test.numpy(), test_labels.cpu().numpy()))
