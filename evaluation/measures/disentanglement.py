"""Disentanglement of features with respect to known factors: DCI and the mutual information gap."""

from __future__ import annotations

import logging
from statistics import fmean
from typing import TYPE_CHECKING

from evaluation.measures.base import Inputs, Measure, Measured, Rows

if TYPE_CHECKING:
    from evaluation.dci import Fit
    from evaluation.measures.subjects import Subjects
    from experiment.opening import Experiment

logger = logging.getLogger(__name__)

MIN_IMAGES = 40
NUM_TRAIN, NUM_TEST = 3000, 1000  # images that the regressors are fitted on, and that their R^2 is computed on


class Disentanglement(Measure):
    """DCI (Eastwood & Williams, ICLR 2018) and MIG (Chen et al., NeurIPS 2018) on images with known factors.

    The images are those of --factors, at most 4000 of them, or synthetic shapes. The factors of the shapes are those of
    `shapes.py`: size, position, hue and rotation, but not the kind of the shape. A regressor predicts each factor from
    the features. R[i, j] is the importance of feature i for factor j. For a lasso with cross-validated strength, on
    standardised features, it is the absolute weight. For a random forest, it is the decrease of the variance.

    Disentanglement: 1 minus the entropy of R[i, :] / sum_j R[i, j] with base K, the number of factors. It is averaged
    over the features, with weights sum_j R[i, j]. It is 1 if each feature is important for only one factor.
    Completeness: 1 minus the entropy of R[:, j] / sum_i R[i, j] with base D, the number of features. It is averaged
    over the factors. It is 1 if only one feature is important for each factor.
    Informativeness: R^2 on a quarter of the images, which the regressors have not seen, averaged over the factors. The
    paper reports the error instead.
    MIG: I(factor, best feature) - I(factor, second best feature), divided by the factor's entropy, averaged over the
    factors. I is the mutual information, of values in 20 bins of equal width.

    A rotation of the features changes no distance between images, but lowers all scores except informativeness. The
    encoder has been trained on other images than the shapes. The raw pixels are replaced by their first principal
    components, as many as z has dimensions.
    """

    name = "disentanglement"
    meaning = "DCI and MIG on images with known factors: the extent to which each feature depends on one factor"
    cost = f"encodes {NUM_TRAIN + NUM_TEST} images, then fits a lasso and a forest per factor and encoder (minutes)"

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        if inputs.factors is None:
            return None
        if len(inputs.factors.images) < MIN_IMAGES:
            return f"it needs {MIN_IMAGES} images that can be read in the table of --factors"
        return None if len(inputs.factors.names) > 1 else "it needs two factors that vary in the table of --factors"

    def measure(self, subjects: Subjects) -> Measured:
        import numpy as np

        from evaluation.dci import (
            MAX_ROUNDS,
            REGRESSORS,
            TREES,
            completeness,
            disentanglement,
            mutual_information_gap,
            principal_components,
        )
        from evaluation.factors import shapes_with_factors
        from utils.distributed.collectives import map_over_ranks
        from utils.randomness import derive_seed

        experiment, count = subjects.experiment, NUM_TRAIN + NUM_TEST
        config = experiment.config
        known = subjects.inputs.factors or shapes_with_factors(count, experiment)
        num_train = len(known.values) * NUM_TRAIN // count
        features = {name: each.cpu().numpy() for name, each in subjects.features(known.images).items()}
        raw = features.pop("raw pixels", None)
        if raw is not None:
            features["principal components"] = principal_components(raw, config.encoder.latent_dim)
        factors, seed = known.values.numpy(), derive_seed(config.seed, "random forests") % 2**32

        tasks = [(kind, j, name) for kind in REGRESSORS for j in range(len(known.names)) for name in features]

        def fit(task: tuple[str, int, str]) -> Fit:
            kind, j, name = task
            return REGRESSORS[kind](features[name], factors[:, j], num_train, seed)

        fits = dict(zip(tasks, map_over_ranks(fit, tasks), strict=True))
        unfinished = sum(not converged for _, _, converged in fits.values())
        if unfinished:
            of = len(known.names) * len(features)
            text = "disentanglement: %d of %d lassos stopped after %d rounds, before they converged"
            logger.info(text, unfinished, of, MAX_ROUNDS)
        gaps = map_over_ranks(lambda name: mutual_information_gap(features[name], factors), list(features))
        rows: Rows = {}
        for kind in REGRESSORS:
            for name in features:
                found = [fits[kind, j, name] for j in range(len(known.names))]
                importances = np.stack([importance for importance, *_ in found], axis=1)
                scores = {
                    "disentanglement": disentanglement(importances),
                    "completeness": completeness(importances),
                    "informativeness": fmean(r2 for _, r2, _ in found),
                    **{f"R² of {factor}": r2 for factor, (_, r2, _) in zip(known.names, found, strict=True)},
                }
                for score, value in scores.items():
                    rows.setdefault(f"{kind}, {score}", {})[name] = {"value": value}
        rows["mutual information gap"] = {name: {"value": gap} for name, gap in zip(features, gaps, strict=True)}
        protocol = (
            f"DCI and MIG of {subjects.feature} on {known.title}; factors {', '.join(known.names)}; {num_train} images "
            f"for the regressors (lasso, random forest of {TREES} trees), {len(factors) - num_train} others for R²"
        )
        return Measured(protocol, rows, decimals=3)
