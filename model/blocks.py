"""Building blocks of the denoising decoder: timestep embedding, AdaGN, residual block, attention, resampling."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Returns the sinusoidal embedding of integer timesteps 0..T-1: (N,) -> (N, dim), cosines before sines.

    Pass the timesteps unscaled. The frequencies assume that neighbouring timesteps differ by 1. If the timesteps were
    scaled to [0, 1], most dimensions would be almost constant. Source: Vaswani et al. 2017, section 3.5, as used by
    DDPM.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies[None]  # (N, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Returns a GroupNorm with at most 32 groups of at least 4 channels each. `channels` is a multiple of 4."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def residual(x: Tensor, branch: Tensor, rescale: bool) -> Tensor:
    """Returns x + branch, divided by sqrt(2) if `rescale` is True.

    With the division, two uncorrelated summands of variance 1 give a sum of variance 1 (NCSN++).
    """
    h = x + branch
    return h / math.sqrt(2) if rescale else h


class ZeroConv2d(nn.Conv2d):
    """Convolution whose weight and bias start at zero.

    A residual branch that ends with this layer adds nothing at the start of training. Source: ADM.
    """

    def reset_parameters(self) -> None:
        """Sets weight and bias to zero. First draws torch's values, so that later layers keep their random numbers."""
        self.reset_as_torch()
        nn.init.zeros_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def reset_as_torch(self) -> None:
        """Draws weight and bias as torch draws those of every convolution."""
        super().reset_parameters()


class AdaGN(nn.Module):
    """AdaGN(h, t, z) = z_s * (t_s * GroupNorm(h) + t_b) + z_b (SODA, section 3).

    The timestep is applied first, then the latent. A linear layer computes the scale t_s and the shift t_b from the
    time embedding. Another linear layer computes z_s and z_b from the latent, or from one section of the latent. Both
    inputs have already passed through SiLU.

    The scales t_s and z_s are `scale_offset + linear(...)`. With an offset of 1, an untrained layer approximately keeps
    the size of the features. The reference implementation uses 0.
    """

    def __init__(self, channels: int, time_dim: int, latent_dim: int, scale_offset: float) -> None:
        super().__init__()
        self.scale_offset = scale_offset
        self.norm = group_norm(channels)
        self.time_proj = nn.Linear(time_dim, 2 * channels)
        self.latent_proj = nn.Linear(latent_dim, 2 * channels)

    def forward(self, h: Tensor, time: Tensor, latent: Tensor) -> Tensor:
        """Returns (N, C, H, W) for h (N, C, H, W), time (N, time_dim) and latent (N, latent_dim)."""
        time_scale, time_shift = self.time_proj(time)[:, :, None, None].chunk(2, dim=1)  # (N, C, 1, 1) each
        latent_scale, latent_shift = self.latent_proj(latent)[:, :, None, None].chunk(2, dim=1)
        h = (self.scale_offset + time_scale) * self.norm(h) + time_shift
        return (self.scale_offset + latent_scale) * h + latent_shift


class ResBlock(nn.Module):
    """Residual block: skip(x) + conv(dropout(silu(AdaGN(conv(silu(norm(x))), t, z)))).

    `skip` is a 1x1 convolution if the number of channels changes, and the identity otherwise. The sum is divided by
    sqrt(2) if `rescale_residual` is True.
    """

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
        self.conv2 = ZeroConv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor, latent: Tensor) -> Tensor:
        """Returns (N, C_out, H, W) for x (N, C_in, H, W), time (N, time_dim) and latent (N, latent_dim)."""
        h = self.conv1(F.silu(self.norm(x)))
        h = F.silu(self.adagn(h, time, latent))
        return residual(self.skip(x), self.conv2(self.dropout(h)), self.rescale_residual)


class SelfAttention(nn.Module):
    """Self-attention over the pixels of a feature map, with a residual connection.

    There is one head if `num_head_channels` is None, and `channels // num_head_channels` heads otherwise.
    """

    def __init__(self, channels: int, num_head_channels: int | None, *, rescale_residual: bool) -> None:
        super().__init__()
        self.rescale_residual = rescale_residual
        self.num_heads = channels // (num_head_channels or channels)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = ZeroConv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C, H, W) for x (N, C, H, W)."""
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(n, 3, self.num_heads, c // self.num_heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(dim=1)  # (N, heads, H * W, C / heads) each
        h = F.scaled_dot_product_attention(q, k, v)
        return residual(x, self.proj(h.transpose(-1, -2).reshape(n, c, height, width)), self.rescale_residual)


class CrossAttention(nn.Module):
    """Attention of the pixels of a feature map to tokens, with a residual connection. Heads as in `SelfAttention`."""

    def __init__(self, channels: int, token_dim: int, num_head_channels: int | None, *, rescale_residual: bool) -> None:
        super().__init__()
        self.rescale_residual = rescale_residual
        self.num_heads = channels // (num_head_channels or channels)
        self.norm = group_norm(channels)
        self.norm_tokens = nn.LayerNorm(token_dim)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key_value = nn.Linear(token_dim, 2 * channels)
        self.proj = ZeroConv2d(channels, channels, 1)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Returns (N, C, H, W) for x (N, C, H, W) and tokens (N, L, token_dim)."""
        n, c, height, width = x.shape
        heads = (self.num_heads, c // self.num_heads)
        q = self.query(self.norm(x)).view(n, *heads, height * width).transpose(-1, -2)  # (N, heads, H * W, C / heads)
        k, v = self.key_value(self.norm_tokens(tokens)).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)
        return residual(x, self.proj(h.transpose(-1, -2).reshape(n, c, height, width)), self.rescale_residual)


class Downsample(nn.Conv2d):
    """3x3 convolution with stride 2, to halve the resolution: (N, C, H, W) -> (N, C, H / 2, W / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Nearest-neighbour upsampling by 2, followed by a 3x3 convolution: (N, C, H, W) -> (N, C, 2 H, 2 W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C, 2 H, 2 W) for x (N, C, H, W)."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
