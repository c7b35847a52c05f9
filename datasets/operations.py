"""Operations on the pixels of a batch, each sample with its own strength, on whatever device the pixels are on.

They are those of torchvision.transforms.v2.functional on uint8 tensors; there one call serves one strength, here one
call serves a batch. Nothing here synchronises with the device: no number is read from a tensor on it.

To add an operation, write a function, give it an entry in OPERATIONS, and draw its strengths in augmentation.py.
"""

from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv


def _read_at(pixels: Tensor, x: Tensor, y: Tensor, mode: str) -> Tensor:
    """Images (N, 3, S, S) uint8 sampled at positions x, y (N, S, S), each axis from -1 to 1; black outside."""
    grid = torch.view_as_real(torch.complex(x, y))  # (N, S, S, 2), cheaper than stacking
    values = F.grid_sample(pixels.float(), grid, mode, "zeros", align_corners=False)
    return values.round_().to(torch.int32).byte()  # on CPUs float32 to uint8 is slow in one step


def _per_sample(values: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1), which broadcasts over the pixels of each sample."""
    return values[:, None, None, None]


def crop(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Images (N, 3, S, S) uint8 cropped to `boxes` (N, 5), flipped if the box says so, and resized to S bilinearly.

    Args:
        boxes: left, top, width and height in pixels, and 1 for a flip, else 0.
    """
    size = pixels.shape[-1]
    left, top, width, height, flip = boxes[:, :, None].unbind(dim=1)  # (N, 1) each
    index = torch.arange(size, device=pixels.device, dtype=torch.float32)

    def positions(start: Tensor, length: Tensor, output: Tensor) -> Tensor:
        """Input positions (N, S) of the output pixels, in the box, on grid_sample's scale of [-1, 1]."""
        inside = ((output + 0.5) * (length / size) - 0.5).clamp(min=0).minimum(length - 1)
        return (2 * (inside + start) + 1) / size - 1

    x = positions(left, width, torch.where(flip > 0, size - 1 - index, index))
    y = positions(top, height, index)
    return _read_at(pixels, x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size), "bilinear")


def move(pixels: Tensor, matrices: Tensor, mode: str) -> Tensor:
    """Images (N, 3, S, S) uint8 moved by `matrices` (N, 2, 3); black where the input ends.

    Args:
        matrices: lead from a pixel of the output to one of the input, both counted from the centre.
        mode: interpolation, `nearest` or `bilinear`.
    """
    size = pixels.shape[-1]
    axis = torch.linspace((1 - size) / 2, (size - 1) / 2, size, device=pixels.device)
    a, b, c = (matrices / (size / 2))[..., None, None].unbind(dim=2)  # (N, 2, 1, 1) each
    x, y = (a * axis + b * axis[:, None] + c).unbind(dim=1)
    return _read_at(pixels, x, y, mode)


def _grey(values: Tensor) -> Tensor:
    """(N, 3, S, S) float32 on the scale of 255 -> luminance (N, 1, S, S), whole numbers."""
    weights = (0.2989, 0.587, 0.114)
    return sum(w * values[:, c : c + 1] for c, w in enumerate(weights)).floor_()  # type: ignore[union-attr]


def _blurred(values: Tensor) -> Tensor:
    """(N, 3, S, S) float32 -> the same, smoothed by a 3x3 kernel of ones with 5 in the middle; borders stay."""
    out = values.clone()
    if min(values.shape[-2:]) > 2:
        rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
        around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        out[:, :, 1:-1, 1:-1] = around.add_(values[:, :, 1:-1, 1:-1], alpha=4).div_(13).round_()
    return out


def _blend(other: Tensor, values: Tensor, strengths: Tensor) -> Tensor:
    """values + strength x (values - other), on the scale of 255, as uint8."""
    return torch.lerp(other, values, _per_sample(1 + strengths)).clamp_(0, 255).byte()


# The operations: (pixels (N, 3, S, S) uint8, strengths (N,) float32, matrices (N, 2, 3) float32) -> pixels.


def identity(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    return pixels


def warp(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    """All geometric operations: their strengths are in the matrices."""
    return move(pixels, matrices, "nearest")


def brightness(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    values = pixels.float()
    return _blend(torch.zeros_like(values), values, strengths)


def color(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    values = pixels.float()
    return _blend(_grey(values), values, strengths)


def contrast(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    values = pixels.float()
    return _blend(_grey(values).mean(dim=(1, 2, 3), keepdim=True), values, strengths)


def sharpness(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    values = pixels.float()
    return _blend(_blurred(values), values, strengths)


def posterize(pixels: Tensor, bits: Tensor, matrices: Tensor) -> Tensor:
    """Keeps the upper `bits` of each level."""
    return pixels & _per_sample((256 - 2 ** (8 - bits)).round().byte())


def solarize(pixels: Tensor, levels: Tensor, matrices: Tensor) -> Tensor:
    """Inverts pixels from `levels` on."""
    return torch.where(pixels >= _per_sample(levels.byte()), 255 - pixels, pixels)


def autocontrast(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    """Stretches each channel to 0..255; a channel of a single level stays as it is."""
    values = pixels.float()
    low, high = values.amin(dim=(2, 3), keepdim=True), values.amax(dim=(2, 3), keepdim=True)
    flat = high == low
    return ((values - low.masked_fill(flat, 0)) / ((high - low) / 255).masked_fill(flat, 1)).clamp_(0, 255).byte()


def equalize(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    return tv.equalize(pixels)


def hue(pixels: Tensor, turns: Tensor, matrices: Tensor) -> Tensor:
    """Turns colours on HSV's circle of hues; 1 is a whole turn."""
    red, green, blue = pixels.float().unbind(dim=1)  # (N, S, S) each
    value = red.maximum(green).maximum(blue)
    reach = value - red.minimum(green).minimum(blue)
    by = reach.masked_fill(reach == 0, 1)
    angle = torch.where(value == green, 2 + (blue - red) / by, 4 + (red - green) / by)
    angle = torch.where(value == red, (green - blue) / by, angle)  # 0..6
    k = torch.stack([5 + angle, 3 + angle, 1 + angle], dim=1).add_(6 * _per_sample(turns)).remainder_(6)
    out = value[:, None] - reach[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)
    return (out * (255.999 / 255)).clamp_(0, 255).byte()  # as torchvision turns [0, 1] into levels


# In the order that samples are sorted by; Identity is the first. Neighbours with the same function share one call.
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Identity": identity,
    "ShearX": warp,
    "ShearY": warp,
    "TranslateX": warp,
    "TranslateY": warp,
    "Rotate": warp,
    "Brightness": brightness,
    "Color": color,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Hue": hue,
}


def operate(pixels: Tensor, counts: list[int], strengths: Tensor, matrices: Tensor) -> Tensor:
    """One operation on each sample (N, 3, S, S) uint8.

    Args:
        counts: samples of each of OPERATIONS; samples are sorted by operation.
        strengths: (N,), of all but the geometric operations.
        matrices: (N, 2, 3), of the geometric operations.
    """
    done, start = [], 0
    for function, entries in groupby(zip(OPERATIONS.values(), counts, strict=True), key=lambda entry: entry[0]):
        stop = start + sum(count for _, count in entries)
        if stop > start:
            done.append(function(pixels[start:stop], strengths[start:stop], matrices[start:stop]))
        start = stop
    return torch.cat(done)
