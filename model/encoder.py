"""Base class of the image encoders, and biases by which an encoder depends on the timestep."""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn

TIME_DIM, TIME_SCALE = 64, 16.0  # width of a time embedding; standard deviation of its frequencies


class TimeBiases(nn.Module):
    """Biases of an encoder's blocks that depend on the timestep, through its noise level sigma.

    Gaussian Fourier features of log sigma (Tancik et al. 2020) are the input of an MLP, and a linear layer per block
    maps the result to the bias (Abstreiter et al. 2021, arXiv 2105.14257).

    Args:
        log_sigmas: (T,) logarithms of the noise levels.
        channels: number of channels of each bias.
    """

    log_sigmas: Tensor
    frequencies: Tensor

    def __init__(self, log_sigmas: Tensor, channels: Iterable[int]) -> None:
        super().__init__()
        self.register_buffer("log_sigmas", log_sigmas.float())
        self.register_buffer("frequencies", TIME_SCALE * torch.randn(TIME_DIM))  # fixed, and kept in the state dict
        self.mlp = nn.Sequential(nn.Linear(2 * TIME_DIM, TIME_DIM), nn.SiLU(), nn.Linear(TIME_DIM, TIME_DIM), nn.SiLU())
        self.biases = nn.ModuleList(nn.Linear(TIME_DIM, width) for width in channels)

    def forward(self, timesteps: Tensor) -> list[Tensor]:
        """Returns the bias (N, C, 1, 1) of each block at timesteps (N,).

        Timesteps may be fractions from 0 to T - 1. In that case, log sigma is interpolated linearly, and the biases are
        differentiable functions of the timesteps.
        """
        phases = 2 * math.pi * self._log_sigmas_at(timesteps)[:, None] * self.frequencies  # (N, TIME_DIM)
        embedding = self.mlp(torch.cat([phases.sin(), phases.cos()], dim=1))
        return [bias(embedding)[:, :, None, None] for bias in self.biases]

    @property
    def num_timesteps(self) -> int:
        """Number T of timesteps."""
        return len(self.log_sigmas)

    def _log_sigmas_at(self, timesteps: Tensor) -> Tensor:
        if not timesteps.is_floating_point():
            return self.log_sigmas[timesteps]
        below = timesteps.detach().long()
        above = (below + 1).clamp(max=self.num_timesteps - 1)
        return torch.lerp(self.log_sigmas[below], self.log_sigmas[above], (timesteps - below).to(self.log_sigmas))


