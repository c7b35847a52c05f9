"""The denoising decoder: a DDPM UNet whose every residual block is modulated by the timestep and the latent."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import (
    Downsample,
    ResBlock,
    SelfAttention,
    Upsample,
    group_norm,
    timestep_embedding,
    zero_init,
)


class Stage(nn.Module):
    """A residual block, and self-attention where the resolution asks for it."""

    def __init__(self, block: ResBlock, attention: SelfAttention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, time: Tensor, latent: Tensor) -> Tensor:
        h = self.block(x, time, latent)
        return h if self.attention is None else self.attention(h)


class UNetDecoder(nn.Module):
    """x_t, timesteps, z -> eps (Ho et al. 2020 with the AdaGN of SODA).

    Each level has `num_res_blocks` blocks going down and one more going up, where every block consumes one
    skip: those of the blocks, of the downsamplings, and of the input projection.

    Args:
        image_size: height and width of the images; divisible by 2 ** (levels - 1).
        latent_dim: width of z.
        model_channels: channels of the first level, a multiple of 4; `channel_mult` times as many at each level.
        attn_resolutions: feature-map sizes, in pixels, that get self-attention; the middle always does.
        num_head_channels: channels of an attention head; None means one head.
        dropout: probability, inside the residual blocks.
        scale_offset: what AdaGN adds to its linear scales.
    """

    def __init__(
        self,
        *,
        image_size: int,
        latent_dim: int,
        model_channels: int,
        channel_mult: list[int],
        num_res_blocks: int,
        attn_resolutions: list[int],
        num_head_channels: int | None,
        dropout: float,
        scale_offset: float = 1.0,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        time_dim = 4 * model_channels

        def stage(in_channels: int, out_channels: int, attend: bool) -> Stage:
            block = ResBlock(in_channels, out_channels, time_dim, latent_dim, dropout, scale_offset)
            return Stage(block, SelfAttention(out_channels, num_head_channels) if attend else None)

        self.time_mlp = nn.Sequential(
            nn.Linear(model_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU()
        )
        self.conv_in = nn.Conv2d(image_channels, model_channels, 3, padding=1)

        widths = [model_channels * multiple for multiple in channel_mult]
        channels, skip_channels, resolution = model_channels, [model_channels], image_size
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.down.append(stage(channels, width, resolution in attn_resolutions))
                channels = width
                skip_channels.append(channels)
            if level < len(widths) - 1:
                self.down.append(Downsample(channels))
                skip_channels.append(channels)
                resolution //= 2

        self.middle = nn.ModuleList([stage(channels, channels, True), stage(channels, channels, False)])

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                self.up.append(stage(channels + skip_channels.pop(), width, resolution in attn_resolutions))
                channels = width
            if level > 0:
                self.up.append(Upsample(channels))
                resolution *= 2

        self.norm_out = group_norm(channels)
        self.conv_out = zero_init(nn.Conv2d(channels, image_channels, 3, padding=1))

    def forward(self, x_t: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        """x_t (N, 3, H, W), timesteps (N,) int64, z (N, latent_dim) -> eps (N, 3, H, W).

        A row of zeros in `z` is the null latent: its sample is denoised unconditionally.
        """
        time = self.time_mlp(timestep_embedding(timesteps, self.model_channels))  # (N, time_dim)
        latent = F.silu(z)  # (N, latent_dim)

        h = self.conv_in(x_t)
        skips = [h]
        for layer in self.down:
            h = layer(h, time, latent) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, time, latent)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), time, latent) if isinstance(layer, Stage) else layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))

    def features(self, x_t: Tensor, timesteps: Tensor, z: Tensor, block: str) -> Tensor:
        """What `block`, such as `up.3` or `middle.0`, makes of the same inputs: (N, C, h, w)."""
        found: list[Tensor] = []
        handle = self.get_submodule(block).register_forward_hook(lambda *call: found.append(call[-1]))
        try:
            self(x_t, timesteps, z)
        finally:
            handle.remove()
        return found[0]
