"""A diffusion model of z, after the "latent DDPM" of Diffusion Autoencoders (Preechakul et al., CVPR 2022, section 5).

Theirs has 10 layers of 2048 units, predicts the noise of standardised latents, and has a constant noise schedule. This
one is fitted in minutes on one core. It predicts v for whitened principal components, with the cosine schedule.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from ema_pytorch import EMA
from torch import Tensor, nn

from model.blocks import timestep_embedding
from model.diffusion import GaussianDiffusion, squared_errors
from model.names import Prediction
from utils.distributed.processes import rank
from utils.files import replacing, writing_to
from utils.logging import progress
from utils.randomness import derive_seed, generator
from utils.run_folder.checkpoint_writer import write_file

WIDTH, NUM_LAYERS, TIME_DIM = 256, 3, 64
BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 256, 1e-3, 0.998
PREDICTION: Prediction = "v"  # the first steps of DDIM would divide an error of predicted noise by almost 0
NUM_TIMESTEPS, NUM_SAMPLING_STEPS = 1000, 100
MODELLED = 0.99  # fraction of the variance of z in the components that the network draws; the others are Gaussian
SAVE_EVERY = 200  # steps
CHUNK = 8192  # latents that are converted to float64 at the same time

logger = logging.getLogger(__name__)


class LatentDenoiser(nn.Module):
    """MLP that predicts v of whitened latents. The latents are also an input of each layer after the first.

    Layer i computes h_i = SiLU(LayerNorm(W_i [h_(i-1), x_t]) * (1 + V_i s)), s an embedding of the timestep. The output
    is W [h, x_t] + (V h) * x_t. The product lets the network scale x_t by a factor that depends on x_t and on the
    timestep. W and V of the output start at 0, so that the untrained network predicts v = 0. This is exact for whitened
    Gaussian latents, whose v and x_t are uncorrelated. Training learns the difference from a Gaussian.
    """

    def __init__(self, num_components: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(TIME_DIM, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        sizes = [num_components, *[width + num_components] * (num_layers - 1)]
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in sizes)
        self.scales = nn.ModuleList(nn.Linear(width, width) for _ in sizes)
        self.out, self.gate = nn.Linear(width + num_components, num_components), nn.Linear(width, num_components)
        for part in (self.out, self.gate):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """Maps noisy latents (N, K, 1, 1) and timesteps (N,) to the prediction (N, K, 1, 1)."""
        x = x_t.flatten(1)
        embedded = self.time(timestep_embedding(timesteps, TIME_DIM))
        h = x
        for i, (layer, norm, scale) in enumerate(zip(self.layers, self.norms, self.scales, strict=True)):
            h = norm(layer(h if i == 0 else torch.cat([h, x], dim=1))) * (1 + scale(embedded))
            h = nn.functional.silu(h)
        return (self.out(torch.cat([h, x], dim=1)) + self.gate(h) * x)[..., None, None]


def latent_diffusion(device: torch.device) -> GaussianDiffusion:
    """Returns the diffusion of latents, which are handled as images (N, K, 1, 1)."""
    return GaussianDiffusion(schedule="cosine", num_timesteps=NUM_TIMESTEPS, prediction=PREDICTION, device=device)


class Whitening:
    """Principal components of latents, each divided by its standard deviation, largest variance first.

    Attributes:
        mean: (D,) mean of the latents.
        axes: (D, D) rows: unit direction of each component, times its standard deviation.
        num_modelled: smallest number K of first components that hold at least the fraction MODELLED of the variance.
    """

    def __init__(self, mean: Tensor, axes: Tensor) -> None:
        """Raises ValueError if the shapes do not fit, or if a value is not finite."""
        if axes.shape != (len(mean), len(mean)) or not (mean.isfinite().all() and axes.isfinite().all()):
            raise ValueError("not the mean and the axes of latents")
        self.mean, self.axes = mean, axes
        variances = axes.cpu().double().square().sum(dim=1)  # on the host, so that K is the same for any device
        self.num_modelled = int((variances.cumsum(0) < MODELLED * variances.sum()).sum()) + 1
        self._variances = variances.float().to(axes.device)

    @classmethod
    def of(cls, latents: Tensor) -> "Whitening":
        """Returns the whitening of latents (N, D), computed on the host, because not every device has float64.

        Standard deviations are at least 1e-6 of the largest one.
        """
        parts = latents.cpu().split(CHUNK)
        mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(latents)
        squares = [centered.T @ centered for centered in (part.double() - mean for part in parts)]
        values, vectors = torch.linalg.eigh(torch.stack(squares).sum(dim=0) / len(latents))
        values, vectors = values.flip(0), vectors.flip(1)
        axes = values.clamp(min=1e-12 * float(values[0]) + 1e-24).sqrt()[:, None] * vectors.T
        return cls(mean.float().to(latents.device), axes.float().to(latents.device))

    def apply(self, latents: Tensor) -> Tensor:
        """Returns the first K components (N, K) of latents (N, D)."""
        kept = self.num_modelled
        return (latents - self.mean) @ (self.axes[:kept] / self._variances[:kept, None]).T

    def undo(self, components: Tensor) -> Tensor:
        """Returns the latents (N, D) that have all these D components."""
        return components @ self.axes + self.mean


class Fit:
    """A diffusion prior that is being fitted, or has been fitted.

    Attributes:
        owner: what the prior belongs to: {"digest": SHA-256 of the checkpoint, "data": digest of the training images}.
        step: number of optimiser steps that have been taken.
        device: device of the fit.

    Call `run` or `load` before `draw` and `save`: the latents determine the size of the network.
    """

    def __init__(self, owner: dict[str, str], seed: int, device: torch.device) -> None:
        self.owner, self.step, self._seed, self.device = owner, 0, seed, device
        self._diffusion = latent_diffusion(device)

    def _begin(self, whitening: Whitening) -> None:
        """Makes the network for the components of `whitening`, its average and its optimiser."""
        self._whitening = whitening
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self._seed, "prior weights"))
            self._net = LatentDenoiser(whitening.num_modelled, WIDTH, NUM_LAYERS).to(self.device)
        self._ema = EMA(
            self._net, beta=EMA_DECAY, update_after_step=0, update_every=1, include_online_model=False, use_foreach=True
        )
        self._ema.ema_model.eval()
        self._optimizer = torch.optim.AdamW(self._net.parameters(), lr=LEARNING_RATE)

    def run(self, latents: Tensor, num_steps: int, path: Path | None = None) -> None:
        """Trains on latents (N, D) until step `num_steps`.

        Each rank computes the same. Rank 0 writes the file `path` every SAVE_EVERY steps and at the end.
        """
        latents = latents.to(self.device)
        if self.step == 0:
            self._begin(Whitening.of(latents))
        elif self.step < num_steps:
            logger.info("resuming the fit of the prior at step %d of %d", self.step, num_steps)
        else:
            logger.info("the prior has been fitted for %d steps: a larger --steps continues the fit", self.step)
        x_start = self._whitening.apply(latents)[..., None, None]
        bar = progress(max(0, num_steps - self.step), "fitting the prior", "step")
        with bar:
            while self.step < num_steps:
                self._train_step(x_start)
                self.step += 1
                bar.update(1)
                if path and rank() == 0 and (self.step % SAVE_EVERY == 0 or self.step == num_steps):
                    self.save(path)

    def _train_step(self, x_start: Tensor) -> None:
        """Takes one step of the optimiser with the loss of DDPM."""
        source = generator(self._seed, "prior", self.step)
        chosen = torch.randint(len(x_start), (BATCH_SIZE,), generator=source).to(self.device)
        timesteps = torch.randint(NUM_TIMESTEPS, (BATCH_SIZE,), generator=source).to(self.device)
        noise = torch.randn(BATCH_SIZE, *x_start.shape[1:], generator=source).to(self.device)
        x_t = self._diffusion.q_sample(x_start[chosen], timesteps, noise)
        target = self._diffusion.target(x_start[chosen], timesteps, noise)
        loss = squared_errors(self._net(x_t, timesteps), target).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._ema.update()

    def draw(self, count: int, seed: int) -> Tensor:
        """Returns `count` latents (count, D) on the device, drawn by DDIM from the averaged model."""
        source = generator(seed, "latents")
        components = torch.randn(count, len(self._whitening.mean), generator=source).to(self.device)
        kept = self._whitening.num_modelled
        x_T, net = components[:, :kept, None, None], self._ema.ema_model
        components[:, :kept] = self._diffusion.ddim_sample(net, x_T, NUM_SAMPLING_STEPS, clip_denoised=False).flatten(1)
        return self._whitening.undo(components)

    def save(self, path: Path) -> None:
        """Writes the file, completely or not at all. Raises FolderError."""
        state = {
            **self.owner,
            **{"step": self.step, "mean": self._whitening.mean.cpu(), "axes": self._whitening.axes.cpu()},
            **{"model": self._net.state_dict(), "ema": self._ema.state_dict()},
            "optimizer": self._optimizer.state_dict(),
        }
        with writing_to(path.parent), replacing(path) as partial:
            write_file(partial, state)

    def load(self, state: dict[str, Any]) -> None:
        """Sets the fit to the state of a file. Raises some exception if `state` is not that of a fit."""
        self._begin(Whitening(state["mean"].to(self.device), state["axes"].to(self.device)))
        self.step = state["step"]
        self._net.load_state_dict(state["model"])
        self._ema.load_state_dict(state["ema"])
        self._optimizer.load_state_dict(state["optimizer"])
