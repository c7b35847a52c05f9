"""Tests of the diffusion process against closed forms, diffusers and float64."""

import functools
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from model.diffusion import PREDICTIONS, SCHEDULES, GaussianDiffusion, squared_errors
from model.names import Prediction, Schedule

LINEAR: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
DDIM = LINEAR | {"set_alpha_to_one": True, "timestep_spacing": "trailing"}
SETTINGS = {"beta_start": 1e-4, "beta_end": 0.02, "sigma_min": 0.02, "sigma_max": 100.0}
TEN_POINTS = [0, 1, 7, 50, 249, 500, 666, 900, 998, 999]


def diffusion(schedule: Schedule = "linear", num_timesteps: int = 1000, **more: Any) -> GaussianDiffusion:
    """Returns a diffusion process with the default settings of its schedule."""
    return GaussianDiffusion(schedule=schedule, num_timesteps=num_timesteps, **(SETTINGS | more))


def closed_form(schedule: Schedule, t: int) -> float:
    """Returns alphas_cumprod at timestep `t` of 1000, from the definition of the schedule."""
    u = (t + 0.5) / 1000
    if schedule == "linear":
        return math.exp(math.fsum(math.log1p(-(1e-4 + (0.02 - 1e-4) * s / 999)) for s in range(t + 1)))
    if schedule == "cosine":
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    if schedule == "linear_alphas_cumprod":
        return 1 - u
    if schedule == "geometric":
        return 1 / (1 + math.exp(2 * (math.log(0.02) + u * math.log(5000))))
    assert schedule == "inverted_cosine", f"add a closed form of {schedule} to this function"
    return 2 / math.pi * math.acos(math.sqrt(u))  # equal to arccos(2u - 1) / pi


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_against_its_closed_form(schedule: Schedule) -> None:
    ours = diffusion(schedule)
    for t in TEN_POINTS:
        expected = closed_form(schedule, t)
        assert ours.alphas_cumprod[t].item() == pytest.approx(expected, rel=1e-6)
        assert ours.sqrt_alphas_cumprod[t].item() == pytest.approx(math.sqrt(expected), rel=1e-6)
        assert ours.sqrt_one_minus_alphas_cumprod[t].item() == pytest.approx(math.sqrt(1 - expected), rel=1e-6)
    exact = ours.alphas_cumprod
    assert exact.dtype == torch.float64 and (exact.diff() < 0).all() and 0 < exact[-1] < exact[0] < 1


def test_q_sample_against_diffusers() -> None:
    theirs = DDPMScheduler(**LINEAR)
    x_start, noise = torch.randn(2, 10, 3, 4, 4).unbind()
    timesteps = torch.tensor(TEN_POINTS)
    ours = diffusion().q_sample(x_start, timesteps, noise)
    torch.testing.assert_close(ours, theirs.add_noise(x_start, noise, timesteps), atol=2e-5, rtol=1e-5)


def denoise_somehow(x_t: Tensor, timesteps: Tensor) -> Tensor:
    """Returns a smooth function of x_t and the timesteps, in place of a network."""
    return (0.7 * x_t + timesteps[:, None, None, None] / 1000).sin()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip_denoised", [True, False])
