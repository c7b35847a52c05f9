"""DCI (Eastwood & Williams, ICLR 2018) and the mutual information gap (Chen et al., NeurIPS 2018) of features."""

import warnings
from collections.abc import Callable
from statistics import fmean

import numpy as np

TREES = 10  # of the random forest
BINS = 20  # of the mutual information
MAX_ROUNDS = 10_000  # of the lasso

Array = np.ndarray
Fit = tuple[Array, float, bool]
"""Importance (D,) of each feature for one factor, R^2 on the samples that were not used, and True if it converged."""


def principal_components(features: Array, count: int) -> Array:
    """Returns the first `count` principal components of features (N, D), or all if there are fewer."""
    from sklearn.decomposition import PCA

    return np.asarray(PCA(min(count, *features.shape), svd_solver="full").fit_transform(features))


def _standardized(values: Array) -> Array:
    std = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(std > 0, std, 1)


def lasso(features: Array, factor: Array, num_train: int, seed: int) -> Fit:
    """Fits a lasso whose strength has the lowest error in 3-fold cross-validation."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LassoCV

    x, y = _standardized(features.astype(np.float64)), _standardized(factor.astype(np.float64))
    with warnings.catch_warnings():  # the weakest of the tried penalties may not converge
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LassoCV(cv=3, max_iter=MAX_ROUNDS).fit(x[:num_train], y[:num_train])
    return np.abs(fitted.coef_), float(fitted.score(x[num_train:], y[num_train:])), fitted.n_iter_ < MAX_ROUNDS


def forest(features: Array, factor: Array, num_train: int, seed: int) -> Fit:
    """Fits a random forest."""
    from sklearn.ensemble import RandomForestRegressor

    fitted = RandomForestRegressor(TREES, random_state=seed).fit(features[:num_train], factor[:num_train])
    return fitted.feature_importances_, float(fitted.score(features[num_train:], factor[num_train:])), True


REGRESSORS: dict[str, Callable[[Array, Array, int, int], Fit]] = {"lasso": lasso, "forest": forest}
"""Regressors of DCI: (features (N, D), factor (N,), num_train, seed) -> fit to the first `num_train`."""


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
