"""What augmentation does to the pixels of a batch, each sample with its own parameters, on whatever device they are on.

The operations are those of torchvision.transforms.v2.functional on uint8 tensors, of which one call serves one set of
parameters; here one call serves a batch. Parameters travel in one copy, and samples are sorted by operation on the
host, so that nothing waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from datasets.augmentation import BLENDS, GEOMETRIC, OPERATIONS, Parameters


def _sample(pixels: Tensor, x: Tensor, y: Tensor, mode: str) -> Tensor:
    """Images (N, 3, S, S) uint8 read at positions x, y (N, S, S), each axis from -1 to 1; black outside."""
    grid = torch.view_as_real(torch.complex(x, y))  # (N, S, S, 2), sooner made so than by stacking
    values = F.grid_sample(pixels.float(), grid, mode, "zeros", align_corners=False)
    return values.round_().to(torch.int32).byte()  # CPUs have no fast way from float32 to uint8 but this


def move(pixels: Tensor, matrices: Tensor, mode: str) -> Tensor:
    """Images (N, 3, S, S) uint8 moved by `matrices` (N, 2, 3) on their device; what comes from outside is black."""
    size = pixels.shape[-1]
    axis = torch.linspace((1 - size) / 2, (size - 1) / 2, size, device=pixels.device)
    a, b, c = (matrices / (size / 2))[..., None, None].unbind(dim=2)  # (N, 2, 1, 1) each
    x, y = (a * axis + b * axis[:, None] + c).unbind(dim=1)
    return _sample(pixels, x, y, mode)


def crop(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Images (N, 3, S, S) uint8 cropped to `boxes` (N, 5), flipped where they say so, and resized to S bilinearly."""
    size = pixels.shape[-1]
    left, top, width, height, flip = boxes[:, :, None].unbind(dim=1)  # (N, 1) each
    index = torch.arange(size, device=pixels.device, dtype=torch.float32)

    def positions(start: Tensor, length: Tensor, output: Tensor) -> Tensor:
        """Of each output pixel in the input, (N, S); none outside the box, on grid_sample's scale of [-1, 1]."""
        inside = ((output + 0.5) * (length / size) - 0.5).clamp(min=0).minimum(length - 1)
        return (2 * (inside + start) + 1) / size - 1

    x = positions(left, width, torch.where(flip > 0, size - 1 - index, index))
    y = positions(top, height, index)
    return _sample(pixels, x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size), "bilinear")


def grey(pixels: Tensor) -> Tensor:
    """(N, 3, S, S) float32 on the scale of 255 -> luminance (N, 1, S, S), whole numbers."""
    weights = (0.2989, 0.587, 0.114)
    return sum(w * pixels[:, c : c + 1] for c, w in enumerate(weights)).floor_()  # type: ignore[union-attr]


def blurred(pixels: Tensor) -> Tensor:
    """(N, 3, S, S) float32 -> the same, each pixel but the border's averaged with its neighbours, by 5 to 1."""
    out = pixels.clone()
    if min(pixels.shape[-2:]) > 2:
        rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
        around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        out[:, :, 1:-1, 1:-1] = around.add_(pixels[:, :, 1:-1, 1:-1], alpha=4).div_(13).round_()
    return out


def blend(pixels: Tensor, factors: Tensor, counts: list[int]) -> Tensor:
    """factor x pixels + (1 - factor) x what the operation fades to; `counts` samples of each of BLENDS, in order."""
    values = pixels.float()
    brightness, color, contrast, sharpness = values.split(counts)
    others = [
        torch.zeros_like(brightness),
        grey(color).expand_as(color),
        grey(contrast).mean(dim=(1, 2, 3), keepdim=True).expand_as(contrast),
        blurred(sharpness),
    ]
    return torch.lerp(torch.cat(others), values, factors[:, None, None, None]).clamp_(0, 255).byte()


def autocontrast(pixels: Tensor) -> Tensor:
    """Each channel stretched to 0..255; one of a single level stays as it is."""
    values = pixels.float()
    low, high = values.amin(dim=(2, 3), keepdim=True), values.amax(dim=(2, 3), keepdim=True)
    flat = high == low
    return ((values - low.masked_fill(flat, 0)) / ((high - low) / 255).masked_fill(flat, 1)).clamp_(0, 255).byte()


def turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Colours of (N, 3, S, S) uint8 turned on the circle of hues by `turns` (N,) of it, in HSV."""
    red, green, blue = pixels.float().unbind(dim=1)  # (N, S, S) each
    value = red.maximum(green).maximum(blue)
    reach = value - red.minimum(green).minimum(blue)
    by = reach.masked_fill(reach == 0, 1)
    hue = torch.where(value == green, 2 + (blue - red) / by, 4 + (red - green) / by)
    hue = torch.where(value == red, (green - blue) / by, hue)  # 0..6
    k = torch.stack([5 + hue, 3 + hue, 1 + hue], dim=1).add_(6 * turns[:, None, None, None]).remainder_(6)
    out = value[:, None] - reach[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)
    return (out * (255.999 / 255)).clamp_(0, 255).byte()  # as torchvision turns [0, 1] into levels


def operate(pixels: Tensor, counts: list[int], matrices: Tensor, strengths: Tensor) -> Tensor:
    """One operation on each sample (N, 3, S, S) uint8, in place; samples are sorted by operation, `counts` of each.

    Args:
        matrices: (N, 2, 3), of the geometric ones.
        strengths: (N,), of the others.
    """
    geometric, blends = len(GEOMETRIC), len(BLENDS)
    grouped = [counts[0], sum(counts[1 : 1 + geometric]), sum(counts[1 + geometric : -5]), *counts[-5:]]
    work = [
        None,
        lambda group, matrix, _: move(group, matrix, "nearest"),
        lambda group, _, strength: blend(group, 1 + strength, counts[-5 - blends : -5]),
        lambda group, _, bits: group & (256 - 2 ** (8 - bits)).round().byte()[:, None, None, None],
        lambda group, _, level: torch.where(group >= level.byte()[:, None, None, None], 255 - group, group),
        lambda group, *_: autocontrast(group),
        lambda group, *_: tv.equalize(group),
        lambda group, _, turns: turn_hue(group, turns),
    ]
    groups = zip(work, *(values.split(grouped) for values in (pixels, matrices, strengths)), strict=True)
    for function, group, matrix, strength in groups:
        if function and len(group):
            group.copy_(function(group, matrix, strength))
    return pixels


def augment(pixels: Tensor, parameters: Parameters) -> Tensor:
    """Images (N, 3, S, S) uint8, augmented by `parameters`: crop and flip, the operations, the affine move."""
    num_ops = parameters.operations.shape[1]
    # For each round samples are sorted by operation. `at` is which of the original samples is where.
    at, columns, counts = torch.arange(len(pixels)), [parameters.boxes], []
    for round_ in range(num_ops):
        order = parameters.operations[at, round_].argsort()
        at = at[order]
        columns += [order[:, None].float(), parameters.strengths[at, round_, None]]
        columns.append(parameters.matrices[at, round_].flatten(1))
        counts.append(parameters.operations[:, round_].bincount(minlength=len(OPERATIONS)).tolist())
    columns.append(at.argsort()[:, None].float())
    if parameters.moves is not None:
        columns.append(parameters.moves.flatten(1))
    packed = torch.cat(columns, dim=1)
    if pixels.device.type == "cuda":
        packed = packed.pin_memory()  # only then does the copy go on while the host does
    packed = packed.to(pixels.device, non_blocking=True)
    boxes, *rounds, back, moves = packed.split([5, *[1, 1, 6] * num_ops, 1, packed.shape[1] - 6 - 8 * num_ops], dim=1)

    pixels = crop(pixels, boxes)
    for count, order, strengths, matrices in zip(counts, *(rounds[i::3] for i in range(3)), strict=True):
        pixels = operate(pixels.index_select(0, order[:, 0].long()), count, matrices.view(-1, 2, 3), strengths[:, 0])
    pixels = pixels.index_select(0, back[:, 0].long())
    return pixels if parameters.moves is None else move(pixels, moves.view(-1, 2, 3), "bilinear")
