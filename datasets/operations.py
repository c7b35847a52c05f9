"""Operations on the pixels of a batch, on the device of the pixels. Each sample has its own strength.

The operations correspond to torchvision.transforms.v2.functional on uint8 tensors. A call in torchvision has one
strength. A call here has one strength per sample, so one call can process a whole batch. No function here synchronises
with the device, because none reads a value from a tensor on the device.

To add an operation, write a function, add it to OPERATIONS, and draw its strengths in augmentation.py.
"""

from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

GREY = 127  # level that `cutout` fills with


def _read_at(pixels: Tensor, x: Tensor, y: Tensor, mode: str) -> Tensor:
    """Samples images (N, 3, S, S) uint8 at positions x, y (N, S, S).

    Positions range from -1 to 1 along each axis. Positions outside the image give black.
    """
    grid = torch.view_as_real(torch.complex(x, y))  # (N, S, S, 2), cheaper than stacking
    values = F.grid_sample(pixels.float(), grid, mode, "zeros", align_corners=False)
    return values.round_().to(torch.int32).byte()  # on CPUs, a direct conversion to uint8 is slow


def _per_sample(values: Tensor) -> Tensor:
    """Reshapes (N,) to (N, 1, 1, 1), which broadcasts over the pixels of each sample."""
    return values[:, None, None, None]


