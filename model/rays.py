"""Input layer of encoder and decoder for images whose pixels have rays."""

import math

import torch
from torch import Tensor, nn

COLOR_CHANNELS, RAY_CHANNELS = 3, 6
PROJECTED_CHANNELS = 16  # channels of the projected colours; the paper does not give their number


class RayEmbedding(nn.Module):
    """Linear projection of the colours, beside an encoding of the rays: (N, 3 + 6, H, W) -> (N, out_channels, H, W).

    A ray is a position and a direction, six numbers x. Its encoding is x, sin(2^k pi x) and cos(2^k pi x) for each k
    from 0 to octaves - 1 (Mildenhall et al. 2020, eq. 4). Encoding rays by sines and concatenating them to projected
    colours is SODA's (section 3); the widths and the frequencies are choices of this project.

    Args:
        octaves: number of frequencies.

    Attributes:
        out_channels: number of channels of the output, 16 + 6 (2 octaves + 1).
    """

    def __init__(self, octaves: int) -> None:
        super().__init__()
        self.octaves = octaves
        self.project = nn.Conv2d(COLOR_CHANNELS, PROJECTED_CHANNELS, 1)
        self.out_channels = PROJECTED_CHANNELS + RAY_CHANNELS * (2 * octaves + 1)

    def forward(self, images: Tensor) -> Tensor:
        """Returns (N, out_channels, H, W) for colours and rays (N, 9, H, W)."""
        colors, rays = images.split([COLOR_CHANNELS, RAY_CHANNELS], dim=1)
        phases = [2**k * math.pi * rays for k in range(self.octaves)]
        return torch.cat([self.project(colors), rays, *map(torch.sin, phases), *map(torch.cos, phases)], dim=1)


def make_input_layer(ray_octaves: int | None) -> tuple[nn.Module, int]:
    """Returns (first layer of an encoder or decoder, number of its output channels).

    Args:
        ray_octaves: octaves of the encoding of rays; None: images have no rays, and the layer does nothing.
    """
    if ray_octaves is None:
        return nn.Identity(), COLOR_CHANNELS
    layer = RayEmbedding(ray_octaves)
    return layer, layer.out_channels


def input_channels(ray_octaves: int | None) -> int:
    """Returns the number of channels of the images that an encoder receives: colours and, if it has them, rays."""
    return COLOR_CHANNELS if ray_octaves is None else COLOR_CHANNELS + RAY_CHANNELS
