"""How samples are augmented: crop and flip, RandAugment, colours, affine moves; parameters drawn for a whole batch.

The distributions are those of torchvision.transforms.v2: RandomResizedCrop and RandomHorizontalFlip, RandAugment,
ColorJitter and RandomGrayscale, RandomAffine. Everything here happens on the host; datasets/operations.py does to the
pixels what is drawn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# RandAugment's operations (Cubuk et al. 2020), in the order that samples are sorted by.
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
RANDAUGMENT = ("Identity", *GEOMETRIC, *BLENDS, "Posterize", "Solarize", "AutoContrast", "Equalize")
OPERATIONS = (*RANDAUGMENT, "Hue")
JITTER = tuple(OPERATIONS.index(name) for name in ("Brightness", "Contrast", "Color", "Hue"))  # as ColorJitter's keys
NUM_BINS = 31
CROP_ATTEMPTS = 10
# (Number of columns, which of several draws) -> uniform numbers in [0, 1), (N, columns), of N samples.
Draw = Callable[..., Tensor]

IDENTITY = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def magnitudes(bin_: int, image_size: int) -> Tensor:
    """Strength of each of RANDAUGMENT at one of NUM_BINS bins: (14,), slopes, pixels, degrees, shares, bits, level."""

    def at(first: float, last: float) -> float:
        return torch.linspace(first, last, NUM_BINS)[bin_].item()  # float32, as torchvision's

    slope, pixels, degrees, blend = at(0, 0.3), int(at(0, 150 / 331 * image_size)), at(0, 30), at(0, 0.9)
    bits = 8 - round(4 * bin_ / (NUM_BINS - 1))
    level = torch.tensor(255 * at(1, 0)).ceil().item()  # what float32 makes of it; pixels are whole numbers
    return torch.tensor([0.0, slope, slope, pixels, pixels, degrees, *[blend] * len(BLENDS), bits, level, 0, 0])


@dataclass(frozen=True)
class Parameters:
    """How each of N samples is augmented.

    Matrices lead from a pixel of the output to one of the input, both counted from the centre.

    Attributes:
        boxes: (N, 5) float32: left, top, width and height of the crop in pixels, and 1 for a flip, else 0.
        operations: (N, num_ops) int64, indices into OPERATIONS, applied from left to right.
        strengths: (N, num_ops) float32, signed.
        matrices: (N, num_ops, 2, 3) float32, of the geometric operations.
        moves: (N, 2, 3) float32, of the affine move; or None.
    """

    boxes: Tensor
    operations: Tensor
    strengths: Tensor
    matrices: Tensor
    moves: Tensor | None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, samples: slice) -> "Parameters":
        parts: dict[str, Any] = {name: None if part is None else part[samples] for name, part in vars(self).items()}
        return Parameters(**parts)

    @staticmethod
    def concatenate(first: "Parameters", second: "Parameters") -> "Parameters":
        """Of the samples of both, one after the other."""
        num_ops = max(first.operations.shape[1], second.operations.shape[1])
        both = [(p, num_ops - p.operations.shape[1]) for p in (first, second)]  # filled up with Identity
        moves = [IDENTITY.expand(len(p), 2, 3) if p.moves is None else p.moves for p in (first, second)]
        return Parameters(
            torch.cat([p.boxes for p, _ in both]),
            torch.cat([F.pad(p.operations, (0, missing)) for p, missing in both]),
            torch.cat([F.pad(p.strengths, (0, missing)) for p, missing in both]),
            torch.cat([F.pad(p.matrices, (0, 0, 0, 0, 0, missing)) for p, missing in both]),
            None if first.moves is None and second.moves is None else torch.cat(moves),
        )


class Augmentation:
    """Draws Parameters by the keys of one `views.*` section of the config."""

    def __init__(self, view: Any, image_size: int) -> None:
        self._view, self._size = view, image_size
        self._magnitudes = magnitudes(view.randaugment_magnitude, image_size)

    def parameters(self, draw: Draw) -> Parameters:
        """Of N samples."""
        view, num_ops = self._view, self._view.randaugment_num_ops
        jitters = view.color_jitter_probability > 0 or view.grayscale_probability > 0
        widths = [2 * CROP_ATTEMPTS + 4, 1 + 2 * num_ops, 6]
        crop, ops, moves = draw(sum(widths)).split(widths, dim=1)
        apply = ops[:, :1] < view.randaugment_probability
        operations = (ops[:, 1 : 1 + num_ops] * len(RANDAUGMENT)).long() * apply
        signs = torch.where((ops[:, 1 + num_ops :] < 0.5) & (operations <= len(GEOMETRIC + BLENDS)), -1.0, 1.0)
        strengths = self._magnitudes[operations] * signs
        if jitters:
            more = self._colors(draw(2 + 2 * len(JITTER), " colours"))  # of their own, so that no crop changes
            operations, strengths = torch.cat([operations, more[0]], dim=1), torch.cat([strengths, more[1]], dim=1)
        matrices = operation_matrices(operations.flatten(), strengths.flatten(), self._size)
        matrices = matrices.view(*operations.shape, 2, 3)
        return Parameters(self._boxes(crop), operations, strengths, matrices, self._moves(moves))

    def _colors(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """ColorJitter's four operations in random order, then greyness: operations and strengths, (N, 5) each."""
        view, num = self._view, len(JITTER)
        apply, grey, order, strengths = uniforms.split([1, 1, num, num], dim=1)
        jitter = apply < view.color_jitter_probability
        # Factors from 1 - x, not below 0, to 1 + x, of which strengths are what exceeds 1; hue is turned by -x to x.
        reach = torch.tensor(view.color_jitter)
        low = torch.cat([-reach[:3].clamp(max=1), -reach[3:]])
        strengths = (low + (reach - low) * strengths) * jitter
        order = order.argsort(dim=1)
        is_grey = grey < view.grayscale_probability
        fade = OPERATIONS.index("Color") * is_grey  # by -1: to the luminance alone
        operations = torch.tensor(JITTER)[order] * jitter
        return torch.cat([operations, fade], dim=1), torch.cat([strengths.gather(1, order), -is_grey.float()], dim=1)

    def _boxes(self, uniforms: Tensor) -> Tensor:
        """RandomResizedCrop's boxes: the first of ten random ones that fits, else the central one of legal shape."""
        view, size = self._view, self._size
        attempts = uniforms[:, : 2 * CROP_ATTEMPTS].view(-1, CROP_ATTEMPTS, 2)
        apply, flip, where = uniforms[:, -4], uniforms[:, -3], uniforms[:, -2:]
        (low, high), (narrow, wide) = view.crop_scale, map(math.log, view.crop_ratio)
        area = size**2 * (low + (high - low) * attempts[..., 0])
        ratio = (narrow + (wide - narrow) * attempts[..., 1]).exp()
        shapes = torch.stack([area * ratio, area / ratio], dim=-1).sqrt().round()  # (N, attempts, 2): width, height
        fits = ((shapes >= 1) & (shapes <= size)).all(dim=-1)
        first = fits.byte().argmax(dim=1)
        shape = shapes[torch.arange(len(shapes)), first]  # (N, 2)
        fallback = torch.tensor([size, size], dtype=torch.float32)
        if view.crop_ratio[0] > 1:
            fallback[1] = max(1, round(size / view.crop_ratio[0]))
        elif view.crop_ratio[1] < 1:
            fallback[0] = max(1, round(size * view.crop_ratio[1]))
        some = fits.any(dim=1, keepdim=True)
        corner = torch.where(some, (where * (size - shape + 1)).floor(), ((size - fallback) / 2).floor())
        boxes = torch.cat([corner, torch.where(some, shape, fallback)], dim=1)
        whole = torch.tensor([0.0, 0.0, size, size])
        applied = (apply < view.crop_flip_probability)[:, None]
        flips = (flip < view.flip_probability)[:, None] & applied
        return torch.cat([torch.where(applied, boxes, whole), flips.float()], dim=1)

    def _moves(self, uniforms: Tensor) -> Tensor | None:
        """RandomAffine's matrices."""
        view = self._view
        if view.affine_probability == 0:
            return None
        apply, angle, x, y, scale, shear = uniforms.unbind(dim=1)
        reach = view.affine_translate * self._size
        low, high = view.affine_scale
        matrices = affine_matrices(
            view.affine_degrees * (2 * angle - 1),
            ((2 * x - 1) * reach).round(),
            ((2 * y - 1) * reach).round(),
            low + (high - low) * scale,
            view.affine_shear * (2 * shear - 1),
        )
        return torch.where((apply < view.affine_probability)[:, None, None], matrices, IDENTITY)


