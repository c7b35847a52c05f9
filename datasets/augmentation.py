"""Augmentation of a batch: parameters drawn on the host for each sample, then applied to the pixels on their device.

Crop and flip, RandAugment, colours and affine moves, distributed as torchvision.transforms.v2's RandomResizedCrop and
RandomHorizontalFlip, RandAugment, ColorJitter and RandomGrayscale, and RandomAffine. The operations on pixels are in
operations.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from config.schema import View
from datasets.operations import OPERATIONS, crop, move, operate


class Draw(Protocol):
    """draw(columns, stream) -> (N, columns) uniforms in [0, 1); `stream` names an independent draw."""

    def __call__(self, columns: int, stream: str = "", /) -> Tensor: ...


INDEX = {name: index for index, name in enumerate(OPERATIONS)}  # Identity's is 0
NUM_BINS = 31
CROP_ATTEMPTS = 10
IDENTITY = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


def _ramp(first: float, last: float) -> Callable[[int, int], float]:
    """Strength that goes from `first` to `last` over the bins."""
    return lambda bin_, image_size: torch.linspace(first, last, NUM_BINS)[bin_].item()  # float32, as torchvision's


def _pixels(bin_: int, image_size: int) -> float:
    return int(_ramp(0, 150 / 331 * image_size)(bin_, image_size))


def _bits(bin_: int, image_size: int) -> float:
    return 8 - round(4 * bin_ / (NUM_BINS - 1))


def _level(bin_: int, image_size: int) -> float:
    """Lowest whole level that is not below torchvision's threshold, computed in float32 as there."""
    return torch.tensor(255 * _ramp(1, 0)(bin_, image_size)).ceil().item()


# RandAugment's operations (Cubuk et al. 2020) in the order of their draws: (bin, image size) -> strength; True if half
# of the samples get the negative strength. Identity, the first, is also what samples without RandAugment get.
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
JITTER = ("Brightness", "Contrast", "Color", "Hue")  # in the order of the key color_jitter


