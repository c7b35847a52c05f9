"""Mathematics of latents: principal components, differences of means, Gaussian mixtures and interpolation.

scikit-learn is imported in the functions that use it, because the import takes a second.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.randomness import generator

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

MAX_FIT = 50_000  # largest number of latents used in a fit; float64 copies of more would take gigabytes
RIDGE = 1e-3  # fraction of the latents' mean variance that is added to the diagonal of each Gaussian's covariance
TOLERANCE = 1e-3  # gain in log-likelihood per latent and dimension below which the fit of a mixture stops


def subset_to_fit(latents: Tensor, labels: Tensor | None, seed: int) -> tuple[Tensor, Tensor | None]:
    """Returns at most MAX_FIT of the latents (N, D) on the host, with their labels (N,). They are chosen by `seed`."""
    chosen = torch.randperm(len(latents), generator=generator(seed, "fit"))[:MAX_FIT].sort().values
    return latents.cpu()[chosen], None if labels is None else labels[chosen]


def principal_components(latents: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes the `count` principal components of latents (N, D) with the largest variance, largest first.

    Returns:
        Unit directions (count, D), and the fraction of the total variance along each (count,).
    """
    from sklearn.decomposition import PCA

    pca = PCA(count, svd_solver="covariance_eigh").fit(latents.cpu().double().numpy())
    return pca.components_, pca.explained_variance_ratio_


def mean_difference(latents: Tensor, chosen: Tensor) -> np.ndarray:
    """Returns the unit direction (D,) from the mean of the other latents to the mean of the chosen ones.

    Such a difference is also called an attribute vector (Larsen et al. 2016, arXiv 1512.09300). The weights of a linear
    classifier would be a poor direction to move in: they may be large where latents hardly vary, so that the decoder
    shows no change within the range of the latents.

    Args:
        latents: (N, D).
        chosen: (N,) bool, not all equal.
    """
    z, chosen = latents.cpu(), chosen.cpu()
    difference = z[chosen].mean(dim=0, dtype=torch.float64) - z[~chosen].mean(dim=0, dtype=torch.float64)
    return np.asarray(difference / difference.norm())


def fit_mixture(latents: Tensor, num_components: int, random_state: int) -> "GaussianMixture":
    """Returns scikit-learn's mixture of Gaussians with full covariances, fitted to latents (N, D)."""
    from sklearn.mixture import GaussianMixture

    z = latents.double().numpy()
    ridge = RIDGE * float(z.var(axis=0).mean())
    tolerance = TOLERANCE * z.shape[1]
    return GaussianMixture(num_components, tol=tolerance, reg_covar=ridge, random_state=random_state).fit(z)


def draw_from_mixture(mixture: "GaussianMixture", count: int, random_state: int) -> np.ndarray:
    """Returns `count` points (count, D) of the mixture, in random order."""
    source = np.random.default_rng(random_state)
    counts = source.multinomial(count, mixture.weights_ / mixture.weights_.sum())
    parts = [
        source.multivariate_normal(mean, covariance, number, method="cholesky")
        for mean, covariance, number in zip(mixture.means_, mixture.covariances_, counts, strict=True)
    ]
    return source.permutation(np.concatenate(parts))


def sample_mixture(
    latents: Tensor, num_components: int, num_samples: int, random_state: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fits a mixture of Gaussians to latents (N, D) and draws points from each component.

    Returns:
        Points (num_components, num_samples, D), weights of the components (num_components,), and the index of each
        latent's component (N,). Components are sorted by weight, largest first.
    """
    mixture = fit_mixture(latents, num_components, random_state)
    order = np.argsort(-mixture.weights_, kind="stable")
    source = np.random.default_rng(random_state)
    points = [
        source.multivariate_normal(mixture.means_[i], mixture.covariances_[i], num_samples, method="cholesky")
        for i in order
    ]
    return np.stack(points), mixture.weights_[order], np.argsort(order)[mixture.predict(latents.double().numpy())]


def slerp(a: Tensor, b: Tensor, share_of_b: float) -> Tensor:
    """Interpolates between two batches of x_T (N, 3, H, W), each sample on the arc from a to b (Shoemake 1985).

    `share_of_b` is 0 at a and 1 at b. If the angle between a sample of a and of b is close to 0 or pi, the
    interpolation is linear.
    """
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1)
    angle = cosine.arccos()[:, None, None, None]
    weight_a, weight_b = ((share * angle).sin() / angle.sin() for share in (1 - share_of_b, share_of_b))
    return torch.where(angle.sin() < 1e-3, a.lerp(b, share_of_b), weight_a * a + weight_b * b)