def crop(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Crops images (N, 3, S, S) uint8 to `boxes`, flips the marked samples, and resizes all to S bilinearly.

    Args:
        boxes: (N, 5): left, top, width and height in pixels, then 1 for a horizontal flip or 0 for none.
    """
    size = pixels.shape[-1]
    left, top, width, height, flip = boxes[:, :, None].unbind(dim=1)  # (N, 1) each
    index = torch.arange(size, device=pixels.device, dtype=torch.float32)

    def positions(start: Tensor, length: Tensor, output: Tensor) -> Tensor:
        """Returns the input positions (N, S) of the output pixels, on grid_sample's scale of [-1, 1].

        Positions stay inside the box, so that no pixel outside the box is used.
        """
        inside = ((output + 0.5) * (length / size) - 0.5).clamp(min=0).minimum(length - 1)
        return (2 * (inside + start) + 1) / size - 1

    x = positions(left, width, torch.where(flip > 0, size - 1 - index, index))
    y = positions(top, height, index)
    return _read_at(pixels, x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size), "bilinear")


def crop_antialiased(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops images (N, 3, P, P) uint8 to `boxes`, flips the marked samples, and resizes all to `size`, antialiased.

    The resizing is torchvision's: bilinear, with a filter that is wider if a crop is reduced. On CPUs, torchvision
    resizes one image at a time, which is several times as fast as `crop_by_products`.

    Args:
        boxes: (N, 5): left, top, width and height in pixels, then 1 for a horizontal flip or 0 for none.
    """
    if pixels.device.type != "cpu":
        return crop_by_products(pixels, boxes, size)
    views = torch.empty(len(pixels), 3, size, size, dtype=torch.uint8)
    for view, image, (left, top, width, height, flip) in zip(views, pixels, boxes.int().tolist(), strict=True):
        resized = tv.resized_crop(image, top, left, height, width, [size, size])
        view.copy_(resized.flip(-1) if flip else resized)
    return views


def crop_by_products(pixels: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Returns what `crop_antialiased` returns, within one level, by two matrix products for all images together."""
    left, top, width, height, flip = boxes.unbind(dim=1)
    across = _resizing(left, width, pixels.shape[-1], size)
    across = torch.where(flip[:, None, None] > 0, across.flip(1), across)
    down = _resizing(top, height, pixels.shape[-1], size)
    with torch.autocast(pixels.device.type, enabled=False):  # products in bf16 would be off by more than one level
        values = (pixels.float().flatten(1, 2) @ across.mT).unflatten(1, (3, -1))  # (N, 3, P, size)
        return (down[:, None] @ values).round_().byte()


def _resizing(start: Tensor, length: Tensor, input_size: int, output_size: int) -> Tensor:
    """Returns matrices (N, output_size, input_size) that resize one axis of a crop. `start` and `length` are (N,)."""
    scale = (length / output_size)[:, None, None]
    centre = scale * (torch.arange(output_size, device=start.device) + 0.5)[:, None]
    position = torch.arange(input_size, device=start.device) + 0.5 - start[:, None, None]
    weights = (1 - (position - centre).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights = weights * ((position > 0) & (position < length[:, None, None]))  # nothing outside the crop is used
    return weights / weights.sum(dim=-1, keepdim=True)


def resize(pixels: Tensor, size: int) -> Tensor:
    """Resizes images (N, 3, P, P) uint8 to (N, 3, size, size) bilinearly with antialiasing."""
    return tv.resize(pixels, [size, size])


def move(pixels: Tensor, matrices: Tensor, mode: str) -> Tensor:
    """Transforms images (N, 3, S, S) uint8 by affine `matrices`. Positions outside the input give black.

    Args:
        matrices: (N, 2, 3). A matrix maps the position of an output pixel to a position in the input. Positions are in
            pixels, relative to the centre of the image.
        mode: interpolation, `nearest` or `bilinear`.
    """
    size = pixels.shape[-1]
    axis = torch.linspace((1 - size) / 2, (size - 1) / 2, size, device=pixels.device)
    a, b, c = (matrices / (size / 2))[..., None, None].unbind(dim=2)  # (N, 2, 1, 1) each
    x, y = (a * axis + b * axis[:, None] + c).unbind(dim=1)
    return _read_at(pixels, x, y, mode)


def shift(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Shifts images (N, 3, S, S) uint8 by whole pixels. Pixels from outside are reflections of those inside.

    This is a random crop after padding by reflection (torch's mode "reflect", which does not repeat the border).

    Args:
        shifts: (N, 2) along x and y. The output pixel i is the input pixel i + shift.
    """
    size = pixels.shape[-1]
    index = torch.arange(size, device=pixels.device)
    period = max(2 * (size - 1), 1)
    x, y = ((index + shifts.long()[:, :, None]) % period).unbind(dim=1)  # (N, S) each
    x, y = x.minimum(period - x), y.minimum(period - y)
    rows = pixels.gather(2, y[:, None, :, None].expand_as(pixels))
    return rows.gather(3, x[:, None, None, :].expand_as(pixels))


def cutout(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Fills a box of each image (N, 3, S, S) uint8 with the grey level GREY (DeVries & Taylor 2017).

    Args:
        boxes: (N, 4) left, top, right and bottom in whole pixels. Right and bottom are not inside. An empty box changes
            nothing.
    """
    index = torch.arange(pixels.shape[-1], device=pixels.device)
    left, top, right, bottom = boxes[:, :, None].unbind(dim=1)  # (N, 1) each
    inside = ((index >= top) & (index < bottom))[:, :, None] & ((index >= left) & (index < right))[:, None, :]
    return pixels.masked_fill(inside[:, None], GREY)


def _grey(values: Tensor) -> Tensor:
    """Converts (N, 3, S, S) float32 on the scale of 0 to 255 to luminance (N, 1, S, S), rounded down."""
    weights = (0.2989, 0.587, 0.114)
    return sum(w * values[:, c : c + 1] for c, w in enumerate(weights)).floor_()  # type: ignore[union-attr]


def _blurred(values: Tensor) -> Tensor:
    """Smooths (N, 3, S, S) float32 by a normalised 3x3 kernel with 5 in the middle and 1 around it.

    Pixels at the border do not change.
    """
    out = values.clone()
    if min(values.shape[-2:]) > 2:
        rows = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
        around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        out[:, :, 1:-1, 1:-1] = around.add_(values[:, :, 1:-1, 1:-1], alpha=4).div_(13).round_()
    return out


def _blend(other: Tensor, values: Tensor, strengths: Tensor) -> Tensor:
    """Returns values + strength x (values - other) as uint8; inputs are on the scale of 0 to 255."""
    return torch.lerp(other, values, _per_sample(1 + strengths)).clamp_(0, 255).byte()


# Each operation is (pixels (N, 3, S, S) uint8, strengths (N,) float32, matrices (N, 2, 3) float32) -> pixels.


def identity(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    """Returns the pixels unchanged."""
    return pixels


def warp(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    """Applies any geometric operation. Its strength is part of the matrix, so `strengths` is not used."""
    return move(pixels, matrices, "nearest")


def brightness(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    """Changes the brightness by the factor 1 + strength; strength -1 gives black."""
    values = pixels.float()
    return _blend(torch.zeros_like(values), values, strengths)


def color(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    """Changes the saturation by the factor 1 + strength; strength -1 gives greyscale."""
    values = pixels.float()
    return _blend(_grey(values), values, strengths)


def contrast(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    """Changes the contrast by the factor 1 + strength; strength -1 gives the mean luminance everywhere."""
    values = pixels.float()
    return _blend(_grey(values).mean(dim=(1, 2, 3), keepdim=True), values, strengths)


def sharpness(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    """Changes the sharpness by the factor 1 + strength; strength -1 gives the smoothed image."""
    values = pixels.float()
    return _blend(_blurred(values), values, strengths)


def posterize(pixels: Tensor, bits: Tensor, matrices: Tensor) -> Tensor:
    """Keeps the `bits` highest bits of each level."""
    return pixels & _per_sample((256 - 2 ** (8 - bits)).round().byte())


def solarize(pixels: Tensor, levels: Tensor, matrices: Tensor) -> Tensor:
    """Inverts the pixel levels that are at least the sample's threshold in `levels`."""
    return pixels ^ (pixels >= _per_sample(levels.byte())).byte().mul_(255)  # 255 - x is x ^ 255


def autocontrast(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    """Stretches the levels of each channel to 0..255. A channel with a single level does not change."""
    values = pixels.float()
    low, high = values.amin(dim=(2, 3), keepdim=True), values.amax(dim=(2, 3), keepdim=True)
    flat = high == low
    return ((values - low.masked_fill(flat, 0)) / ((high - low) / 255).masked_fill(flat, 1)).clamp_(0, 255).byte()


def equalize(pixels: Tensor, strengths: Tensor, matrices: Tensor) -> Tensor:
    """Equalises the histogram of each channel."""
    return tv.equalize(pixels)


def hue(pixels: Tensor, turns: Tensor, matrices: Tensor) -> Tensor:
    """Turns the hue of each pixel on the colour circle of HSV; 1 is a full turn."""
    red, green, blue = pixels.float().unbind(dim=1)  # (N, S, S) each
    value = red.maximum(green).maximum(blue)
    reach = value - red.minimum(green).minimum(blue)
    by = reach.masked_fill(reach == 0, 1)
    angle = torch.where(value == green, 2 + (blue - red) / by, 4 + (red - green) / by)
    angle = torch.where(value == red, (green - blue) / by, angle)  # in sixths of a turn, -1..5
    k = torch.stack([5 + angle, 3 + angle, 1 + angle], dim=1).add_(6 * _per_sample(turns)).remainder_(6)
    out = value[:, None] - reach[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)
    return (out * (255.999 / 255)).clamp_(0, 255).byte()  # as torchvision converts [0, 1] to levels


def gaussian_blur(pixels: Tensor, sigmas: Tensor, matrices: Tensor) -> Tensor:
    """Blurs each image by a Gaussian kernel with the sample's standard deviation in pixels, above 0.

    The width of the kernel is that of SimCLR (Chen et al. 2020): a tenth of the image size, made odd, but at least 3.
    As in torchvision, pixels outside the image are reflections of pixels inside.
    """
    size = pixels.shape[-1]
    radius = max(1, size // 20)
    positions = torch.arange(-radius, radius + 1, device=pixels.device)
    kernels = ((positions / sigmas[:, None]).square() / -2).softmax(dim=1)  # (N, 2 * radius + 1)
    values = F.pad(pixels.float(), [radius] * 4, mode="reflect")
    # A grouped convolution would be shorter, but cuDNN may search for its fastest kernel whenever N changes.
    for dim in (2, 3):
        blurred = torch.zeros_like(values.narrow(dim, 0, size))
        for shift, weights in enumerate(kernels.unbind(dim=1)):
            blurred.addcmul_(values.narrow(dim, shift, size), _per_sample(weights))
        values = blurred
    return values.round_().byte()


# Samples are sorted in this order, and neighbours with the same function share one call. Identity must be the first.
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
    "GaussianBlur": gaussian_blur,
}


def operate(pixels: Tensor, counts: list[int], strengths: Tensor, matrices: Tensor) -> Tensor:
    """Applies one operation to each sample of (N, 3, S, S) uint8. The samples must be sorted by operation.

    Args:
        counts: number of samples for each entry of OPERATIONS.
        strengths: (N,); Identity, AutoContrast, Equalize and the geometric operations do not use them.
        matrices: (N, 2, 3), used only by the geometric operations.
    """
    done, start = [], 0
    for function, entries in groupby(zip(OPERATIONS.values(), counts, strict=True), key=lambda entry: entry[0]):
        stop = start + sum(count for _, count in entries)
        if stop > start:
            done.append(function(pixels[start:stop], strengths[start:stop], matrices[start:stop]))
        start = stop
    return torch.cat(done)
