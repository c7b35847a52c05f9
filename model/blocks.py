"""Building blocks of the denoising decoder: timestep embedding, AdaGN, residual block, attention, resampling."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of integer timesteps 0..T-1, fed raw: (N,) -> (N, dim), cosines before sines.

    Source: Vaswani et al. 2017, section 3.5, as used by DDPM. The frequencies assume positions that count in
    ones: timesteps scaled to [0, 1] would leave most dimensions constant.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies[None]  # (N, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with up to 32 groups of at least 4 channels each; `channels` is a multiple of 4."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def residual(x: Tensor, branch: Tensor, rescale: bool) -> Tensor:
    """x + branch; divided by sqrt 2 if `rescale`, so that summands of variance 1 make one of 1 (NCSN++)."""
    h = x + branch
    return h / math.sqrt(2) if rescale else h


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """Start `layer` at zero, so that the branch it ends adds nothing at first (ADM's habit)."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class AdaGN(nn.Module):
    """AdaGN(h, t, z) = z_s * (t_s * GroupNorm(h) + t_b) + z_b, time inside, latent outside (SODA, section 3).

    (t_s, t_b) and (z_s, z_b) are linear in the activated time embedding and latent, or section of the latent. The
    scales are `scale_offset + linear(...)`: with 1, an untrained layer passes features on at their own size; the
    reference implementation has 0.
    """

    def __init__(self, channels: int, time_dim: int, latent_dim: int, scale_offset: float) -> None:
        super().__init__()
        self.scale_offset = scale_offset
        self.norm = group_norm(channels)
        self.time_proj = nn.Linear(time_dim, 2 * channels)
        self.latent_proj = nn.Linear(latent_dim, 2 * channels)

    def forward(self, h: Tensor, time: Tensor, latent: Tensor) -> Tensor:
        """h (N, C, H, W), time (N, time_dim), latent (N, latent_dim) -> (N, C, H, W)."""
        time_scale, time_shift = self.time_proj(time)[:, :, None, None].chunk(2, dim=1)  # (N, C, 1, 1) each
        latent_scale, latent_shift = self.latent_proj(latent)[:, :, None, None].chunk(2, dim=1)
        h = (self.scale_offset + time_scale) * self.norm(h) + time_shift
        return (self.scale_offset + latent_scale) * h + latent_shift


class ResBlock(nn.Module):
    """x + conv(dropout(silu(AdaGN(conv(silu(norm(x))), t, z)))), with a 1x1 convolution on a skip that widens."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int,
        latent_dim: int,
        *,
        dropout: float,
        scale_offset: float,
        rescale_residual: bool,
    ) -> None:
        super().__init__()
        self.rescale_residual = rescale_residual
        self.norm = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.adagn = AdaGN(out_channels, time_dim, latent_dim, scale_offset)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor, latent: Tensor) -> Tensor:
        """x (N, C_in, H, W), time (N, time_dim), latent (N, latent_dim) -> (N, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm(x)))
        h = F.silu(self.adagn(h, time, latent))
        return residual(self.skip(x), self.conv2(self.dropout(h)), self.rescale_residual)


class SelfAttention(nn.Module):
    """Self-attention over the pixels of a feature map, added to it. One head unless `num_head_channels` is set."""

    def __init__(self, channels: int, num_head_channels: int | None, *, rescale_residual: bool) -> None:
        super().__init__()
        self.rescale_residual = rescale_residual
        self.num_heads = channels // (num_head_channels or channels)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, C, H, W)."""
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(n, 3, self.num_heads, c // self.num_heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(dim=1)  # (N, heads, H * W, C / heads) each
        h = F.scaled_dot_product_attention(q, k, v)
        return residual(x, self.proj(h.transpose(-1, -2).reshape(n, c, height, width)), self.rescale_residual)


class Downsample(nn.Conv2d):
    """Halve the resolution with a strided 3x3 convolution: (N, C, H, W) -> (N, C, H / 2, W / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Double the resolution (nearest), then a 3x3 convolution: (N, C, H, W) -> (N, C, 2 H, 2 W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