@dataclass(frozen=True)
class Parameters:
    """Parameters of the augmentation of N samples, on the host.

    Matrices lead from a pixel of the output to one of the input, both counted from the centre.

    Attributes:
        boxes: (N, 5) float32: left, top, width and height of the crop in pixels, and 1 for a flip, else 0.
        operations: (N, num_ops) int64, positions in OPERATIONS, applied from left to right.
        strengths: (N, num_ops) float32, signed.
        matrices: (N, num_ops, 2, 3) float32, for the geometric operations.
        moves: (N, 2, 3) float32, matrices of the affine move that comes last; or None.
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
        """Parameters of the samples of `first`, then of those of `second`."""
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

    def __init__(self, view: View, image_size: int) -> None:
        self._view, self._size = view, image_size
        magnitudes = [strength(view.randaugment_magnitude, image_size) for strength, _ in RANDAUGMENT.values()]
        self._magnitudes = torch.tensor(magnitudes)  # (14,) float32
        self._signed = torch.tensor([signed for _, signed in RANDAUGMENT.values()])
        self._indices = torch.tensor([INDEX[name] for name in RANDAUGMENT])

    def parameters(self, draw: Draw) -> Parameters:
        """Parameters of the N samples of `draw`."""
        view, num_ops = self._view, self._view.randaugment_num_ops
        jitters = view.color_jitter_probability > 0 or view.grayscale_probability > 0
        widths = [2 * CROP_ATTEMPTS + 4, 1 + 2 * num_ops, 6]
        crop, ops, moves = draw(sum(widths)).split(widths, dim=1)
        apply = ops[:, :1] < view.randaugment_probability
        chosen = (ops[:, 1 : 1 + num_ops] * len(RANDAUGMENT)).long() * apply  # (N, num_ops)
        signs = torch.where((ops[:, 1 + num_ops :] < 0.5) & self._signed[chosen], -1.0, 1.0)
        operations, strengths = self._indices[chosen], self._magnitudes[chosen] * signs
        if jitters:
            more = self._colors(draw(2 + 2 * len(JITTER), " colours"))  # another stream: the crops stay the same
            operations, strengths = torch.cat([operations, more[0]], dim=1), torch.cat([strengths, more[1]], dim=1)
        matrices = operation_matrices(operations.flatten(), strengths.flatten(), self._size)
        matrices = matrices.view(*operations.shape, 2, 3)
        return Parameters(self._boxes(crop), operations, strengths, matrices, self._moves(moves))

    def _colors(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Operations and strengths, (N, 5) each: ColorJitter's four in random order, then RandomGrayscale."""
        view, num = self._view, len(JITTER)
        apply, grey, order, strengths = uniforms.split([1, 1, num, num], dim=1)
        jitter = apply < view.color_jitter_probability
        # Strengths are from -x to x. Those of the first three are factor - 1, and a factor is not negative.
        reach = torch.tensor(view.color_jitter)
        low = torch.cat([-reach[:3].clamp(max=1), -reach[3:]])
        strengths = (low + (reach - low) * strengths) * jitter
        order = order.argsort(dim=1)
        is_grey = grey < view.grayscale_probability
        operations = torch.tensor([INDEX[name] for name in JITTER])[order] * jitter
        operations = torch.cat([operations, INDEX["Color"] * is_grey], dim=1)
        strengths = torch.cat([strengths.gather(1, order), -is_grey.float()], dim=1)  # Color by -1 is grey
        return operations, strengths

    def _boxes(self, uniforms: Tensor) -> Tensor:
        """RandomResizedCrop's boxes: the first of ten random ones that fits, else a central one of a legal shape."""
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
    """Matrices (N, 2, 3) of RandAugment's geometric operations; operations and strengths are (N,)."""

    def strength(name: str) -> Tensor:
        return strengths * (operations == INDEX[name])

    matrices = affine_matrices(
        -strength("Rotate"),
        strength("TranslateX"),
        strength("TranslateY"),
        torch.ones(len(operations)),
        torch.zeros(len(operations)),
    )
    # Shears keep the upper or left edge where it is, not the centre.
    for name, row, column in (("ShearX", 0, 1), ("ShearY", 1, 0)):
        matrices[:, row, column] += strength(name)
        matrices[:, row, 2] += strength(name) * (image_size / 2)
    return matrices


def _copy(values: Tensor, device: torch.device) -> Tensor:
    """Copies to `device` without synchronising with it."""
    if device.type == "cuda":
        values = values.pin_memory()  # from other memory the copy is synchronous
    return values.to(device, non_blocking=True)


def augment(pixels: Tensor, parameters: Parameters) -> Tensor:
    """Images (N, 3, S, S) uint8 augmented by `parameters`: crop and flip, the operations, the affine move."""
    num_ops = parameters.operations.shape[1]
    # Before each round samples are sorted by operation. `at` says which of the original samples is where.
    at = torch.arange(len(pixels))
    orders: list[Tensor] = []
    counts: list[list[int]] = []
    columns = [parameters.boxes]
    for round_ in range(num_ops):
        operations = parameters.operations[at, round_]
        orders.append(operations.argsort())
        counts.append(operations.bincount(minlength=len(OPERATIONS)).tolist())
        at = at[orders[-1]]
        columns += [parameters.strengths[at, round_, None], parameters.matrices[at, round_].flatten(1)]
    orders.append(at.argsort())  # the original order again
    if parameters.moves is not None:
        columns.append(parameters.moves.flatten(1))

    *there, back = _copy(torch.stack(orders), pixels.device)  # (N,) int64 each
    widths = [part.shape[1] for part in columns]
    boxes, *rest = _copy(torch.cat(columns, dim=1), pixels.device).split(widths, dim=1)  # (N, width) float32 each
    rounds, moves = rest[: 2 * num_ops], rest[2 * num_ops :]

    pixels = crop(pixels, boxes)
    for order, count, strengths, matrices in zip(there, counts, rounds[::2], rounds[1::2], strict=True):
        pixels = operate(pixels.index_select(0, order), count, strengths[:, 0], matrices.view(-1, 2, 3))
    pixels = pixels.index_select(0, back)
    return move(pixels, moves[0].view(-1, 2, 3), "bilinear") if moves else pixels
