"""The image encoder: its base class, ResNets from torchvision's blocks with any width and stem, and Wide ResNets."""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from model.names import Architecture, ResNet, Stem, WideResNet
from model.sizes import GROUP_STRIDES, STEM_STRIDES, WIDE_GROUP_STRIDES

# (type of block, number of blocks in each group, torchvision's `base_width` of a bottleneck)
ARCHITECTURES: dict[ResNet, tuple[type[BasicBlock] | type[Bottleneck], list[int], int]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], 64),
    "resnet34": (BasicBlock, [3, 4, 6, 3], 64),
    "resnet50": (Bottleneck, [3, 4, 6, 3], 64),
    "resnet101": (Bottleneck, [3, 4, 23, 3], 64),
    "resnet152": (Bottleneck, [3, 8, 36, 3], 64),
    "wide_resnet50_2": (Bottleneck, [3, 4, 6, 3], 128),
    "wide_resnet101_2": (Bottleneck, [3, 4, 23, 3], 128),
}
WIDENING: dict[WideResNet, int] = {"wide_resnet28_1": 1, "wide_resnet28_2": 2, "wide_resnet28_8": 8}
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

    The parameters of an encoder are trained with `optimizer.encoder_lr`. ENCODERS maps a name to the class. The class
    is called with the keys of the config's `encoder` section that describe layers, and with `log_sigmas` (`add_head`)
    in place of `time_dependent`. A subclass sets up its layers, calls `add_head`, and defines `pooled`.

    All methods take timesteps (N,) or (1,), those of the decoder's input. A time-dependent encoder needs them, and all
    other encoders ignore them. They may be fractions from 0 to T - 1. The images have no noise of these timesteps.

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
        groups: Sequence[nn.Sequential],
        log_sigmas: Tensor | None,
    ) -> None:
        """Adds the layer that computes z from the pooled features, and the biases of the blocks.

        Args:
            groups: groups of blocks that `through` will be called with.
            log_sigmas: (T,) logarithm of the noise level of each timestep; None: there are no biases.
        """
        self.pooled_dim, self.latent_dim, self.is_probabilistic = pooled_dim, latent_dim, is_probabilistic
        self.fc = nn.Linear(pooled_dim, 2 * latent_dim if is_probabilistic else latent_dim)
        channels = [cast(nn.Conv2d, block.conv1).in_channels for block in chain(*groups)]
        self.time = None if log_sigmas is None else TimeBiases(log_sigmas, channels)

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

    def pooled(self, x_source: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Returns the globally averaged features before the last layer: (N, 3, H, W) -> (N, pooled_dim)."""
        raise NotImplementedError

    def distribution(self, x_source: Tensor, timesteps: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns (mean of z, log-variance of z), (N, latent_dim) each. A deterministic encoder has no log-variance."""
        return self._from_pooled(self.pooled(x_source, timesteps))

    def forward(self, x_source: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Returns z, or the mean of its distribution, (N, latent_dim), for images (N, 3, H, W).

        The images are normalised by the data set's mean and standard deviation.
        """
        return self.distribution(x_source, timesteps)[0]

    def features(self, x_source: Tensor, timesteps: Tensor | None = None) -> dict[str, Tensor]:
        """Returns {"pooled": (N, pooled_dim), "z": (N, latent_dim)} for images (N, 3, H, W), for the evaluation."""
        pooled = self.pooled(x_source, timesteps)
        return {"pooled": pooled, "z": self._from_pooled(pooled)[0]}

    def _from_pooled(self, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
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

    def pooled(self, x_source: Tensor, timesteps: Tensor | None = None) -> Tensor:
        return self.encoder.pooled(x_source, self.timestep)


class ResNetEncoder(Encoder):
    """ResNet that maps x_source to z (He et al. 2016; the wide ones: Zagoruyko & Komodakis 2016).

    The state_dict keys and the initialisation are those of torchvision.

    Args:
        architecture: a key of ARCHITECTURES. The names are torchvision's.
        stem: `small` is a 3x3 convolution with stride 1 and without max-pooling, for images of about 32 px;
            `imagenet` is a 7x7 convolution with stride 2, followed by max-pooling.
        width: channels of the first group of blocks. Each following group has twice as many. Standard ResNets have 64.
            Bottleneck blocks output four times as many.
        latent_dim: width of z.
        probabilistic: True: the encoder gives a normal distribution of z.
        log_sigmas: see `Encoder.add_head`.
    """

    def __init__(
        self,
        *,
        architecture: ResNet,
        stem: Stem,
        width: int,
        latent_dim: int,
        probabilistic: bool = False,
        log_sigmas: Tensor | None = None,
    ) -> None:
        super().__init__()
        block, depths, bottleneck = ARCHITECTURES[architecture]
        stride, pool_stride = STEM_STRIDES[stem]
        if stem == "small":
            self.conv1 = nn.Conv2d(3, width, 3, stride=stride, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=stride, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=pool_stride, padding=1)
        self.bn1 = nn.BatchNorm2d(width)

        channels, groups = width, []
        for group, depth in enumerate(depths):
            planes = width * 2**group
            blocks = []
            for index in range(depth):
                stride = GROUP_STRIDES[group] if index == 0 else 1
                downsample = None
                if stride != 1 or channels != planes * block.expansion:
                    downsample = nn.Sequential(
                        nn.Conv2d(channels, planes * block.expansion, 1, stride=stride, bias=False),
                        nn.BatchNorm2d(planes * block.expansion),
                    )
                blocks.append(block(channels, planes, stride, downsample, base_width=bottleneck))
                channels = planes * block.expansion
            groups.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.add_head(channels, latent_dim, probabilistic, groups, log_sigmas)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def pooled(self, x_source: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Returns the globally averaged features before the last layer: (N, 3, H, W) -> (N, pooled_dim)."""
        h = self.maxpool(F.relu(self.bn1(self.conv1(x_source))))
        h = self.through(h, [self.layer1, self.layer2, self.layer3, self.layer4], timesteps)  # (N, pooled_dim, h, w)
        return h.mean(dim=(2, 3))


class PreActivationBlock(nn.Module):
    """Residual block x + conv2(relu(bn2(conv1(relu(bn1(x)))))) with 3x3 convolutions (He et al. 2016, v2).

    If the number of channels changes, the skip connection is a 1x1 convolution of relu(bn1(x)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        changes = in_channels != out_channels
        self.skip = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C_out, H / stride, W / stride) for x (N, C_in, H, W)."""
        h = F.relu(self.bn1(x))
        skip = x if self.skip is None else self.skip(h)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(h))))


