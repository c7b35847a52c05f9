"""Gaussian diffusion: noise schedules, forward process, prediction targets, and the DDIM sampler with its inversion.

The loss is in training/losses.py.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.names import Prediction, Schedule

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Function (x_t (N, C, H, W), timesteps (N,) int64) -> predicted eps, v or x_start (N, C, H, W)."""


# Each schedule function is called with the keys of the config's `diffusion` section, except `schedule` and
# `prediction`, and ignores the keys that it does not need. It returns alphas_cumprod, the fraction of the signal's
# variance that remains at each timestep: (num_timesteps,) float64, decreasing. In the equations, u = (t + 1/2) / T
# (`midpoints`).


def linear(num_timesteps: int, *, beta_start: float, beta_end: float, **_: float) -> Tensor:
    """Returns the cumulative product of 1 - beta_t, beta_t linear from `beta_start` to `beta_end` (Ho et al. 2020)."""
    return (1 - torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)).cumprod(0)


def cosine(num_timesteps: int, **_: float) -> Tensor:
    """Returns f(u) / f(0), f(u) = cos^2(pi/2 (u + s)/(1 + s)), s = 0.008 (Nichol & Dhariwal 2021, eq. 17)."""
    u, s = midpoints(num_timesteps), 0.008
    return (torch.cos(math.pi / 2 * (u + s) / (1 + s)) / math.cos(math.pi / 2 * s / (1 + s))) ** 2


def inverted_cosine(num_timesteps: int, **_: float) -> Tensor:
    """Returns arccos(2u - 1) / pi (SODA, section 3)."""
    return torch.arccos(2 * midpoints(num_timesteps) - 1) / math.pi


def linear_alphas_cumprod(num_timesteps: int, **_: float) -> Tensor:
    """Returns 1 - u (Chen et al. 2024, "Deconstructing Denoising Diffusion Models for SSL")."""
    return 1 - midpoints(num_timesteps)


def geometric(num_timesteps: int, *, sigma_min: float, sigma_max: float, **_: float) -> Tensor:
    """Returns 1 / (1 + sigma^2), sigma(u) = sigma_min (sigma_max / sigma_min)^u (Song & Ermon 2019, Song et al. 2021).

    This is the variance-exploding process x_start + sigma noise, divided by sqrt(1 + sigma^2). The DDIM sampler then
    takes Euler steps of that process's probability flow, with sigma as the time.
    """
    sigma = sigma_min * (sigma_max / sigma_min) ** midpoints(num_timesteps)
    return 1 / (1 + sigma**2)


def midpoints(num_timesteps: int) -> Tensor:
    """Returns u = (t + 1/2) / T for t = 0..T-1: (T,) float64. Schedules defined on (0, 1) are evaluated at these u."""
    return (torch.arange(num_timesteps, dtype=torch.float64) + 0.5) / num_timesteps


SCHEDULES: dict[Schedule, Callable[..., Tensor]] = {
    "linear": linear,
    "cosine": cosine,
    "inverted_cosine": inverted_cosine,
    "linear_alphas_cumprod": linear_alphas_cumprod,
    "geometric": geometric,
}
"""Schedule function of each value of `diffusion.schedule`."""


def log_sigmas(*, schedule: Schedule, prediction: Prediction = "eps", **settings: Any) -> Tensor:
    """Returns log sigma, sigma^2 = (1 - alphas_cumprod) / alphas_cumprod, at each timestep: (num_timesteps,) float64.

    sigma is the standard deviation of the noise relative to x_start. The arguments are those of GaussianDiffusion.
    """
    return -SCHEDULES[schedule](**settings).logit() / 2


class Target(NamedTuple):
    """Definition of a quantity that a decoder can predict.

    `a` and `s` are the square roots of alphas_cumprod and of 1 - alphas_cumprod.

    Attributes:
        make: (a, s, x_start, noise) -> the true quantity.
        split: (a, s, x_t, the predicted quantity) -> (x_start, eps), so that x_t = a x_start + s eps.
        eps_weight: SNR -> factor that turns the squared error of the quantity into the squared error of eps.
    """

    make: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    split: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    eps_weight: Callable[[Tensor], Tensor]