class Encoder(nn.Module):
    """Base class of the encoders. SODA, the evaluation and the exports use only these attributes and methods.

    The parameters of an encoder are trained with `optimizer.encoder_lr`. ENCODERS in build.py maps a name to the class.
    The class is called with the keys of the config's `encoder` section that describe layers, with `log_sigmas`
    (`add_head`) in place of `time_dependent`, and with `ray_octaves`. A subclass sets up its layers, calls `add_head`,
    and defines `feature_map`, which runs its blocks by `through`.

    Images have 3 channels, or 9 if their pixels have rays (model/rays.py).

    `feature_map`, `pooled`, `forward` and `features` take timesteps (N,) or (1,), those of the decoder's input. A
    time-dependent encoder needs them, and all other encoders ignore them. They may be fractions from 0 to T - 1. No
    noise of these timesteps is added to the encoder's images.

    Attributes:
        latent_dim: width of z.
        pooled_dim: width of the features before the layer that computes z.
        fc: the layer that computes z.
        is_probabilistic: True if `fc` computes the mean and the log-variance of a normal distribution of z.
        time: biases of the blocks; None: the encoder does not depend on the timestep.
    """

    latent_dim: int
    pooled_dim: int
    is_probabilistic: bool
    fc: nn.Linear
    time: TimeBiases | None

    def add_head(
        self,
        pooled_dim: int,
        latent_dim: int,
        is_probabilistic: bool,
        block_inputs: Iterable[int],
        log_sigmas: Tensor | None,
    ) -> None:
        """Adds the layer that computes z from the pooled features, and the biases of the blocks.

        Args:
            pooled_dim: number of channels of the feature map, which are the pooled features.
            latent_dim: width of z.
            is_probabilistic: True if the layer computes the mean and the log-variance of z.
            block_inputs: number of input channels of each block that `through` runs.
            log_sigmas: (T,) logarithm of the noise level of each timestep; None: there are no biases.
        """
        self.pooled_dim, self.latent_dim, self.is_probabilistic = pooled_dim, latent_dim, is_probabilistic
        self.fc = nn.Linear(pooled_dim, 2 * latent_dim if is_probabilistic else latent_dim)
        self.time = None if log_sigmas is None else TimeBiases(log_sigmas, block_inputs)

    @property
    def is_time_dependent(self) -> bool:
        """True if z depends on the timestep."""
        return self.time is not None

    def through(self, h: Tensor, groups: Sequence[nn.Sequential], timesteps: Tensor | None) -> Tensor:
        """Returns the output of all blocks for h (N, C, H, W). A time-dependent bias is added to each block's input."""
        if self.time is None:
            for group in groups:
                h = group(h)
            return h
        if timesteps is None:
            raise ValueError("a time-dependent encoder needs timesteps: pass them, or call `at` first")
        for block, bias in zip(chain(*groups), self.time(timesteps), strict=True):
            h = block(h + bias)
        return h

    def at(self, timestep: int) -> "Encoder":
        """Returns a time-dependent encoder at one timestep, as an encoder of one z. It shares the weights."""
        return EncoderAt(self, timestep)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Returns the parameters in groups, from the first layers to the last ones, which may learn at different rates.

        A sequence of blocks (`nn.Sequential`) begins a new group, and so does `fc`. Other modules belong to the group
        before them. Parameters of the encoder itself, and the biases of the blocks, belong to the first group.
        """
        groups = [[*self.parameters(recurse=False), *(self.time.parameters() if self.time else ())]]
        for child in self.children():
            if child is self.time:
                continue
            if isinstance(child, nn.Sequential) or child is self.fc:
                groups.append([])
            groups[-1] += child.parameters()
        return groups

    def feature_map(self, x_source: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Returns the last feature map (N, pooled_dim, h, w) for images (N, 3, H, W)."""
        raise NotImplementedError

    def pool(self, feature_map: Tensor) -> Tensor:
        """Returns the globally averaged features before the last layer: (N, pooled_dim, h, w) -> (N, pooled_dim)."""
        return feature_map.mean(dim=(2, 3))

    def pooled(self, x_source: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Returns the features before the last layer: (N, 3, H, W) -> (N, pooled_dim)."""
        return self.pool(self.feature_map(x_source, timesteps))

    def forward(self, x_source: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Returns z, or the mean of its distribution, (N, latent_dim), for images (N, 3, H, W).

        The colours are normalised by the data set's mean and standard deviation.
        """
        return self.from_pooled(self.pooled(x_source, timesteps))[0]

    def features(self, x_source: Tensor, timesteps: Tensor | None = None) -> dict[str, Tensor]:
        """Returns {"pooled": (N, pooled_dim), "z": (N, latent_dim)} for images (N, 3, H, W), for the evaluation."""
        pooled = self.pooled(x_source, timesteps)
        return {"pooled": pooled, "z": self.from_pooled(pooled)[0]}

    def from_pooled(self, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns (mean of z, log-variance of z), (N, latent_dim) each, for pooled features (N, pooled_dim).

        A deterministic encoder has no log-variance.
        """
        found = self.fc(pooled)
        if not self.is_probabilistic:
            return found, None
        mean, log_variance = found.chunk(2, dim=1)
        return mean, log_variance


class EncoderAt(Encoder):
    """A time-dependent encoder at one timestep. Its methods ignore their timesteps."""

    timestep: Tensor

    def __init__(self, encoder: Encoder, timestep: int) -> None:
        super().__init__()
        self.encoder, self.time = encoder, None
        self.latent_dim, self.pooled_dim, self.fc = encoder.latent_dim, encoder.pooled_dim, encoder.fc
        self.is_probabilistic = encoder.is_probabilistic
        device = next(encoder.parameters()).device
        self.register_buffer("timestep", torch.tensor([timestep], device=device), persistent=False)

    def feature_map(self, x_source: Tensor, timesteps: Tensor | None = None) -> Tensor:
        return self.encoder.feature_map(x_source, self.timestep)

    def pool(self, feature_map: Tensor) -> Tensor:
        return self.encoder.pool(feature_map)


class OnEncoder(nn.Module):
    """Base class of the modules on top of an encoder, which may be frozen."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self._frozen_encoder = False

    def freeze_encoder(self) -> None:
        """Keeps the encoder without gradients and in evaluation mode, so that BatchNorm uses its running statistics."""
        self._frozen_encoder = True
        self.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Sets training or evaluation mode, except for a frozen encoder, which stays in evaluation mode."""
        super().train(mode)
        if self._frozen_encoder:
            self.encoder.eval()
        return self
