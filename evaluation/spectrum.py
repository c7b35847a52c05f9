"""Effective rank and spectrum of latents. They show a collapse: latents that fill few of their dimensions.

Both are computed on the host in float64, which not every device has. If a latent is not finite, the results are NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-7  # the epsilon of RankMe for float32


@torch.no_grad()
def effective_rank(z: Tensor) -> float:
    """Returns RankMe (Garrido et al. 2023) of latents (N, D): a number from 1 to about min(N, D).

    RankMe is the exponential of the entropy of the latent matrix's singular values, after these are divided by their
    sum. As in the paper, the latents are not centred: equal latents have rank 1.
    """
    z = z.cpu().double()
    # The singular values are the square roots of the eigenvalues of z^T z. For D = 2048 this is several times cheaper
    # than a singular value decomposition. The errors are about 1e-8 of the largest singular value, less than EPS.
    sigma = _eigenvalues(z.T @ z)[: len(z)].sqrt()
    p = F.normalize(sigma, p=1, dim=0) + EPS
    return (-p * p.log()).sum().exp().item()


@torch.no_grad()
def variance_spectrum(z: Tensor) -> Tensor:
    """Returns the eigenvalues (D,), largest first, of the covariance matrix of latents (N, D), with divisor N."""
    return _eigenvalues(torch.cov(z.cpu().double().T, correction=0).view(z.shape[1], z.shape[1]))


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Returns the eigenvalues of a symmetric positive semi-definite matrix, largest first."""
    if not matrix.isfinite().all():  # torch raises an error
        return torch.full((len(matrix),), torch.nan, dtype=matrix.dtype)
    return torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0)  # rounding makes eigenvalues of 0 negative