@pytest.mark.parametrize("num_sampling_steps", [10, 100])
def test_ddim_against_diffusers(num_sampling_steps: int, clip_denoised: bool, eta: float) -> None:
    theirs = DDIMScheduler(**DDIM, clip_sample=clip_denoised)
    theirs.set_timesteps(num_sampling_steps)
    assert theirs.timesteps.tolist() == diffusion().sampling_timesteps(num_sampling_steps)

    torch.manual_seed(0)
    x_T = torch.randn(2, 3, 4, 4)
    source, generator = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    asked: list[int] = []

    def draw_noise(t: int) -> Tensor:
        asked.append(t)
        return torch.randn(2, 3, 4, 4, generator=source)

    ours = diffusion().ddim_sample(denoise_somehow, x_T, num_sampling_steps, eta, clip_denoised, draw_noise)
    assert asked == (theirs.timesteps.tolist() if eta else [])
    sample = x_T
    for t in theirs.timesteps:
        eps = denoise_somehow(sample, t.expand(2))
        sample = theirs.step(
            eps, int(t), sample, eta, use_clipped_model_output=clip_denoised, generator=generator
        ).prev_sample
    torch.testing.assert_close(ours, sample, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("num_sampling_steps", [10, 100])
def test_inversion_by_one_iteration_against_diffusers(num_sampling_steps: int) -> None:
    theirs = DDIMInverseScheduler(**DDIM, clip_sample=False)
    theirs.set_timesteps(num_sampling_steps)
    assert theirs.timesteps.tolist() == diffusion().sampling_timesteps(num_sampling_steps)[::-1]
    torch.manual_seed(0)
    x_start = torch.rand(2, 3, 4, 4) * 2 - 1
    noisier = x_start
    for t in theirs.timesteps:
        # The scheduler expects the timestep of the noisier image, together with the less noisy image.
        step = theirs.step(denoise_somehow(noisier, t.expand(2)), int(t), noisier)
        noisier = step.prev_sample
    ours = diffusion().ddim_invert(denoise_somehow, x_start, num_sampling_steps, num_iterations=1)
    torch.testing.assert_close(ours, noisier, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_iterations_invert_the_sampler(schedule: Schedule) -> None:
    ours = diffusion(schedule)
    torch.manual_seed(0)
    x_start = torch.rand(2, 3, 4, 4) * 2 - 1

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        return 0.5 * x_t * ours.sqrt_one_minus_alphas_cumprod[timesteps][:, None, None, None]

    errors = []
    for num_iterations in (1, 2, 3, 20):
        x_T = ours.ddim_invert(denoise, x_start, 25, num_iterations)
        errors.append((ours.ddim_sample(denoise, x_T, 25, clip_denoised=False) - x_start).abs().max().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 and errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("num_sampling_steps", [1, 3, 20, 300, 1000])
def test_ddim_takes_exactly_n_steps_from_the_last_timestep(num_sampling_steps: int) -> None:
    seen: list[int] = []

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        seen.append(int(timesteps[0]))
        return torch.zeros_like(x_t)

    diffusion().ddim_sample(denoise, torch.randn(1, 3, 2, 2), num_sampling_steps)
    assert len(seen) == num_sampling_steps and seen[0] == 999
    assert seen == sorted(set(seen), reverse=True) and seen[-1] >= 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_sampling_steps", [1, 7, 50])
@pytest.mark.parametrize("clip_denoised", [True, False])
def test_a_perfect_denoiser_gives_x_start_back(
    schedule: Schedule, num_sampling_steps: int, clip_denoised: bool
) -> None:
    torch.manual_seed(0)
    ours, x_start = diffusion(schedule), torch.rand(2, 3, 4, 4) * 2 - 1

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        signal = ours.sqrt_alphas_cumprod[timesteps][:, None, None, None]
        return (x_t - signal * x_start) / ours.sqrt_one_minus_alphas_cumprod[timesteps][:, None, None, None]

    sampled = ours.ddim_sample(denoise, torch.randn(2, 3, 4, 4), num_sampling_steps, clip_denoised=clip_denoised)
    torch.testing.assert_close(sampled, x_start, atol=1e-3, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [1, 2, 1000, 4000])
@pytest.mark.parametrize("clip_denoised", [True, False])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_stays_finite_at_both_ends(
    schedule: Schedule, num_timesteps: int, clip_denoised: bool, eta: float
) -> None:
    """Samples are finite if the network returns zeros, standard normal noise, or the negative of its input."""
    torch.manual_seed(0)
    beta_start = 1e-9 if schedule == "linear" else 1e-4  # 1 - 1e-9 is 1 in float32
    ours = diffusion(schedule, num_timesteps, beta_start=beta_start)
    x_T = torch.randn(2, 3, 4, 4)
    answers: list[Callable[[Tensor], Tensor]] = [torch.zeros_like, torch.randn_like, torch.neg]
    for answer in answers:
        for num_sampling_steps in {1, min(2, num_timesteps), min(50, num_timesteps)}:
            denoise = functools.partial(lambda answer, x_t, _: answer(x_t), answer)
            sampled = ours.ddim_sample(
                denoise, x_T, num_sampling_steps, eta, clip_denoised, lambda _: torch.randn(2, 3, 4, 4)
            )
            assert sampled.isfinite().all()
            assert not clip_denoised or sampled.abs().max() <= 1
    timesteps = torch.tensor([0, num_timesteps - 1])
    x_t = ours.q_sample(x_T, timesteps, torch.randn(2, 3, 4, 4))
    assert x_t.isfinite().all() and all(ours.split(x_t, t.expand(2), x_t)[0].isfinite().all() for t in timesteps)


@pytest.mark.parametrize("clip_denoised", [True, False])
@pytest.mark.parametrize("num_sampling_steps", [1, 20, 1000])
def test_ddim_with_the_geometric_schedule_is_euler_in_sigma(num_sampling_steps: int, clip_denoised: bool) -> None:
    """The sampler integrates dx = -sigma score dsigma, the flow of the variance-exploding process, by Euler steps.

    The reference runs in float64, on x_t sqrt(1 + sigma^2).
    """
    torch.manual_seed(0)
    ours, x_T = diffusion("geometric"), torch.randn(2, 3, 4, 4)
    x_t = ours.ddim_sample(denoise_somehow, x_T, num_sampling_steps, clip_denoised=clip_denoised)

    timesteps = [round(1000 * (1 - i / num_sampling_steps)) - 1 for i in range(num_sampling_steps)]
    sigmas = [0.02 * 5000 ** ((t + 0.5) / 1000) for t in timesteps] + [0.0]
    x = x_T.double() * math.sqrt(1 + sigmas[0] ** 2)
    for t, sigma, smaller in zip(timesteps, sigmas, sigmas[1:], strict=False):
        score = -denoise_somehow(x / math.sqrt(1 + sigma**2), torch.tensor([t, t])) / sigma
        if clip_denoised:
            score = ((x + sigma**2 * score).clamp(-1, 1) - x) / sigma**2
        x = x - sigma * score * (smaller - sigma)
    torch.testing.assert_close(x_t, x.float(), atol=1e-4, rtol=1e-5)


def test_eps_loss_with_the_geometric_schedule_is_weighted_score_matching() -> None:
    """The eps loss equals sigma^2 (score - gradient of log p(x | x_start))^2 of the variance-exploding process."""
    torch.manual_seed(0)
    ours, timesteps = diffusion("geometric"), torch.tensor([0, 300, 700, 999])
    x_start, noise = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64).unbind()
    sigma = (0.02 * 5000 ** ((timesteps + 0.5) / 1000)).double()[:, None, None, None]
    x = (x_start + sigma * noise).requires_grad_()
    x_t = ours.q_sample(x_start, timesteps, noise)
    torch.testing.assert_close(x_t, x.detach() / (1 + sigma**2).sqrt(), atol=1e-6, rtol=1e-6)

    prediction = denoise_somehow(x_t, timesteps)
    torch.distributions.Normal(x_start, sigma).log_prob(x).sum().backward()
    assert x.grad is not None
    expected = sigma**2 * (-prediction / sigma - x.grad).square()
    errors = squared_errors(prediction, ours.target(x_start, timesteps, noise))
    torch.testing.assert_close(errors.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("clip_denoised", [True, False])
def test_the_geometric_schedule_samples_a_known_distribution(clip_denoised: bool) -> None:
    """The exact denoiser of normally distributed pixels turns noise into pixels with their mean and deviation."""
    torch.manual_seed(0)
    ours, mean, std = diffusion("geometric"), 0.3, 0.2

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Returns E[eps | x_t], with x_t normally distributed."""
        a, s = ours.sqrt_alphas_cumprod[timesteps[0]], ours.sqrt_one_minus_alphas_cumprod[timesteps[0]]
        return s * (x_t - a * mean) / (a**2 * std**2 + s**2)

    sampled = ours.ddim_sample(denoise, torch.randn(100, 3, 16, 16), 500, clip_denoised=clip_denoised)
    assert sampled.mean().item() == pytest.approx(mean, abs=0.005)
    assert sampled.std().item() == pytest.approx(std, rel=0.02)


def test_errors_are_squared_in_float32() -> None:
    noise = torch.randn(4, 3, 2, 2)
    assert squared_errors(noise, noise).eq(0).all()
    half = squared_errors((noise + 0.5).bfloat16(), noise)
    assert half.dtype == torch.float32 and half.mean().item() == pytest.approx(0.25, rel=1e-2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_gives_image_and_noise_back(prediction: Prediction) -> None:
    """`split` inverts `target` and `q_sample`, with a different timestep for each sample.

    The batch size equals the image width, so that broadcasting over the wrong dimension raises no error.
    """
    x_start, noise = torch.randn(2, 4, 3, 4, 4).unbind()
    ours, timesteps = diffusion("cosine", prediction=prediction), torch.tensor([0, 5, 500, 900])
    x_t, target = ours.q_sample(x_start, timesteps, noise), ours.target(x_start, timesteps, noise)
    found, eps = ours.split(x_t, timesteps, target)
    torch.testing.assert_close(found, x_start, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(eps, noise, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e9])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_of_x_start(prediction: Prediction, gamma: float) -> None:
    """For any prediction, the weighted loss is min(SNR, gamma) times the squared error of the predicted x_start."""
    ours, timesteps = diffusion("linear", prediction=prediction), torch.tensor([30, 200, 500, 700])
    x_start, noise, error = torch.randn(3, 4, 3, 4, 4, dtype=torch.float64).unbind()
    x_t, target = ours.q_sample(x_start, timesteps, noise), ours.target(x_start, timesteps, noise)
    found, _ = ours.split(x_t, timesteps, target + 0.1 * error)
    snr = ours.alphas_cumprod[timesteps] / (1 - ours.alphas_cumprod[timesteps])
    expected = snr.clamp(max=gamma)[:, None, None, None] * (found - x_start).square()
    weights = ours.min_snr_weights(timesteps, gamma)[:, None, None, None]
    torch.testing.assert_close(weights * (0.1 * error).square(), expected, rtol=1e-4, atol=1e-7)


def test_v_and_the_signal_to_noise_ratio_are_those_of_diffusers() -> None:
    scheduler, ours = DDPMScheduler(**LINEAR), diffusion(prediction="v")
    x_start, noise = torch.randn(2, 4, 3, 4, 4).unbind()
    timesteps = torch.tensor([0, 30, 500, 999])
    expected = scheduler.get_velocity(x_start, noise, timesteps)
    torch.testing.assert_close(ours.target(x_start, timesteps, noise), expected, atol=1e-5, rtol=1e-4)
    snr = compute_snr(scheduler, timesteps)
    torch.testing.assert_close(ours.min_snr_weights(timesteps, 5), snr.clamp(max=5) / (snr + 1), atol=0, rtol=1e-3)


@pytest.mark.parametrize("clip_denoised", [True, False])
@pytest.mark.parametrize(("prediction", "theirs"), [("v", "v_prediction"), ("x_start", "sample")])
def test_ddim_with_other_predictions_against_diffusers(
    prediction: Prediction, theirs: str, clip_denoised: bool
) -> None:
    scheduler = DDIMScheduler(**DDIM, clip_sample=clip_denoised, prediction_type=theirs)
    scheduler.set_timesteps(20)
    torch.manual_seed(0)
    sample = x_T = torch.randn(2, 3, 4, 4)
    for t in scheduler.timesteps:
        output = denoise_somehow(sample, t.expand(2))
        sample = scheduler.step(output, int(t), sample, use_clipped_model_output=clip_denoised).prev_sample
    ours = diffusion(prediction=prediction).ddim_sample(denoise_somehow, x_T, 20, clip_denoised=clip_denoised)
    torch.testing.assert_close(ours, sample, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sampler_and_inversion_do_not_depend_on_the_prediction(prediction: Prediction) -> None:
    """A network that predicts eps, and one that predicts the equivalent v or x_start, give equal images and noise.

    diffusers' DDIMInverseScheduler is no oracle for v and x_start: it converts them at the less noisy timestep.
    """
    plain, other = diffusion("cosine"), diffusion("cosine", prediction=prediction)

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        x_start, eps = plain.split(x_t, timesteps, 0.3 * denoise_somehow(x_t, timesteps))
        return other.target(x_start, timesteps, eps)

    torch.manual_seed(0)
    image = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1
    x_T = plain.ddim_invert(lambda x_t, t: 0.3 * denoise_somehow(x_t, t), image, 10)
    torch.testing.assert_close(other.ddim_invert(denoise, image, 10), x_T, atol=1e-3, rtol=1e-3)
    decoded = plain.ddim_sample(lambda x_t, t: 0.3 * denoise_somehow(x_t, t), x_T, 10, clip_denoised=False)
    torch.testing.assert_close(other.ddim_sample(denoise, x_T, 10, clip_denoised=False), decoded, atol=1e-3, rtol=1e-3)


def test_every_name_has_a_definition() -> None:
    assert list(SCHEDULES) == list(get_args(Schedule)) and list(PREDICTIONS) == list(get_args(Prediction))