PREDICTIONS: dict[Prediction, Target] = {
    "eps": Target(
        lambda a, s, x_start, noise: noise,
        lambda a, s, x_t, eps: ((x_t - s * eps) / a, eps),
        torch.ones_like,
    ),
    # v = a noise - s x_start (Salimans & Ho 2022).
    "v": Target(
        lambda a, s, x_start, noise: a * noise - s * x_start,
        lambda a, s, x_t, v: (a * x_t - s * v, s * x_t + a * v),
        lambda snr: snr / (snr + 1),
    ),
    "x_start": Target(
        lambda a, s, x_start, noise: x_start,
        lambda a, s, x_t, x_start: (x_start, (x_t - a * x_start) / s),
        lambda snr: snr,
    ),
}
"""Definition of each value of `diffusion.prediction`."""


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns (prediction - target)^2, (N, C, H, W) float32. For eps, its mean is the loss of DDPM (eq. 14)."""
    return (prediction.float() - target).square()


class GaussianDiffusion:
    """Gaussian diffusion with one noise schedule, used for both training and sampling.

    The class has no parameters, and its methods accept any Denoiser. Tensors are computed in float32, even if the
    denoiser runs under autocast.

    Args:
        prediction: quantity that the denoisers predict.
        settings: keys of the schedules, such as `beta_start` and `beta_end` of the linear schedule.

    Attributes:
        alphas_cumprod: (num_timesteps,) float64, on the CPU.
        sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod: (num_timesteps,) float32, on `device`.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        num_timesteps: int,
        prediction: Prediction = "eps",
        device: torch.device | str = "cpu",
        **settings: float,
    ) -> None:
        exact = SCHEDULES[schedule](num_timesteps, **settings)
        assert exact.shape == (num_timesteps,)
        self.num_timesteps = num_timesteps
        self.alphas_cumprod = exact
        self._prediction = PREDICTIONS[prediction]
        self.sqrt_alphas_cumprod = exact.sqrt().float().to(device)
        self.sqrt_one_minus_alphas_cumprod = (1 - exact).sqrt().float().to(device)

    def q_sample(self, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Returns x_t = sqrt(alphas_cumprod_t) x_start + sqrt(1 - alphas_cumprod_t) noise (DDPM, eq. 4).

        x_start and noise (N, C, H, W), timesteps (N,) int64 -> x_t (N, C, H, W).
        """
        signal, deviation = self._roots(timesteps)
        return signal * x_start + deviation * noise

    def target(self, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Returns the quantity that the denoiser should predict for the x_t that `q_sample` makes of the arguments."""
        return self._prediction.make(*self._roots(timesteps), x_start, noise)

    def split(self, x_t: Tensor, timesteps: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the predicted (x_start, eps), both (N, C, H, W), that a prediction (N, C, H, W) means for x_t.

        They satisfy x_t = sqrt(alphas_cumprod_t) x_start + sqrt(1 - alphas_cumprod_t) eps.
        """
        return self._prediction.split(*self._roots(timesteps), x_t, prediction)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Returns the loss weights (N,) of min-SNR (Hang et al. 2023): min(SNR, gamma) times the error of x_start."""
        signal, deviation = (root.flatten() for root in self._roots(timesteps))
        snr = (signal / deviation).square()
        return (gamma / snr).clamp(max=1) * self._prediction.eps_weight(snr)

    def _roots(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at timesteps (N,), (N, 1, 1, 1) each."""
        roots = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        signal, deviation = (root[timesteps][:, None, None, None] for root in roots)
        return signal, deviation

    def sampling_timesteps(self, num_sampling_steps: int) -> list[int]:
        """Returns round(T (1 - i/n)) - 1 for i = 0..n-1: n timesteps, from T-1 down (diffusers' `trailing` spacing)."""
        steps = range(num_sampling_steps)
        return [round(self.num_timesteps * (1 - i / num_sampling_steps)) - 1 for i in steps]

    @torch.no_grad()
    def ddim_sample(
        self,
        denoise: Denoiser,
        x_T: Tensor,
        num_sampling_steps: int,
        eta: float = 0.0,
        clip_denoised: bool = True,
        draw_noise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Denoises x_T (N, C, H, W) and returns images (N, C, H, W) on the scale [-1, 1] (Song et al. 2021, eq. 12).

        Args:
            denoise: function (x_t, timesteps) -> prediction.
            num_sampling_steps: 1..T.
            eta: 0 is deterministic DDIM; 1 adds noise with the variance of DDPM.
            clip_denoised: if True, each step clips the predicted x_start to [-1, 1] and recomputes eps from it. Use
                True for random x_T. Use False to decode an x_T from `ddim_invert`.
            draw_noise: timestep -> standard normal noise (N, C, H, W). Required if eta > 0.
        """
        assert eta == 0 or draw_noise is not None
        visited = self.sampling_timesteps(num_sampling_steps)
        x_t = x_T.float()
        for t, t_next in zip(visited, [*visited[1:], None], strict=True):
            timesteps = torch.full((len(x_t),), t, device=x_t.device)
            x_start, eps = self.split(x_t, timesteps, denoise(x_t, timesteps).float())
            if clip_denoised:
                x_start = x_start.clamp(-1, 1)
                _, eps = PREDICTIONS["x_start"].split(*self._roots(timesteps), x_t, x_start)
            # In float64, because 1 - alphas_cumprod may be 0 in float32. The last step produces the image (alpha 1).
            alpha = self.alphas_cumprod[t].item()
            alpha_next = 1.0 if t_next is None else self.alphas_cumprod[t_next].item()
            variance = eta**2 * (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
            x_t = math.sqrt(alpha_next) * x_start + math.sqrt(max(0.0, 1 - alpha_next - variance)) * eps
            if draw_noise is not None and eta > 0:
                x_t = x_t + math.sqrt(variance) * draw_noise(t)
        return x_t

    @torch.no_grad()
    def ddim_invert(
        self, denoise: Denoiser, x_start: Tensor, num_sampling_steps: int, num_iterations: int = 2
    ) -> Tensor:
        """Inverts `ddim_sample` (unclipped, eta 0): returns the x_T (N, C, H, W) that it denoises to `x_start`.

        The steps of the sampler are undone one by one, from the image to the noise. Each step computes a noisier
        image x' from the image x of the step before. To find x', the step solves the fixed-point equation

            x' = sqrt(alphas_cumprod_t) clean + sqrt(1 - alphas_cumprod_t) eps(x', t)

        by iteration, starting from x' = x. Here, t is the timestep of x'. `clean` is the predicted x_start that follows
        from x and the same eps(x', t) (Song et al. 2021, eq. 13).

        One iteration is the inversion of Dhariwal & Nichol (2021, appendix F) and of diffusers' DDIMInverseScheduler. A
        second iteration doubles the cost and improves the reconstruction by 3 to 11 dB (docs/results.md). The idea of
        more iterations is from Pan et al. (2023).

        Args:
            denoise: function (x_t, timesteps) -> prediction.
            x_start: (N, C, H, W) images in [-1, 1].
            num_sampling_steps: 1..T.
            num_iterations: evaluations of `denoise` per step.
        """
        alpha, x_t = 1.0, x_start.float()
        for t in reversed(self.sampling_timesteps(num_sampling_steps)):
            timesteps, alpha_noisier = torch.full((len(x_t),), t, device=x_t.device), self.alphas_cumprod[t].item()
            noisier = x_t
            for _ in range(num_iterations):
                _, eps = self.split(noisier, timesteps, denoise(noisier, timesteps).float())
                clean = (x_t - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
                noisier = math.sqrt(alpha_noisier) * clean + math.sqrt(1 - alpha_noisier) * eps
            alpha, x_t = alpha_noisier, noisier
        return x_t
