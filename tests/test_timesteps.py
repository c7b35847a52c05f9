"""Tests of the sampling of timesteps: distributions, weights, history, and equal results after a resume."""

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence

from config.errors import ConfigError
from config.schema import Diffusion, Timesteps
from experiment import timesteps
from experiment.batch import draw_batch, read_pixels
from experiment.timesteps import SAMPLERS, AdaptiveSampler, TimestepSampler, make_sampler
from model.diffusion import GaussianDiffusion
from model.names import TimestepSampling
from tests.conftest import assert_equal_states, experiment_of
from training.state import initial_state
from training.step import train_step, training_pixels
from utils.logging import PhaseTimer

CPU = torch.device("cpu")


def sampler(num_timesteps: int = 1000, **config: Any) -> Any:
    """Returns a sampler for the cosine schedule."""
    diffusion = GaussianDiffusion(schedule="cosine", num_timesteps=num_timesteps)
    return make_sampler(Timesteps(**config), diffusion, CPU)


def draw(ours: TimestepSampler, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the timesteps and weights of `count` samples."""
    return ours.draw(torch.Generator().manual_seed(0), count, slice(None))


def test_uniform_timesteps_have_no_weights() -> None:
    drawn, weights = draw(sampler(), 10_000)
    assert weights is None and drawn.min() == 0 and drawn.max() == 999
    assert abs(drawn.float().mean().item() - 499.5) < 4 * 288.7 / 100


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.5, 0.5), (1.0, 1.5)])
def test_log_snr_is_normal(mean: float, std: float) -> None:
    """The quantiles of the drawn log-SNR are those of the normal distribution."""
    ours = sampler(sampling="log_snr", log_snr_mean=mean, log_snr_std=std)
    drawn, weights = draw(ours, 200_000)
    found = ours.diffusion.alphas_cumprod[drawn].logit().numpy()
    assert weights is None
    for probability in (0.02, 0.16, 0.5, 0.84, 0.98):
        assert abs(np.quantile(found, probability) - norm.ppf(probability, mean, std)) < 0.03 * std, probability


def test_the_probability_of_a_timestep_is_that_of_its_interval() -> None:
    """The intervals, computed by hand for three log-SNRs: 4, 1 and -1."""
    log_snr = torch.tensor([4.0, 1.0, -1.0], dtype=torch.float64)
    edges = np.array([5.5, 2.5, 0.0, -2.0])
    for mean, std in ((0.0, 1.0), (2.0, 3.0), (-30.0, 1.0), (30.0, 1.0)):
        logs = [norm.logsf(edges, mean, std), norm.logcdf(edges, mean, std)]  # exact in one tail each
        upper, lower = np.diff(np.exp(logs[0])), -np.diff(np.exp(logs[1]))
        expected = upper if mean < 0 else lower
        found = timesteps.normal_probabilities(log_snr.sigmoid(), mean, std)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("mean", "std"), [(2.4, 2.4), (-40.0, 2.0), (40.0, 2.0)])
def test_the_geometric_schedule_covers_the_density_up_to_both_ends(mean: float, std: float) -> None:
    """The intervals join at log-SNRs of -2 log sigma(t / T). The log-SNR of (2.4, 2.4) is EDM's."""
    diffusion = GaussianDiffusion(**Diffusion(schedule="geometric").model_dump())
    edges = -2 * np.log(0.02 * 5000 ** (np.arange(1001) / 1000))
    tail, sign = (norm.cdf, -1) if mean > edges[-1] else (norm.sf, 1)  # the tail that is exact far from the mean
    expected = sign * np.diff(tail(edges, mean, std))
    found = timesteps.normal_probabilities(diffusion.alphas_cumprod, mean, std)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampling", get_args(TimestepSampling))
@pytest.mark.parametrize("num_timesteps", [1, 3, 150])
def test_any_number_of_timesteps_can_be_sampled(sampling: str, num_timesteps: int) -> None:
    drawn, _ = draw(sampler(num_timesteps, sampling=sampling, log_snr_std=5.0), 5000)
    assert set(drawn.tolist()) == set(range(num_timesteps))


def as_errors(losses: torch.Tensor) -> torch.Tensor:
    """Returns errors (N, 1, 1, 2) whose means are the losses (N,)."""
    return (losses[:, None] * torch.tensor([0.5, 1.5]))[:, None, None]


def with_history(losses: torch.Tensor) -> AdaptiveSampler:
    """Returns an adaptive sampler that has observed `losses`, one loss per timestep."""
    ours = sampler(len(losses), sampling="adaptive")
    ours.observe(torch.arange(len(losses)), as_errors(losses))
    ours.end_step(timesteps.RENEW_EVERY)
    return ours


def test_adaptive_timesteps_follow_the_root_mean_square_of_the_losses() -> None:
    """Nine tenths of the density are proportional to the root mean square of each bin, one tenth is uniform."""
    losses = torch.linspace(3, 1, 1000)
    drawn, _ = draw(with_history(losses), 400_000)
    found = np.bincount(drawn.numpy() // 10, minlength=100) / 400_000
    root = losses.view(100, 10).square().mean(dim=1).sqrt().numpy()
    expected = 0.9 * root / root.sum() + 0.1 / 100
    assert (np.abs(found - expected) < 5 * np.sqrt(expected / 400_000)).all()
    inside = np.bincount(drawn.numpy() % 10, minlength=10) / 400_000
    assert np.abs(inside - 0.1).max() < 5 * math.sqrt(0.1 / 400_000)


@pytest.mark.parametrize("num_timesteps", [1000, 150])
def test_weights_keep_the_objective_unbiased(num_timesteps: int) -> None:
    """Also if the bins have different sizes: 150 timesteps have bins of one and of two."""
    losses = torch.linspace(0.01, 1, num_timesteps) ** 2
    drawn, weights = draw(with_history(losses), 400_000)
    assert weights is not None
    found = (weights * losses[drawn]).mean().item()
    error = (weights * losses[drawn]).std().item() / math.sqrt(400_000)
    assert abs(found - losses.mean().item()) < 4 * error
    assert error < losses[draw(sampler(num_timesteps), 400_000)[0]].std().item() / math.sqrt(400_000), (
        "the variance must fall"
    )


def test_the_density_is_uniform_at_first_and_bins_without_losses_keep_their_value() -> None:
    ours = sampler(sampling="adaptive")
    first, weights = draw(ours, 100_000)
    assert weights is not None and weights.eq(1).all() and first.unique().numel() == 1000
    ours.observe(torch.arange(500), as_errors(torch.full((500,), 3.0)))
    ours.end_step(timesteps.RENEW_EVERY - 1)
    assert draw(ours, 10)[1].eq(1).all(), "only every RENEW_EVERY-th step renews the density"  # type: ignore[union-attr]
    ours.end_step(2 * timesteps.RENEW_EVERY)
    drawn, _ = draw(ours, 100_000)
    assert abs((drawn < 500).float().mean().item() - (0.9 * 0.75 + 0.1 * 0.5)) < 0.01


def test_extreme_losses_are_clamped_or_not_counted() -> None:
    """A mean square is at most MAX_SQUARE. NaN and inf are not counted. If all losses are 0, all weights are 1."""
    ours = sampler(100, sampling="adaptive")
    losses = torch.tensor([2.0, 1e30, math.nan, math.inf, 0.0])
    ours.observe(torch.tensor([0, 1, 2, 3, 4]), as_errors(losses))
    ours.observe(torch.tensor([0, 2, 3]), as_errors(torch.tensor([4.0, 3.0, 5.0])))
    ours.end_step(timesteps.RENEW_EVERY)
    found = ours.state_dict()["mean_squares"][:6].tolist()
    assert found == pytest.approx([10.0, timesteps.MAX_SQUARE, 9.0, 25.0, 0.0, 1.0])
    silent = with_history(torch.zeros(100))
    drawn, weights = draw(silent, 10_000)
    assert weights is not None and weights.eq(1).all() and drawn.unique().numel() == 100


ADAPTIVE = ("training.timesteps.sampling=adaptive", "decoder.dropout=0.0")


def test_a_resumed_run_has_the_density_of_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is interrupted between two renewals. All later weights are equal, bit for bit."""
    monkeypatch.setattr(timesteps, "RENEW_EVERY", 5)
    experiment = experiment_of(tmp_path, *ADAPTIVE)

    def train(state: Any, steps: int) -> Any:
        pixels = training_pixels(experiment, state.step)
        for _ in range(steps):
            train_step(experiment, state, pixels, PhaseTimer())
        return state

    whole = train(initial_state(experiment), 17)
    saved = train(initial_state(experiment), 8).state_dict()
    resumed = initial_state(experiment)
    resumed.load_state_dict(saved)
    assert_equal_states(train(resumed, 9).state_dict(), whole.state_dict())
    assert draw(whole.timestep_sampler, 100)[1].unique().numel() > 10  # type: ignore[union-attr]


def test_the_loss_of_a_step_has_the_weights_of_the_samplers_history(tmp_path: Path) -> None:
    """The weights multiply every loss term. The sampler observes the denoising losses with the weights of min-SNR."""
    terms = ("training.min_snr_gamma=0.5", "training.terms.reconstruction=0.3", "diffusion.prediction=x_start")
    latent_terms = ("training.terms.kl=3", "training.terms.l1=2", "encoder.probabilistic=true", "views.num_sources=2")
    experiment = experiment_of(tmp_path, *ADAPTIVE, *terms, *latent_terms)
    state = initial_state(experiment)
    state.timestep_sampler.load_state_dict(with_history(torch.linspace(3, 0.1, 1000)).state_dict())
    (pixels,) = read_pixels(experiment, [(0, range(64))])
    batch = draw_batch(experiment, pixels, 0, range(64), state.timestep_sampler)
    assert batch.weights is not None and batch.weights.max() > 1.5 > 0.9 > batch.weights.min()
    # The decoder predicts zeros at first, so the error is x_start.
    squares = batch.x_start.square().mean(dim=(1, 2, 3))
    alpha = experiment.diffusion.alphas_cumprod[batch.timesteps]
    denoising = (alpha / (1 - alpha)).clamp(max=0.5) * squares
    with torch.no_grad():
        given = (batch.x_start, batch.timesteps, batch.drop_mask, batch.latent_noise)
        _, means, log_variances = state.soda.train()(batch.x_source, *given)
    normal, standard = Normal(means, (log_variances / 2).exp()), Normal(torch.zeros(()), torch.ones(()))
    of_latents = 3 * kl_divergence(normal, standard).sum(dim=-1) + 2 * means.abs().sum(dim=-1)  # (N, K)
    losses = denoising + 0.3 * squares + of_latents.mean(dim=1) / (batch.x_start[0].numel() / 2)
    loss, _ = train_step(experiment, state, training_pixels(experiment, 0), PhaseTimer())
    assert loss.item() == pytest.approx((batch.weights * losses).mean().item(), rel=1e-5)
    sums, counts = state.timestep_sampler.state_dict()["sums"]
    assert counts.sum() == 64 and sums.sum() / timesteps.UNITS == pytest.approx(
        denoising.square().sum().item(), rel=1e-5
    )


@pytest.mark.parametrize(("mean", "std"), [(30.0, 0.1), (-60.0, 0.1), (17.0, 2.0)])
def test_a_log_snr_that_no_timestep_has_is_refused(mean: float, std: float) -> None:
    with pytest.raises(ConfigError, match=r"less than 1% of the density lies between .* -14.3 and 10.8: choose a mean"):
        sampler(sampling="log_snr", log_snr_mean=mean, log_snr_std=std)
    sampler(sampling="log_snr", log_snr_mean=mean, log_snr_std=20.0)


def test_every_name_has_a_sampler() -> None:
    assert list(SAMPLERS) == list(get_args(TimestepSampling))
