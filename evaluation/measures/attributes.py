"""Prediction of attributes: one probe for each 0/1 column of `data.labels`."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from evaluation.measures.base import Inputs, Measure, Measured, Rows
from utils.text import join_names

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from evaluation.measures.subjects import Subjects
    from experiment.opening import Experiment

logger = logging.getLogger(__name__)

MAX_IMAGES = 25_000
HELD_OUT = 5  # one of this many images is held out
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class _Plan:
    """Images and attributes that are used.

    Attributes:
        chosen: (n,) indices of training images in random order. The first `num_train` are to fit, the others to score.
        values: (n, A) 0/1 attributes of these images.
        columns: attributes that have both values in both parts.
    """

    chosen: Tensor
    num_train: int
    values: np.ndarray
    columns: list[int]

    @classmethod
    def of(cls, experiment: Experiment) -> _Plan:
        import torch

        from utils.randomness import generator

        assert experiment.train.attributes is not None, "the measure needs attributes"
        order = torch.randperm(len(experiment.train), generator=generator(experiment.config.seed, "attribute images"))
        chosen = order[:MAX_IMAGES]
        num_train, values = len(chosen) - len(chosen) // HELD_OUT, experiment.train.attributes[chosen].numpy()
        parts = values[:num_train], values[num_train:]
        columns = [j for j in range(values.shape[1]) if all({0, 1} == set(part[:, j].tolist()) for part in parts)]
        return cls(chosen, num_train, values, columns)


class Attributes(Measure):
    """Average precision and balanced accuracy of logistic regression, for each attribute of the images.

    Attributes belong to training images, so a random fifth of these is held out. (The encoder has been trained on all
    of them, but without attributes.) The probe is scikit-learn's logistic regression with C = 1 and classes of equal
    weight, on standardised features. Average precision is sum_n (R_n - R_(n-1)) P_n over the thresholds of the score,
    with recall R and precision P. Balanced accuracy is the mean of the recalls of 0 and 1. The column "chance" has the
    values of a random score: the fraction of ones, and 50 %.
    """

    name = "attributes"
    meaning = "average precision and balanced accuracy of a probe for each attribute in data.labels"
    cost = f"encodes at most {MAX_IMAGES} training images, then one fit per attribute and encoder"

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        if experiment.train.attributes is None:
            return "it needs attributes (0/1 columns of data.labels)"
        columns = _Plan.of(experiment).columns
        return None if columns else "it needs an attribute with both values in the images to fit and in those to score"

    def measure(self, subjects: Subjects) -> Measured:
        from evaluation.features import Subset
        from evaluation.measures.subjects import standardized
        from utils.distributed.collectives import map_over_ranks

        plan, titles = _Plan.of(subjects.experiment), subjects.experiment.train.attribute_names
        left_out = [name for j, name in enumerate(titles) if j not in plan.columns]
        if left_out:
            logger.info(
                "the measure attributes leaves out %s: the images to fit or the images to score have only one value",
                join_names(left_out),
            )
        values, columns, num_train = plan.values, plan.columns, plan.num_train
        inputs = {
            name: standardized(features, features[:num_train]).cpu().numpy()
            for name, features in subjects.features(Subset(subjects.experiment.train, plan.chosen)).items()
        }
        tasks = [(column, name) for column in columns for name in inputs]
        scores = map_over_ranks(lambda task: probe(inputs[task[1]], values[:, task[0]], num_train), tasks)
        found = dict(zip(tasks, scores, strict=True))
        unfinished = sum(not converged for _, _, converged in scores)
        if unfinished:
            text = "attributes: %d of %d fits of logistic regression stopped after %d iterations, before they converged"
            logger.info(text, unfinished, len(tasks), MAX_ITERATIONS)
        rows: Rows = {}
        for place, score in enumerate(("average precision", "balanced accuracy")):
            chances = {column: 50.0 if place else 100 * float(values[num_train:, column].mean()) for column in columns}
            for column in columns:
                by_encoder = {name: {"value": found[column, name][place]} for name in inputs}
                rows[f"{score}, {titles[column]}"] = by_encoder | {"chance": {"value": chances[column]}}
            means = {name: {"value": fmean(found[column, name][place] for column in columns)} for name in inputs}
            rows[f"mean of the attributes, {score}"] = means | {"chance": {"value": fmean(chances.values())}}
        protocol = (
            f"probe of each attribute (%), logistic regression C=1 balanced on standardised {subjects.feature}; "
            f"{num_train} training images to fit, {len(values) - num_train} other training images to score"
        )
        return Measured(protocol, rows)


def probe(features: np.ndarray, values: np.ndarray, num_train: int) -> tuple[float, float, bool]:
    """Returns average precision and balanced accuracy in per cent on the samples from `num_train` on.

    The third value is False if the fit was stopped before it converged.

    Args:
        features: (N, D) standardised features.
        values: (N,) 0/1 values.
        num_train: number of samples that logistic regression is fitted on.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, balanced_accuracy_score

    fitted = LogisticRegression(class_weight="balanced", max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():  # the caller reports it
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted.fit(features[:num_train], values[:num_train])
    scores = fitted.decision_function(features[num_train:])
    return (
        100 * float(average_precision_score(values[num_train:], scores)),
        100 * float(balanced_accuracy_score(values[num_train:], scores > 0)),
        bool(fitted.n_iter_.max() < MAX_ITERATIONS),
    )
