"""A synthetic data set whose factors of variation are known: one coloured shape on a grey background."""

from collections.abc import Generator, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.images import Images, Indices, Summary
from utils.randomness import generator

FACTORS = {
    "size": (0.12, 0.3),
    "horizontal": (0.35, 0.65),
    "vertical": (0.35, 0.65),
    "hue": (0.0, 2 / 3),
    "rotation": (-45.0, 45.0),
}
"""Range of each factor: half the height of the shape and its centre as fractions of the image size, hue from red to
blue, rotation in degrees. The ranges of hue and rotation are no full circles, so that similar images have similar
factors."""

KINDS = ("rectangle", "ellipse", "triangle")  # twice as high as wide, so that a rotation by 90 degrees is visible
BACKGROUND = 0.5
SUPERSAMPLING = 4  # points per pixel along each axis
MAX_POINTS = 2**22  # points that are computed at the same time: about 200 MB


class Shapes(Images):
    """Images of shapes, which are drawn when they are read. The kind of the shape is drawn as well, but is no factor.

    Args:
        count: number of images.
        image_size: height and width in pixels.

    Attributes:
        factors: (count, 5) float32 values of FACTORS, independent and uniform in their ranges.
    """

    def __init__(self, count: int, image_size: int, seed: int) -> None:
        stated = Summary(((BACKGROUND,) * 3, (1.0,) * 3), f"shapes {seed}")
        super().__init__((count, 3, image_size, image_size), None, [], stated)
        source = generator(seed, "shapes")
        low, high = torch.tensor(list(FACTORS.values())).T
        self.factors = low + (high - low) * torch.rand(count, len(FACTORS), generator=source)
        self._kinds = torch.randint(len(KINDS), (count,), generator=source)

    def batches(self, wanted: Iterable[Indices], pin_memory: bool = False) -> Generator[Tensor, None, None]:
        for indices in wanted:
            chosen = torch.as_tensor(indices)
            pixels = draw_shapes(self.factors[chosen], self._kinds[chosen], self.shape[-1])
            yield pixels.pin_memory() if pin_memory else pixels


def draw_shapes(factors: Tensor, kinds: Tensor, image_size: int) -> Tensor:
    """Draws shapes, smoothed at their edges: (N, 3, image_size, image_size) uint8.

    Args:
        factors: (N, 5) values of FACTORS.
        kinds: (N,) indices into KINDS.
    """
    number = max(1, MAX_POINTS // (image_size * SUPERSAMPLING) ** 2)
    parts = zip(factors.split(number), kinds.split(number), strict=True)
    return torch.cat([_draw(*part, image_size) for part in parts])


def _draw(factors: Tensor, kinds: Tensor, image_size: int) -> Tensor:
    """Draws the shapes of `draw_shapes` in one batch."""
    size, horizontal, vertical, hue, rotation = factors.T[..., None, None]  # (N, 1, 1) each
    line = (torch.arange(image_size * SUPERSAMPLING) + 0.5) / (image_size * SUPERSAMPLING)
    right, down = line - horizontal, line[:, None] - vertical  # (N, 1, S) and (N, S, 1)
    cos, sin = rotation.deg2rad().cos(), rotation.deg2rad().sin()
    x, y = 2 * (cos * right + sin * down) / size, (cos * down - sin * right) / size  # (N, S, S) each
    rectangle = torch.maximum(x.abs(), y.abs()) <= 1
    ellipse = x.square() + y.square() <= 1
    triangle = (y <= 1) & (2 * x.abs() <= 1 + y)
    inside = torch.stack([rectangle, ellipse, triangle], dim=1)[torch.arange(len(kinds)), kinds]  # (N, S, S)
    mask = F.avg_pool2d(inside.float()[:, None], SUPERSAMPLING)  # (N, 1, image_size, image_size)
    colour = torch.cat([_channel(hue, shift) for shift in (0, 1 / 3, 2 / 3)], dim=1)[..., None]  # (N, 3, 1, 1)
    return ((BACKGROUND + (colour - BACKGROUND) * mask) * 255).round().byte()


def _channel(hue: Tensor, shift: float) -> Tensor:
    """Returns the value of the channel whose own hue is `shift` (red: 0) in a saturated colour of this hue."""
    distance = ((hue - shift + 0.5) % 1 - 0.5).abs()
    return (2 - 6 * distance).clamp(0, 1)
