"""Disentanglement of features with respect to known factors: DCI and the mutual information gap."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from evaluation.measures.base import Measure, Measured, Rows

if TYPE_CHECKING:
    from evaluation.measures.subjects import Subjects

NUM_TRAIN, NUM_TEST = 3000, 1000  # images that the regressors are fitted on, and that their R^2 is computed on
TREES = 10
BINS = 20  # of the mutual information

Array = np.ndarray
Fit = tuple[Array, float]
"""Importance (D,) of each feature for one factor, and R^2 on the test images."""


class Disentanglement(Measure):
    """DCI (Eastwood & Williams, ICLR 2018) and MIG (Chen et al., NeurIPS 2018) on synthetic shapes.

    The factors are those of `shapes.py`: size, position, hue and rotation, but not the kind of the shape. A regressor
    predicts each factor from the features. R[i, j] is the importance of feature i for factor j. For a lasso with
    cross-validated strength, on standardised features, it is the absolute weight. For a random forest, it is the
    decrease of the variance.

    Disentanglement: 1 minus the entropy of R[i, :] / sum_j R[i, j] with base K, the number of factors. It is averaged
    over the features, with weights sum_j R[i, j]. It is 1 if each feature is important for only one factor.
    Completeness: 1 minus the entropy of R[:, j] / sum_i R[i, j] with base D, the number of features. It is averaged
    over the factors. It is 1 if only one feature is important for each factor.
    Informativeness: R^2 on other shapes, averaged over the factors. The paper reports the error instead.
    MIG: I(factor, best feature) - I(factor, second best feature), divided by the factor's entropy, averaged over the
    factors. I is the mutual information, of values in 20 bins of equal width.

    A rotation of the features changes no distance between images, but lowers all scores except informativeness. The
    encoder has been trained on other images than the shapes. The raw pixels are replaced by their first principal
    components, as many as z has dimensions.
    """

    name = "disentanglement"
    meaning = "DCI and MIG on synthetic shapes: the extent to which each feature depends on one factor"
    cost = f"encodes {NUM_TRAIN + NUM_TEST} shapes, then fits 5 lassos and 5 random forests per encoder (minutes)"

    def measure(self, subjects: Subjects) -> Measured:
        from evaluation.shapes import FACTORS, Shapes
        from utils.distributed.collectives import map_over_ranks
        from utils.randomness import derive_seed

        config = subjects.experiment.config
        shapes = Shapes(NUM_TRAIN + NUM_TEST, config.encoder_size, config.seed)
        features = {name: each.cpu().numpy() for name, each in subjects.features(shapes).items()}
        raw = features.pop("raw pixels", None)
        if raw is not None:
            features["principal components"] = principal_components(raw, config.encoder.latent_dim)
        factors, seed = shapes.factors.numpy(), derive_seed(config.seed, "random forests") % 2**32

        tasks = [(kind, j, name) for kind in REGRESSORS for j in range(len(FACTORS)) for name in features]
        fits = dict(
            zip(
                tasks,
                map_over_ranks(lambda task: REGRESSORS[task[0]](features[task[2]], factors[:, task[1]], seed), tasks),
                strict=True,
            )
        )
        gaps = map_over_ranks(lambda name: mutual_information_gap(features[name], factors), list(features))
        rows: Rows = {}
        for kind in REGRESSORS:
            for name in features:
                found = [fits[kind, j, name] for j in range(len(FACTORS))]
                importances = np.stack([importance for importance, _ in found], axis=1)
                scores = {
                    "disentanglement": disentanglement(importances),
                    "completeness": completeness(importances),
                    "informativeness": fmean(r2 for _, r2 in found),
                    **{f"R² of {factor}": r2 for factor, (_, r2) in zip(FACTORS, found, strict=True)},
                }
                for score, value in scores.items():
                    rows.setdefault(f"{kind}, {score}", {})[name] = {"value": value}
        rows["mutual information gap"] = {name: {"value": gap} for name, gap in zip(features, gaps, strict=True)}
        protocol = (
            f"DCI and MIG of {subjects.feature} on synthetic shapes; factors {', '.join(FACTORS)}; {NUM_TRAIN} shapes "
            f"for the regressors (lasso, random forest of {TREES} trees), {NUM_TEST} others for R²"
        )
        return Measured(protocol, rows, decimals=3)


def principal_components(features: Array, count: int) -> Array:
    """Returns the first `count` principal components of features (N, D), or all if there are fewer."""
    from sklearn.decomposition import PCA

    return np.asarray(PCA(min(count, *features.shape), svd_solver="full").fit_transform(features))


def _standardized(values: Array) -> Array:
    std = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(std > 0, std, 1)


def lasso(features: Array, factor: Array, seed: int) -> Fit:
    """Fits a lasso whose strength has the lowest error in 3-fold cross-validation."""
    from sklearn.linear_model import LassoCV

    x, y = _standardized(features.astype(np.float64)), _standardized(factor.astype(np.float64))
    fitted = LassoCV(cv=3, max_iter=10_000).fit(x[:NUM_TRAIN], y[:NUM_TRAIN])
    return np.abs(fitted.coef_), float(fitted.score(x[NUM_TRAIN:], y[NUM_TRAIN:]))


def forest(features: Array, factor: Array, seed: int) -> Fit:
    """Fits a random forest."""
    from sklearn.ensemble import RandomForestRegressor

    fitted = RandomForestRegressor(TREES, random_state=seed).fit(features[:NUM_TRAIN], factor[:NUM_TRAIN])
    return fitted.feature_importances_, float(fitted.score(features[NUM_TRAIN:], factor[NUM_TRAIN:]))


REGRESSORS: dict[str, Callable[[Array, Array, int], Fit]] = {"lasso": lasso, "forest": forest}
"""Regressors of DCI: (features (N, D), factor (N,), seed) -> fit. They are fitted on the first NUM_TRAIN images."""


def _concentration(importances: Array) -> Array:
    """Returns 1 minus the entropy of each row (n, m), scaled to the sum 1, with base m. It is 0 for a row of zeros."""
    total = importances.sum(axis=1, keepdims=True)
    width = importances.shape[1]
    shares = np.where(total > 0, importances / np.where(total > 0, total, 1), 1 / width)
    entropies = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1)
    return 1 - entropies / (np.log(width) if width > 1 else 1)


def disentanglement(importances: Array) -> float:
    """Returns the disentanglement of importances (D, K): of D features for K factors. 0 if all are 0."""
    weights = importances.sum(axis=1)
    return float((_concentration(importances) * weights).sum() / (weights.sum() or 1))


def completeness(importances: Array) -> float:
    """Returns the completeness of importances (D, K): of D features for K factors."""
    return float(_concentration(importances.T).mean())


def _binned(values: Array) -> Array:
    """Returns the bin from 0 to BINS - 1 of each value (N,). The bins divide the values' range equally."""
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low if high > low else 1)
    return np.minimum((scaled * BINS).astype(np.int64), BINS - 1)


def mutual_information_gap(features: Array, factors: Array) -> float:
    """Returns the MIG of features (N, D) for factors (N, K)."""
    from sklearn.metrics import mutual_info_score

    columns = [_binned(column) for column in features.T]
    gaps = []
    for factor in map(_binned, factors.T):
        shared = sorted([0.0, *(mutual_info_score(column, factor) for column in columns)])
        gaps.append((shared[-1] - shared[-2]) / mutual_info_score(factor, factor))
    return fmean(gaps)
