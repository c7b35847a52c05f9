"""Tests of the effective rank and the spectrum of latents."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation.spectrum import effective_rank, variance_spectrum
from tests.conftest import experiment_of
from training import evaluating
from training.state import initial_state


def with_singular_values(sigma: list[float], count: int = 100) -> Tensor:
    """Returns latents (count, len(sigma)) whose matrix has these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(rows, len(sigma), generator=generator, dtype=torch.float64)).Q
        for rows in (count, len(sigma))
    )
    return (left * torch.tensor(sigma) @ right.T).float()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    ("sigma", "expected"),
    [
        ([1.0] * 8, 8),
        ([1.0] * 3 + [0.0] * 5, 3),
        ([1.0] + [0.0] * 7, 1),
        ([0.5, 0.25, 0.25, 0.0], 2**1.5),  # entropy (1/2) log 2 + 2 (1/4) log 4
        ([6.0, 3.0, 1.0], math.exp(-0.6 * math.log(0.6) - 0.3 * math.log(0.3) - 0.1 * math.log(0.1))),
    ],
)
def test_effective_rank_in_closed_form(sigma: list[float], expected: float, scale: float) -> None:
    """The effective rank is the exponential of the entropy of the singular values, for latents of any scale."""
    assert effective_rank(with_singular_values([scale * each for each in sigma])) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(200, 16), (16, 16), (5, 16), (1, 16), (20, 1)])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_effective_rank_is_the_formula_of_the_paper(shape: tuple[int, int], offset: float) -> None:
    """p_k = sigma_k / (sum of all sigma) + 1e-7, with numpy's singular values of the latents, which are not centred."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset
    sigma = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert effective_rank(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_a_complete_collapse_has_rank_1() -> None:
    """Latents that are all equal have effective rank 1 and no variance. So do latents that are all zero."""
    for z in (torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).expand(500, -1), torch.zeros(500, 32)):
        assert effective_rank(z) == pytest.approx(1, abs=1e-3)
        assert variance_spectrum(z).max() < 1e-12


@pytest.mark.parametrize("shape", [(200, 16), (5, 16), (1, 4), (20, 1)])
def test_the_spectrum_against_numpy(shape: tuple[int, int]) -> None:
    """The spectrum has the eigenvalues of numpy's covariance, largest first, also far from the origin."""
    rng = np.random.default_rng(0)
    z = (rng.normal(size=shape) * rng.uniform(0.01, 3, shape[1]) + 100).astype(np.float32)
    expected = np.linalg.eigvalsh(np.cov(z.astype(np.float64).T, bias=True).reshape(shape[1], shape[1]))[::-1]
    found = variance_spectrum(torch.from_numpy(z))
    assert found.dtype == torch.float64 and (found >= 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_give_nan(value: float) -> None:
    z = torch.zeros(10, 3)
    z[4, 1] = value
    assert math.isnan(effective_rank(z)) and variance_spectrum(z).isnan().all()


def test_few_of_many_images_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If there are more than MAX_LATENTS images, the seed chooses which are encoded, and their latents are the same."""
    experiment = experiment_of(tmp_path)
    soda = initial_state(experiment).soda
    every, z = evaluating.latents(experiment, soda.encoder)
    assert every.tolist() == list(range(360)) and z.shape == (360, 8)
    monkeypatch.setattr(evaluating, "MAX_LATENTS", 100)
    chosen, few = evaluating.latents(experiment, soda.encoder)
    assert len(chosen.unique()) == 100 and chosen.max() > 300 and (chosen.diff() > 0).all()
    torch.testing.assert_close(few, z[chosen])
    again, _ = evaluating.latents(experiment, soda.encoder)
    assert torch.equal(again, chosen)
