"""First convolution of encoder and decoder, for images whose pixels may have rays."""

import math
from typing import Any

import torch
from torch import Tensor, nn

COLOR_CHANNELS, RAY_CHANNELS = 3, 6


def encode_rays(rays: Tensor, octaves: int) -> Tensor:
    """Returns the encoding (N, 6 (2 octaves + 1), H, W) of rays (N, 6, H, W), which are positions and directions.

    The encoding of the numbers x of a ray is x, sin(2^k pi x) and cos(2^k pi x) for each k from 0 to octaves - 1
    (Mildenhall et al. 2020, eq. 4).
    """
    phases = [2**k * math.pi * rays for k in range(octaves)]
    return torch.cat([rays, *map(torch.sin, phases), *map(torch.cos, phases)], dim=1)


class ImageConv2d(nn.Conv2d):
    """Convolution of images (N, 3, H, W). Images with rays are (N, 3 + 6, H, W), and their rays are encoded first.

    The result is conv(colours) + conv(encoded rays). SODA (section 3) concatenates encoded rays to linearly projected
    colours in front of the first layer. A convolution of concatenated channels is the sum of one convolution for each
    part, and a projection of the colours can be multiplied into its weights. The frequencies are choices of this
    project, because the paper's are not known.

    Args:
        out_channels, kernel_size, more: arguments of `torch.nn.Conv2d`.
        ray_octaves: octaves of the encoding of rays; None: images have no rays, and this is an ordinary convolution.

    Attributes:
        rays: the convolution of the encoded rays; None: images have no rays.
    """

    def __init__(self, out_channels: int, kernel_size: int, *, ray_octaves: int | None = None, **more: Any) -> None:
        super().__init__(COLOR_CHANNELS, out_channels, kernel_size, **more)
        self.octaves = ray_octaves or 0
        channels = RAY_CHANNELS * (2 * self.octaves + 1)
        self.rays: nn.Conv2d | None = None
        if ray_octaves is not None:
            self.rays = nn.Conv2d(channels, out_channels, kernel_size, **more | {"bias": False})

    def forward(self, images: Tensor) -> Tensor:
        """Returns (N, out_channels, H', W') for colours (N, 3, H, W), or for colours and rays (N, 9, H, W)."""
        if self.rays is None:
            return super().forward(images)
        colors, rays = images.split([COLOR_CHANNELS, RAY_CHANNELS], dim=1)
        return super().forward(colors) + self.rays(encode_rays(rays, self.octaves))

    def balance(self) -> None:
        """Scales the initial weights of the rays, so that rays and colours contribute about equally to the output.

        Colours have a mean square of 1, and sines and cosines of 1/2. The part of the output that comes from the
        colours is as large as without rays: in the decoder, it has a standard deviation of 0.57. With the usual initial
        weights of one layer for all channels, it would have 0.15.
        """
        if self.rays is None:
            return
        with torch.no_grad():
            colors, rays = self.weight[0].numel(), self.rays.weight[0].numel() / 2
            wanted, found = self.weight.square().mean() * colors, self.rays.weight.square().mean() * rays
            self.rays.weight.mul_((wanted / found).sqrt())


def input_channels(ray_octaves: int | None) -> int:
    """Returns the number of channels of the images that an encoder receives: colours and, if it has them, rays."""
    return COLOR_CHANNELS if ray_octaves is None else COLOR_CHANNELS + RAY_CHANNELS
