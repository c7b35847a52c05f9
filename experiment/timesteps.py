"""Sampling of training timesteps: uniformly, by a density over log-SNR, or adaptively by the losses seen so far.

To add a way of sampling, write a subclass of TimestepSampler and add it to SAMPLERS.
"""

import math

import torch
from torch import Tensor

from config.errors import ConfigError
from config.schema import Config, Timesteps
from model.diffusion import GaussianDiffusion
from model.names import TimestepSampling
from utils.distributed.collectives import all_reduce
from utils.distributed.processes import rank

NUM_BINS = 100  # bins of neighbouring timesteps; `AdaptiveSampler` has one probability per bin
RENEW_EVERY = 100  # steps between renewals of the adaptive density
UNIFORM_SHARE = 0.1  # fraction of the adaptive density that is always uniform, so that every bin is drawn
UNITS = 2.0**24  # fixed-point units per 1.0 of a squared loss
MIN_INSIDE = 0.01  # smallest fraction of a density over log-SNR that must lie inside the schedule
MAX_SQUARE = 1e4  # largest squared loss that is counted; larger ones are counted as this


class TimestepSampler:
    """Uniform timesteps. Subclasses draw by another distribution.

    Attributes:
        diffusion: the diffusion process whose timesteps are drawn.
    """

    def __init__(self, config: Timesteps, diffusion: GaussianDiffusion, device: torch.device) -> None:
        self.diffusion, self._device = diffusion, device

    def draw(self, generator: torch.Generator, batch_size: int, here: slice) -> tuple[Tensor, Tensor | None]:
        """Returns the timesteps (N,) int64 of the samples `here` of the global batch, and their loss weights (N,).

        The draws of the whole global batch come from `generator`, which is on the host. None means that all weights
        are 1. Does not synchronise with the device.
        """
        drawn = torch.randint(self.diffusion.num_timesteps, (batch_size,), generator=generator)
        return drawn[here].to(self._device, non_blocking=True), None

    def observe(self, timesteps: Tensor, errors: Tensor) -> None:
        """Records the errors (N, C, H, W) of samples at these timesteps (N,), without the weights from `draw`."""

    def tensors(self) -> list[Tensor]:
        """Returns the tensors that `observe` changes, so that a skipped step can restore them."""
        return []

    def end_step(self, steps_done: int) -> None:
        """Collective. Call it at the end of each training step. `steps_done` includes this step."""

    def state_dict(self, alone: bool = False) -> dict[str, Tensor]:
        """Collective unless `alone`. Returns everything that the next draws depend on, the same on all ranks.

        With `alone`, losses since the last renewal are only those of this rank.
        """
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads the result of `state_dict`."""


class LogNormalSNRSampler(TimestepSampler):
    """Timesteps whose log-SNR has a normal density, so that alphas_cumprod has a logit-normal density.

    Each timestep has the probability of the interval around its log-SNR. There are no weights, because the density is
    meant to change the objective. EDM (Karras et al. 2022) draws its noise levels in this way.
    """

    def __init__(self, config: Timesteps, diffusion: GaussianDiffusion, device: torch.device) -> None:
        super().__init__(config, diffusion, device)
        probabilities = normal_probabilities(diffusion.alphas_cumprod, config.log_snr_mean, config.log_snr_std)
        if probabilities.sum() < MIN_INSIDE:
            first, last = diffusion.alphas_cumprod[[0, -1]].logit().tolist()
            raise ConfigError(
                f"with training.timesteps.log_snr_mean={config.log_snr_mean:g} and log_snr_std={config.log_snr_std:g}, "
                f"less than {MIN_INSIDE:.0%} of the density lies between the log-SNRs of the schedule, {last:.1f} and "
                f"{first:.1f}: choose a mean between them, or a larger log_snr_std"
            )
        probabilities /= probabilities.sum()  # the density outside the schedule is cut off
        self._ends = probabilities.cumsum(0).float().to(device)

    def draw(self, generator: torch.Generator, batch_size: int, here: slice) -> tuple[Tensor, Tensor | None]:
        uniforms = torch.rand(batch_size, generator=generator)[here].to(self._device, non_blocking=True)
        return torch.searchsorted(self._ends, uniforms, right=True).clamp(max=self.diffusion.num_timesteps - 1), None


def normal_probabilities(alphas_cumprod: Tensor, mean: float, std: float) -> Tensor:
    """Returns the probability of the interval around each timestep, (T,) float64, for a normal log-SNR.

    Timestep t covers the log-SNRs from the midpoint to one neighbour to the midpoint to the other. The first and last
    intervals extend equally far to both sides of their own log-SNR. The sum is below 1, because the density extends
    beyond the schedule.
    """
    log_snr = alphas_cumprod.logit()
    if len(log_snr) == 1:
        return torch.ones(1, dtype=torch.float64)
    between = (log_snr[1:] + log_snr[:-1]) / 2
    edges = torch.cat([2 * log_snr[:1] - between[:1], between, 2 * log_snr[-1:] - between[-1:]])
    edges = (edges - mean) / (std * math.sqrt(2))  # decreasing, because log-SNR falls with t
    below, above = torch.erfc(-edges), torch.erfc(edges)  # twice the probabilities of both tails
    # The difference of the smaller tails, because a difference of numbers near 2 is 0 far from the mean.
    return torch.where(edges[1:] > 0, above[1:] - above[:-1], below[:-1] - below[1:]) / 2


class AdaptiveSampler(TimestepSampler):
    """Timesteps drawn with a probability that follows the losses, with weights that keep the objective unbiased.

    The probability of a bin of timesteps is proportional to the root mean square of its losses (Nichol & Dhariwal 2021,
    section 3.3), except for a uniform share. The density is renewed every RENEW_EVERY steps from the losses since the
    last renewal, of all ranks. A bin without new losses keeps its old value.

    The losses are the samples' denoising losses. Other loss terms get the same weights, but do not change the density.

    Squared losses are summed in fixed point, because sums of integers do not depend on the order or on the number of
    ranks. So all ranks have the same density, and a resumed run has the density of an uninterrupted one.
    """

    def __init__(self, config: Timesteps, diffusion: GaussianDiffusion, device: torch.device) -> None:
        super().__init__(config, diffusion, device)
        self._real = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        bins = min(NUM_BINS, diffusion.num_timesteps)
        # Bin b holds the timesteps edges[b] to edges[b + 1] - 1.
        self._edges = (torch.arange(bins + 1) * diffusion.num_timesteps // bins).to(device)
        self._sizes = self._edges.diff()
        self._uniform = self._sizes.to(self._real) / diffusion.num_timesteps  # probability of each bin
        self._sums = torch.zeros(2, bins, dtype=torch.int64, device=device)  # squared losses, and their number
        self._mean_squares = torch.ones(bins, dtype=self._real, device=device)

    def _probabilities(self) -> Tensor:
        """Returns the probability of each bin, (bins,)."""
        wanted = self._mean_squares.clamp(min=1 / UNITS).sqrt() * self._uniform  # the sum must not be 0
        return UNIFORM_SHARE * self._uniform + (1 - UNIFORM_SHARE) * wanted / wanted.sum()

    def draw(self, generator: torch.Generator, batch_size: int, here: slice) -> tuple[Tensor, Tensor | None]:
        uniforms = torch.rand(batch_size, generator=generator)[here].to(self._device, non_blocking=True)
        probabilities = self._probabilities()
        ends = probabilities.cumsum(0)
        bins = torch.searchsorted(ends, uniforms.to(self._real), right=True).clamp(max=len(ends) - 1)
        # The position of the same uniform number inside its bin gives the timestep inside the bin.
        inside = (uniforms - (ends - probabilities)[bins]) / probabilities[bins]
        offsets = (inside.clamp(0, 1) * self._sizes[bins]).long().clamp(max=self._sizes[bins] - 1)
        weights = (self._uniform / probabilities)[bins]
        return self._edges[bins] + offsets, weights.float()

    @torch.no_grad()
    def observe(self, timesteps: Tensor, errors: Tensor) -> None:
        bins = torch.searchsorted(self._edges, timesteps, right=True) - 1
        squares = errors.mean(dim=(1, 2, 3)).to(self._real).square()
        counted = squares.isfinite()
        units = (squares.nan_to_num(posinf=0).clamp(max=MAX_SQUARE) * UNITS).round().long()
        self._sums[0].index_add_(0, bins, units * counted)
        self._sums[1].index_add_(0, bins, counted.long())

    def tensors(self) -> list[Tensor]:
        return [self._sums]

    def end_step(self, steps_done: int) -> None:
        if steps_done % RENEW_EVERY:
            return
        sums, counts = all_reduce(self._sums).to(self._real)
        self._mean_squares = torch.where(counts > 0, sums / UNITS / counts.clamp(min=1), self._mean_squares)
        self._sums.zero_()

    def state_dict(self, alone: bool = False) -> dict[str, Tensor]:
        return {"sums": self._sums if alone else all_reduce(self._sums.clone()), "mean_squares": self._mean_squares}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        # The sums in the checkpoint are those of all ranks, so one rank continues with them.
        self._sums.copy_(state["sums"] if rank() == 0 else torch.zeros_like(state["sums"]))
        self._mean_squares.copy_(state["mean_squares"])


SAMPLERS: dict[TimestepSampling, type[TimestepSampler]] = {
    "uniform": TimestepSampler,
    "log_snr": LogNormalSNRSampler,
    "adaptive": AdaptiveSampler,
}
"""Sampler of each value of `training.timesteps.sampling`."""


def check_timesteps(config: Config) -> None:
    """Raises ConfigError if the timesteps cannot be drawn as the config describes."""
    make_sampler(config.training.timesteps, GaussianDiffusion(**config.diffusion.model_dump()), torch.device("cpu"))


def make_sampler(config: Timesteps, diffusion: GaussianDiffusion, device: torch.device) -> TimestepSampler:
    """Returns the sampler that the `training.timesteps` section of the config describes."""
    return SAMPLERS[config.sampling](config, diffusion, device)
