"""The denoising decoder: a DDPM UNet whose every residual block is modulated by the timestep and the latent."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import Downsample, ResBlock, SelfAttention, Upsample, group_norm, timestep_embedding, zero_init
from model.names import Modulation
from model.sizes import num_sections

IMAGE_CHANNELS = 3


class Layer(NamedTuple):
    """A residual block of the decoder: its name, its feature map (pixels, channels), its section's number and place."""

    name: str
    resolution: int
    channels: int
    section: int
    dims: slice


class Stage(nn.Module):
    """A residual block modulated by one section of the latent, and self-attention where the resolution asks for it."""

    def __init__(self, block: ResBlock, attention: SelfAttention | None, resolution: int, section: int) -> None:
        super().__init__()
        self.block = block
        self.attention = attention
        self.resolution, self.section = resolution, section

    def forward(self, x: Tensor, time: Tensor, latents: Sequence[Tensor]) -> Tensor:
        """x (N, C_in, H, W), time (N, time_dim), a latent (N, width) for each section -> (N, C_out, H, W)."""
        h = self.block(x, time, latents[self.section])
        return h if self.attention is None else self.attention(h)


class UNetDecoder(nn.Module):
    """x_t, timesteps, z -> eps (Ho et al. 2020 with the AdaGN of SODA).

    Each level has `num_res_blocks` blocks going down and one more going up, where every block consumes one
    skip: those of the blocks, of the downsamplings, and of the input projection.

    Layer modulation (SODA, section 3): a UNet of 2m + 1 layers h_0 .. h_2m has m + 1 sections of z, section i for the
    pair h_i and h_(2m - i). The paper leaves open how layers pair up where there are more going up than down. Here
    *the section follows the skip connection*: each block going down has a section of its own; a block going up has that
    of the block whose skip it consumes, a downsampling counting as its level's last block and the input projection
    as the first block; the blocks in the middle share the last section.

    Args:
        image_size: height and width of the images; divisible by 2 ** (levels - 1).
        latent_dim: width of z; at least the number of sections.
        model_channels: channels of the first level, a multiple of 4; `channel_mult` times as many at each level.
        attn_resolutions: feature-map sizes, in pixels, that get self-attention; the middle always does.
        num_head_channels: channels of an attention head; None means one head.
        dropout: probability, inside the residual blocks.
        scale_offset: what AdaGN adds to its linear scales.
        modulation: `sectioned`, as above; `shared`: z is one section, which modulates every block.
        rescale_residual: divide the sum of each residual connection by sqrt 2.

    Attributes:
        section_dims: width of each section of z, first to last; they differ by at most 1.
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
        modulation: Modulation = "shared",
        rescale_residual: bool = False,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        time_dim = 4 * model_channels
        count = num_sections(modulation, len(channel_mult), num_res_blocks)
        if latent_dim < count:
            raise ValueError(f"{count} sections need a latent of at least as many dimensions, not {latent_dim}")
        self.section_dims = [latent_dim // count + (i < latent_dim % count) for i in range(count)]

        def stage(in_channels: int, out_channels: int, resolution: int, section: int, attend: bool) -> Stage:
            section = min(section, count - 1)  # 0, where all blocks share the latent
            block = ResBlock(
                in_channels,
                out_channels,
                time_dim,
                self.section_dims[section],
                dropout=dropout,
                scale_offset=scale_offset,
                rescale_residual=rescale_residual,
            )
            attention = None
            if attend:
                attention = SelfAttention(out_channels, num_head_channels, rescale_residual=rescale_residual)
            return Stage(block, attention, resolution, section)

        self.time_mlp = nn.Sequential(
            nn.Linear(model_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU()
        )
        self.conv_in = nn.Conv2d(IMAGE_CHANNELS, model_channels, 3, padding=1)

        widths = [model_channels * multiple for multiple in channel_mult]
        channels, resolution, section = model_channels, image_size, 0
        skips = [(channels, section)]  # of each skip, its channels and the section of the block that consumes it
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.down.append(stage(channels, width, resolution, section, resolution in attn_resolutions))
                channels = width
                skips.append((channels, section))
                section += 1
            if level < len(widths) - 1:
                self.down.append(Downsample(channels))
                skips.append((channels, section - 1))
                resolution //= 2

        self.middle = nn.ModuleList(
            [stage(channels, channels, resolution, section, attend) for attend in (True, False)]
        )

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                skip_channels, section = skips.pop()
                attend = resolution in attn_resolutions
                self.up.append(stage(channels + skip_channels, width, resolution, section, attend))
                channels = width
            if level > 0:
                self.up.append(Upsample(channels))
                resolution *= 2

        self.norm_out = group_norm(channels)
        self.conv_out = zero_init(nn.Conv2d(channels, IMAGE_CHANNELS, 3, padding=1))

    def forward(self, x_t: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        """x_t (N, 3, H, W), timesteps (N,) int64, z (N, latent_dim) -> eps (N, 3, H, W).

        A row of zeros in `z` is the null latent: its sample is denoised unconditionally. A section of zeros gives the
        layers that it modulates what the null latent gives them.
        """
        time = self.time_mlp(timestep_embedding(timesteps, self.model_channels))  # (N, time_dim)
        latents = F.silu(z).split(self.section_dims, dim=1)  # (N, width) each, 0 where z is

        h = self.conv_in(x_t)
        skips = [h]
        for layer in self.down:
            h = layer(h, time, latents) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, time, latents)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), time, latents) if isinstance(layer, Stage) else layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))

    def mask(self, z: Tensor, drop_mask: Tensor) -> Tensor:
        """z (N, latent_dim) with zeros for the sections that drop_mask (N, sections) bool marks."""
        drops = drop_mask.split(1, dim=1)
        wide = [drop.expand(-1, width) for drop, width in zip(drops, self.section_dims, strict=True)]
        return z.masked_fill(torch.cat(wide, dim=1), 0)

    def layers(self) -> Iterator[Layer]:
        """The residual blocks in the order in which they run, each with what modulates it."""
        ends = list(accumulate(self.section_dims))
        for name, module in self.named_modules():
            if isinstance(module, Stage):
                channels, section = module.block.conv1.out_channels, module.section
                dims = slice(ends[section] - self.section_dims[section], ends[section])
                yield Layer(name, module.resolution, channels, section, dims)

    def features(self, x_t: Tensor, timesteps: Tensor, z: Tensor, block: str) -> Tensor:
        """The output of `block`, such as `up.3` or `middle.0`, for the same inputs: (N, C, h, w)."""
        found: list[Tensor] = []
        handle = self.get_submodule(block).register_forward_hook(lambda *call: found.append(call[-1]))
        try:
            self(x_t, timesteps, z)
        finally:
            handle.remove()
        return found[0]