class WideResNetEncoder(Encoder):
    """Wide ResNet of 28 layers for images of about 32 px (Zagoruyko & Komodakis 2016, WRN-28-k without dropout).

    A 3x3 convolution with 16 channels is followed by three groups of four pre-activation blocks with 16k, 32k and 64k
    channels, and by BatchNorm, ReLU and the mean over the pixels.

    Args:
        architecture: a key of WIDENING, which gives k.
        stem, width: not used. The architecture determines both.
        latent_dim: width of z.
        probabilistic: True: the encoder gives a normal distribution of z.
        log_sigmas: see `Encoder.add_head`.
    """

    def __init__(
        self,
        *,
        architecture: WideResNet,
        stem: Stem,
        width: int,
        latent_dim: int,
        probabilistic: bool = False,
        log_sigmas: Tensor | None = None,
    ) -> None:
        super().__init__()
        channels, groups = 16, []
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for group, stride in enumerate(WIDE_GROUP_STRIDES):
            planes = 16 * WIDENING[architecture] * 2**group
            blocks = [PreActivationBlock(channels, planes, stride)]
            blocks += [PreActivationBlock(planes, planes, 1) for _ in range(3)]
            groups.append(nn.Sequential(*blocks))
            channels = planes
        self.layer1, self.layer2, self.layer3 = groups
        self.bn = nn.BatchNorm2d(channels)
        self.add_head(channels, latent_dim, probabilistic, groups, log_sigmas)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def pooled(self, x_source: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Returns the globally averaged features before the last layer: (N, 3, H, W) -> (N, pooled_dim)."""
        groups = [self.layer1, self.layer2, self.layer3]
        h = self.through(self.conv1(x_source), groups, timesteps)  # (N, pooled_dim, H / 4, W / 4)
        return F.relu(self.bn(h)).mean(dim=(2, 3))


ENCODERS: dict[Architecture, type[Encoder]] = {
    **dict.fromkeys(ARCHITECTURES, ResNetEncoder),
    **dict.fromkeys(WIDENING, WideResNetEncoder),
}
"""Encoder class of each value of `encoder.architecture`."""