def affine_matrices(degrees: Tensor, x: Tensor, y: Tensor, scale: Tensor, shear_degrees: Tensor) -> Tensor:
    """Inverses of: shear along x, then scale, rotate and move, all about the centre; (N,) each -> (N, 2, 3)."""
    angle, slope = degrees.double().deg2rad(), shear_degrees.double().deg2rad().tan()
    cosine, sine = angle.cos(), angle.sin()
    a, b = (cosine - slope * sine) / scale, (slope * cosine + sine) / scale
    c, d = -sine / scale, cosine / scale
    rows = [a, b, -a * x - b * y, c, d, -c * x - d * y]
    return torch.stack(rows, dim=1).view(-1, 2, 3).float()


def operation_matrices(operations: Tensor, strengths: Tensor, image_size: int) -> Tensor:
    """Of RandAugment's geometric operations; (N,) each -> (N, 2, 3)."""
    is_one = dict(zip(GEOMETRIC, (operations == OPERATIONS.index(name) for name in GEOMETRIC), strict=True))
    matrices = affine_matrices(
        -strengths * is_one["Rotate"],
        strengths * is_one["TranslateX"],
        strengths * is_one["TranslateY"],
        torch.ones(len(operations)),
        torch.zeros(len(operations)),
    )
    # Shears keep the upper or left edge where it is, not the centre.
    for name, row, column in (("ShearX", 0, 1), ("ShearY", 1, 0)):
        matrices[:, row, column] += strengths * is_one[name]
        matrices[:, row, 2] += strengths * is_one[name] * (image_size / 2)
    return matrices
