"""Augmentation of a batch: parameters are drawn on the host for each sample and applied to the pixels on their device.

A view is made by crop and flip, shift, RandAugment, colour jitter and greyscale, blur, affine transform, and cutout.
The parameters have the distributions of these classes of torchvision.transforms.v2: RandomResizedCrop and
RandomHorizontalFlip, RandomCrop after padding, RandAugment, ColorJitter and RandomGrayscale, GaussianBlur, and
RandomAffine. The operations on pixels are in operations.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from config.schema import View
from datasets.operations import OPERATIONS, crop, crop_antialiased, cutout, move, operate, shift
from utils.device import copy_to


class Draw(Protocol):
    """draw(columns, stream) -> (N, columns) uniforms in [0, 1). Draws with different `stream` are independent."""

    def __call__(self, columns: int, stream: str = "", /) -> Tensor: ...


INDEX = {name: index for index, name in enumerate(OPERATIONS)}  # Identity is 0, so zeros mean "no operation"
NUM_BINS = 31
CROP_ATTEMPTS = 10
IDENTITY = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def _ramp(first: float, last: float) -> Callable[[int, int], float]:
    """Returns a function (bin, image size) -> strength. The strength is linear in the bin, from `first` to `last`."""
    return lambda bin_, image_size: torch.linspace(first, last, NUM_BINS)[bin_].item()  # float32, as in torchvision


def _pixels(bin_: int, image_size: int) -> float:
    return int(_ramp(0, 150 / 331 * image_size)(bin_, image_size))


def _bits(bin_: int, image_size: int) -> float:
    return 8 - round(4 * bin_ / (NUM_BINS - 1))


def _level(bin_: int, image_size: int) -> float:
    """Returns torchvision's threshold for Solarize, computed in float32 as there, rounded up to a whole level."""
    return torch.tensor(255 * _ramp(1, 0)(bin_, image_size)).ceil().item()


# RandAugment's operations (Cubuk et al. 2020): name -> (function, signed). The function maps (bin, image size) to the
# strength. If signed is True, half of the samples get the negative strength. The order matters: a random number selects
# an operation by position. Samples without RandAugment get the operation at position 0, Identity.
RANDAUGMENT: dict[str, tuple[Callable[[int, int], float], bool]] = {
    "Identity": (_ramp(0, 0), False),
    "ShearX": (_ramp(0, 0.3), True),  # slope
    "ShearY": (_ramp(0, 0.3), True),
    "TranslateX": (_pixels, True),
    "TranslateY": (_pixels, True),
    "Rotate": (_ramp(0, 30), True),  # degrees
    "Brightness": (_ramp(0, 0.9), True),  # factor - 1
    "Color": (_ramp(0, 0.9), True),
    "Contrast": (_ramp(0, 0.9), True),
    "Sharpness": (_ramp(0, 0.9), True),
    "Posterize": (_bits, False),
    "Solarize": (_level, False),
    "AutoContrast": (_ramp(0, 0), False),
    "Equalize": (_ramp(0, 0), False),
}
JITTER = ("Brightness", "Contrast", "Color", "Hue")  # in the order of the values of the key color_jitter


@dataclass(frozen=True)
class Parameters:
    """Augmentation parameters of N samples, on the host.

    A matrix maps the position of an output pixel to a position in the input. Positions are in pixels of the view,
    relative to its centre.

    Attributes:
        boxes: (N, 5) float32: left, top, width and height of the crop in pixels of the image, then 1 for a flip or 0
            for none.
        operations: (N, num_ops) int64, indices into OPERATIONS, applied from left to right.
        strengths: (N, num_ops) float32, signed.
        matrices: (N, num_ops, 2, 3) float32, used by the geometric operations.
        moves: (N, 2, 3) float32, matrices of the affine transform, after the operations; None: no affine transform.
        shifts: (N, 2) float32, whole pixels along x and y, applied after the crop; None: no shifts.
        holes: (N, 4) float32, boxes of cutout in whole pixels, applied last; None: no cutout.
    """

    boxes: Tensor
    operations: Tensor
    strengths: Tensor
    matrices: Tensor
    moves: Tensor | None
    shifts: Tensor | None = None
    holes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, samples: slice) -> "Parameters":
        parts: dict[str, Any] = {name: None if part is None else part[samples] for name, part in vars(self).items()}
        return Parameters(**parts)

    def to(self, device: torch.device) -> "Parameters":
        """Copies all parts but `operations` to `device`, in one transfer that does not synchronise with it."""
        parts = {name: part for name, part in vars(self).items() if part is not None and name != "operations"}
        columns = [part.flatten(1) for part in parts.values()]
        copied = copy_to(torch.cat(columns, dim=1), device).split([each.shape[1] for each in columns], dim=1)
        return replace(
            self, **{name: values.view(parts[name].shape) for name, values in zip(parts, copied, strict=True)}
        )


