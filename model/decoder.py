"""The denoising decoder: a DDPM UNet. The timestep and the latent modulate each of its residual blocks."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import (
    CrossAttention,
    Downsample,
    ResBlock,
    SelfAttention,
    Upsample,
    ZeroConv2d,
    group_norm,
    timestep_embedding,
)
from model.names import Modulation
from model.rays import COLOR_CHANNELS, ImageConv2d
from model.sizes import num_sections


class Layer(NamedTuple):
    """A residual block of the decoder, with the section of z that modulates it.

    Attributes:
        name: name of the submodule, such as `up.3`.
        resolution: height and width of the feature map in pixels.
        channels: channels of the block's output.
        section: index of the section of z.
        dims: dimensions of z that form the section.
    """

    name: str
    resolution: int
    channels: int
    section: int
    dims: slice


class Stage(nn.Module):
    """A residual block modulated by one section of the latent, followed by self- and cross-attention, if any."""

    def __init__(
        self,
        block: ResBlock,
        attention: SelfAttention | None,
        cross_attention: CrossAttention | None,
        resolution: int,
        section: int,
    ) -> None:
        super().__init__()
        self.block = block
        self.attention, self.cross_attention = attention, cross_attention
        self.resolution, self.section = resolution, section

    def forward(self, x: Tensor, time: Tensor, latents: Sequence[Tensor], tokens: Tensor | None) -> Tensor:
        """Returns (N, C_out, H, W) for x (N, C_in, H, W), time (N, time_dim), latents (N, width) of all sections."""
        h = self.block(x, time, latents[self.section])
        if self.attention is not None:
            h = self.attention(h)
        if self.cross_attention is not None:
            assert tokens is not None, "a decoder with cross-attention needs tokens"
            h = self.cross_attention(h, tokens)
        return h


class UNetDecoder(nn.Module):
    """UNet that denoises x_t, given timesteps and z (Ho et al. 2020, with the AdaGN of SODA).

    Each level has `num_res_blocks` blocks in the downward path and one more in the upward path. Each block in the
    upward path consumes one skip connection. Skip connections come from the blocks in the downward path, from the
    downsamplings and from the input convolution.

    Layer modulation (SODA, section 3): a UNet with 2m + 1 layers h_0 .. h_2m splits z into m + 1 sections. Section i
    modulates the layers h_i and h_(2m - i). This UNet has more blocks in the upward path than in the downward path, and
    the paper does not say how to pair them. Here *the section follows the skip connection*:

    - Each block in the downward path has its own section.
    - A block in the upward path uses the section of the block whose skip connection it consumes. For the skip
      connection of a downsampling, it uses the section of the last block before the downsampling. For the skip
      connection of the input convolution, it uses the section of the first block.
    - The two blocks in the middle share the last section.

    Args:
        image_size: height and width of the images in pixels; divisible by 2 ** (levels - 1).
        latent_dim: width of z; at least the number of sections.
        model_channels: base number of channels, a multiple of 4.
        channel_mult: one factor per level; a level has `model_channels` times this number of channels.
        num_res_blocks: residual blocks per level in the downward path.
        attn_resolutions: feature-map sizes in pixels with self-attention. The middle always has self-attention.
        num_head_channels: channels of an attention head; None means one head.
        dropout: dropout probability inside the residual blocks.
        scale_offset: constant that AdaGN adds to its linear scales.
        modulation: `sectioned`: each section of z modulates its own blocks, as described above; `shared`: z is one
            section, and it modulates every block.
        rescale_residual: if True, the sum of each residual connection is divided by sqrt(2).
        ray_octaves: octaves of the encoding of the target's rays (model/rays.py); None: images have no rays.
        token_dim: width of the tokens for cross-attention, which follows each self-attention; None: there is none.

    Attributes:
        section_dims: widths of the sections of z, first to last. The widths differ by at most 1.

    Raises:
        ValueError: `latent_dim` is smaller than the number of sections.
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
        ray_octaves: int | None = None,
        token_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.model_channels, self.token_dim = model_channels, token_dim
        time_dim = 4 * model_channels
        count = num_sections(modulation, len(channel_mult), num_res_blocks)
        if latent_dim < count:
            raise ValueError(f"latent_dim is {latent_dim}: set it to at least {count}, the number of sections")
        self.section_dims = [latent_dim // count + (i < latent_dim % count) for i in range(count)]

        def stage(in_channels: int, out_channels: int, resolution: int, section: int, attend: bool) -> Stage:
            section = min(section, count - 1)  # always 0 if all blocks share the latent
            block = ResBlock(
                in_channels,
                out_channels,
                time_dim,
                self.section_dims[section],
                dropout=dropout,
                scale_offset=scale_offset,
                rescale_residual=rescale_residual,
            )
            attention = cross_attention = None
            if attend:
                attention = SelfAttention(out_channels, num_head_channels, rescale_residual=rescale_residual)
            if attend and token_dim is not None:
                cross_attention = CrossAttention(
                    out_channels, token_dim, num_head_channels, rescale_residual=rescale_residual
                )
            return Stage(block, attention, cross_attention, resolution, section)

        self.time_mlp = nn.Sequential(
            nn.Linear(model_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU()
        )
        self.conv_in = ImageConv2d(model_channels, 3, padding=1, ray_octaves=ray_octaves)

        widths = [model_channels * multiple for multiple in channel_mult]
        channels, resolution, section = model_channels, image_size, 0
        skips = [(channels, section)]  # for each skip: its channels, and the section of the block that consumes it
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
        self.conv_out = ZeroConv2d(channels, COLOR_CHANNELS, 3, padding=1)

    def forward(
        self, x_t: Tensor, timesteps: Tensor, z: Tensor, rays: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """Returns the prediction, such as eps, (N, 3, H, W) for x_t, timesteps (N,) int64 and z (N, latent_dim).

        A row of zeros in `z` is the null latent: the sample is denoised unconditionally. If only one section of a row
        is zero, the layers of that section are modulated as by the null latent.

        Args:
            rays: (N, 6, H, W) rays of the target's pixels, for a decoder with `ray_octaves`.
            tokens: (N, L, token_dim), for a decoder with `token_dim`; zeros for a sample with the null latent.
        """
        time = self.time_mlp(timestep_embedding(timesteps, self.model_channels))  # (N, time_dim)
        latents = F.silu(z).split(self.section_dims, dim=1)  # (N, width) each; zeros in z stay zero

        h = self.conv_in(x_t if rays is None else torch.cat([x_t, rays], dim=1))
        skips = [h]
        for module in self.down:
            h = module(h, time, latents, tokens) if isinstance(module, Stage) else module(h)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, time, latents, tokens)
        for module in self.up:
            if isinstance(module, Stage):
                h = module(torch.cat([h, skips.pop()], dim=1), time, latents, tokens)
            else:
                h = module(h)
        return self.conv_out(F.silu(self.norm_out(h)))

    def mask(self, z: Tensor, drop_mask: Tensor) -> Tensor:
        """Returns z (..., latent_dim) with zeros in the sections for which `drop_mask` (..., sections) is True."""
        drops = drop_mask.split(1, dim=-1)
        wide = [drop.expand(*drop.shape[:-1], width) for drop, width in zip(drops, self.section_dims, strict=True)]
        return z.masked_fill(torch.cat(wide, dim=-1), 0)

    def mask_tokens(self, tokens: Tensor, drop_mask: Tensor) -> Tensor:
        """Returns tokens (N, L, token_dim) with zeros for the samples whose whole latent is dropped by `drop_mask`."""
        return tokens.masked_fill(drop_mask.all(dim=-1)[:, None, None], 0)

    def layers(self) -> Iterator[Layer]:
        """Yields the residual blocks in the order in which they run."""
        ends = list(accumulate(self.section_dims))
        for name, module in self.named_modules():
            if isinstance(module, Stage):
                channels, section = module.block.conv1.out_channels, module.section
                dims = slice(ends[section] - self.section_dims[section], ends[section])
                yield Layer(name, module.resolution, channels, section, dims)

    def features(self, x_t: Tensor, timesteps: Tensor, z: Tensor, block: str) -> Tensor:
        """Runs the decoder and returns the output (N, C, h, w) of the block named `block` (`up.3`, `middle.0`)."""
        found: list[Tensor] = []
        handle = self.get_submodule(block).register_forward_hook(lambda *call: found.append(call[-1]))
        try:
            self(x_t, timesteps, z)
        finally:
            handle.remove()
        return found[0]
