"""Distances between two samples of features: Fréchet distance, kernel distance, and a two-sample test."""

import numpy as np
import torch
from torch import Tensor

CHUNK = 1000  # rows of a kernel matrix that are computed at the same time
FOLDS = 5
MAX_TESTED = 1000  # rows of each sample in the two-sample test; the time of the fit grows with the square


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Returns the squared Fréchet distance of Gaussians fitted to features (N, D) and (M, D): 0 if they are equal.

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), with means m and covariances C (Dowson & Landau 1982). With the
    features of the Inception network, it is the FID (Heusel et al., NeurIPS 2017). Samples of fewer rows have a larger
    distance, so compare only distances of samples of the same size.
    """
    a, b = a.cpu().double(), b.cpu().double()
    width = a.shape[1]
    means, covariances = [x.mean(dim=0) for x in (a, b)], [torch.cov(x.T).view(width, width) for x in (a, b)]
    # The eigenvalues of C_a C_b are those of the symmetric matrix C_a^(1/2) C_b C_a^(1/2).
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return ((means[0] - means[1]).square().sum() + traces - 2 * shared).clamp(min=0).item()


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Returns the squared maximum mean discrepancy of features (N, D) and (M, D), for k(x, y) = (x . y / D + 1)^3.

    The estimate has no bias: its mean is 0 for samples of one distribution, so it may be below 0. With the features of
    the Inception network, it is the KID (Bińkowski et al., ICLR 2018). Theirs averages estimates of subsets. This one
    uses all pairs.
    """
    a, b = a.cpu().double(), b.cpu().double()  # not every device has float64

    def mean_kernel(x: Tensor, y: Tensor, same: bool) -> float:
        total = sum(_kernel(part, y).sum().item() for part in x.split(CHUNK))
        if not same:
            return total / (len(x) * len(y))
        diagonal = (x.square().sum(dim=1) / x.shape[1] + 1).pow(3).sum().item()
        return (total - diagonal) / (len(x) * (len(x) - 1))

    return mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b, False)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow(3)


def two_sample_accuracy(a: Tensor, b: Tensor, seed: int) -> float:
    """Returns in per cent how often a classifier tells rows of `a` (N, D) from rows of `b` (M, D): 50 for chance.

    This is the classifier two-sample test (Lopez-Paz & Oquab, ICLR 2017). The classifier is scikit-learn's
    support-vector machine with a Gaussian kernel and C = 1, on standardised features, with 5-fold cross-validation.
    Both samples are reduced to the same number of rows, at most MAX_TESTED.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    count = min(len(a), len(b), MAX_TESTED)
    source = np.random.default_rng(seed)
    rows = [x.cpu().double().numpy()[source.permutation(len(x))[:count]] for x in (a, b)]
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), SVC())
    scores = cross_val_score(model, np.concatenate(rows), np.repeat([0, 1], count), cv=folds)
    return 100 * float(scores.mean())