class Augmentation:
    """Random augmentation that is described by one `views.*` section of the config.

    Args:
        image_size: height and width in pixels of the view.
        stored_size: height and width in pixels of the images that it is cropped from; None: `image_size`.
    """

    def __init__(self, view: View, image_size: int, stored_size: int | None = None) -> None:
        self._view, self._size, self._stored_size = view, image_size, stored_size or image_size
        magnitudes = [strength(view.randaugment_magnitude, image_size) for strength, _ in RANDAUGMENT.values()]
        self._magnitudes = torch.tensor(magnitudes)  # (14,) float32
        self._signed = torch.tensor([signed for _, signed in RANDAUGMENT.values()])
        self._indices = torch.tensor([INDEX[name] for name in RANDAUGMENT])

    def parameters(self, draw: Draw) -> Parameters:
        """Draws the parameters of N samples; `draw` determines N."""
        view, num_ops = self._view, self._view.randaugment_num_ops
        widths = [2 * CROP_ATTEMPTS + 4, 1 + 2 * num_ops, 6]
        crop, ops, moves = draw(sum(widths)).split(widths, dim=1)
        apply = ops[:, :1] < view.randaugment_probability
        chosen = (ops[:, 1 : 1 + num_ops] * len(RANDAUGMENT)).long() * apply  # (N, num_ops)
        signs = torch.where((ops[:, 1 + num_ops :] < 0.5) & self._signed[chosen], -1.0, 1.0)
        rounds = [(self._indices[chosen], self._magnitudes[chosen] * signs)]
        # Colours and blur have streams of their own, so the other draws do not depend on them.
        if view.color_jitter_probability > 0 or view.grayscale_probability > 0:
            rounds.append(self._colors(draw(2 + 2 * len(JITTER), " colours")))
        if view.blur_probability > 0:
            rounds.append(self._blur(draw(2, " blur")))
        operations, strengths = (torch.cat(parts, dim=1) for parts in zip(*rounds, strict=True))
        matrices = operation_matrices(operations.flatten(), strengths.flatten(), self._size)
        matrices = matrices.view(*operations.shape, 2, 3)
        return Parameters(
            self._boxes(crop),
            operations,
            strengths,
            matrices,
            self._moves(moves),
            self._shifts(draw(2, " shift")) if view.shift_pixels else None,
            self._holes(draw(3, " cutout")) if view.cutout else None,
        )

    def _shifts(self, uniforms: Tensor) -> Tensor:
        """Returns RandomCrop's offsets after padding by `shift_pixels`, (N, 2)."""
        reach = self._view.shift_pixels
        return (uniforms * (2 * reach + 1)).floor() - reach

    def _holes(self, uniforms: Tensor) -> Tensor:
        """Returns the boxes of cutout, (N, 4): squares around a point of the view, rounded and cut off at its edges."""
        side = uniforms[:, :1] * self._view.cutout * self._size
        corner = uniforms[:, 1:] * self._size - side / 2
        return torch.cat([corner, corner + side], dim=1).round().clamp(0, self._size)

    def _colors(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Returns operations and strengths, (N, 5) each: ColorJitter's four in random order, then RandomGrayscale."""
        view, num = self._view, len(JITTER)
        apply, grey, order, strengths = uniforms.split([1, 1, num, num], dim=1)
        jitter = apply < view.color_jitter_probability
        # Strengths range from -reach to reach. The first three strengths are factor - 1. They are at least -1, because
        # a factor cannot be negative.
        reach = torch.tensor(view.color_jitter)
        low = torch.cat([-reach[:3].clamp(max=1), -reach[3:]])
        strengths = (low + (reach - low) * strengths) * jitter
        order = order.argsort(dim=1)
        is_grey = grey < view.grayscale_probability
        operations = torch.tensor([INDEX[name] for name in JITTER])[order] * jitter
        operations = torch.cat([operations, INDEX["Color"] * is_grey], dim=1)
        strengths = torch.cat([strengths.gather(1, order), -is_grey.float()], dim=1)  # Color by strength -1 gives grey
        return operations, strengths

    def _blur(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Returns operations and strengths, (N, 1) each: GaussianBlur for some samples, by its standard deviation."""
        apply, sigma = uniforms.split(1, dim=1)
        blurred = apply < self._view.blur_probability
        low, high = self._view.blur_sigma
        return INDEX["GaussianBlur"] * blurred, (low + (high - low) * sigma) * blurred

    def _boxes(self, uniforms: Tensor) -> Tensor:
        """Returns RandomResizedCrop's boxes and the flips, (N, 5).

        A box is the first of ten random boxes that fits into the image. If none fits, a central box with an allowed
        aspect ratio is used. Samples without crop and flip get the whole image.
        """
        view, size = self._view, self._stored_size
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
        """Returns RandomAffine's matrices (N, 2, 3), or None if the config disables the affine transform."""
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
    """Returns inverse affine matrices: (N,) each -> (N, 2, 3).

    The forward transform shears along x, scales, rotates and shifts, in this order, about the centre of the image.
    """
    angle, slope = degrees.double().deg2rad(), shear_degrees.double().deg2rad().tan()
    cosine, sine = angle.cos(), angle.sin()
    a, b = (cosine - slope * sine) / scale, (slope * cosine + sine) / scale
    c, d = -sine / scale, cosine / scale
    rows = [a, b, -a * x - b * y, c, d, -c * x - d * y]
    return torch.stack(rows, dim=1).view(-1, 2, 3).float()


def operation_matrices(operations: Tensor, strengths: Tensor, image_size: int) -> Tensor:
    """Returns the matrices (N, 2, 3) of RandAugment's geometric operations; `operations` and `strengths` are (N,).

    Every other operation gets the identity matrix.
    """

    def strength(name: str) -> Tensor:
        return strengths * (operations == INDEX[name])

    matrices = affine_matrices(
        -strength("Rotate"),
        strength("TranslateX"),
        strength("TranslateY"),
        torch.ones(len(operations)),
        torch.zeros(len(operations)),
    )
    # As in torchvision, ShearX does not move the upper edge, and ShearY does not move the left edge.
    for name, row, column in (("ShearX", 0, 1), ("ShearY", 1, 0)):
        matrices[:, row, column] += strength(name)
        matrices[:, row, 2] += strength(name) * (image_size / 2)
    return matrices


def augment(pixels: Tensor, parameters: Parameters, size: int | None = None) -> Tensor:
    """Augments images (N, 3, P, P) uint8: crop, flip and shift, the operations, the affine transform, then cutout.

    Args:
        size: height and width of the views. Crops are resized to it with antialiasing. None: the views have the size of
            the images, so crops are never reduced, and need no antialiasing.
    """
    # Before each round, samples are sorted by operation: the sample at position i comes from position order[i], and
    # at[i] is its original index.
    at = torch.arange(len(pixels))
    orders, origins, counts = [], [], []
    for operations in parameters.operations.T:
        orders.append(operations[at].argsort())
        counts.append(operations.bincount(minlength=len(OPERATIONS)).tolist())
        at = at[orders[-1]]
        origins.append(at)
    back = at.argsort()  # restores the original order
    *indices, back = copy_to(torch.stack([*orders, *origins, back]), pixels.device)  # (N,) int64 each
    orders, origins = indices[: len(orders)], indices[len(orders) :]
    there = parameters.to(pixels.device)

    pixels = crop(pixels, there.boxes) if size is None else crop_antialiased(pixels, there.boxes, size)
    if there.shifts is not None:
        pixels = shift(pixels, there.shifts)
    for round_, (order, at, count) in enumerate(zip(orders, origins, counts, strict=True)):
        strengths, matrices = there.strengths[at, round_], there.matrices[at, round_]
        pixels = operate(pixels.index_select(0, order), count, strengths, matrices)
    pixels = pixels.index_select(0, back)
    if there.moves is not None:
        pixels = move(pixels, there.moves, "bilinear")
    return pixels if there.holes is None else cutout(pixels, there.holes)
