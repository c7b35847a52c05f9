"""Similarity of generated views and true ones: of whole images, and of the objects in them."""

import logging
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.decoding import decode
from datasets.images import DatasetError
from datasets.posed import image_folder, mask_of
from evaluation.novel_views.scenes import Targets
from evaluation.quality import ssim_maps

BACKGROUND = 0.95  # without masks, pixels whose darkest channel is at least this are background
MAX_PSNR = 60.0  # dB; data sets may hold an object twice, and equal images have an infinite PSNR

logger = logging.getLogger(__name__)


def similarity(images: Tensor, truth: Tensor, inside: Tensor, own: Tensor | None) -> Tensor:
    """Returns (N, 5): PSNR and SSIM, of the whole image and inside the object, and the error of the mean colour.

    The scores of the object are NaN for images without one in `truth`.

    Args:
        images, truth: (N, 3, H, W) in [-1, 1].
        inside: (N, H, W) bool, pixels of the object in `truth`.
        own: pixels of the object in `images`; None: those whose darkest channel is below BACKGROUND.
    """
    errors = ((images - truth) / 2).square().mean(dim=1)  # (N, H, W), for values in [0, 1]
    maps = ssim_maps(images, truth).mean(dim=1)
    own = is_object(images) if own is None else own
    color = (_mean_color(images, own) - _mean_color(truth, inside)).abs().mean(dim=1)
    color = torch.where(inside.any(dim=(1, 2)), color, math.nan)
    everywhere = torch.ones_like(inside)
    columns = [_decibels(errors, everywhere), _decibels(errors, inside)]
    columns += [_mean_inside(maps, everywhere), _mean_inside(maps, inside), color]
    return torch.stack(columns, dim=1)


def is_object(images: Tensor) -> Tensor:
    """Returns the pixels (N, H, W) bool of images (N, 3, H, W) in [-1, 1] whose darkest channel is below BACKGROUND."""
    return images.amin(dim=1) / 2 + 0.5 < BACKGROUND


def _mean_inside(values: Tensor, inside: Tensor) -> Tensor:
    """Returns the mean (N,) of values (N, H, W) over the pixels `inside`; NaN if there are none."""
    return (values * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2))


def _decibels(errors: Tensor, inside: Tensor) -> Tensor:
    return (-10 * _mean_inside(errors, inside).log10()).clamp(max=MAX_PSNR)


def _mean_color(images: Tensor, inside: Tensor) -> Tensor:
    """Returns the mean colours (N, 3) in [0, 1]. An image without an object counts as white."""
    total = ((images / 2 + 0.5) * inside[:, None]).sum(dim=(2, 3))
    count = inside.sum(dim=(1, 2))[:, None]
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


class Masks:
    """Pixels of the objects in the targets: from mask files if every target has one, else pixels that are not white.

    A pixel of a mask belongs to the object if it is brighter than half of the mask's brightest pixel. Masks with the
    values 0 and 1 therefore work as well. Raises DatasetError if a mask cannot be used.

    Attributes:
        files: files of the masks; empty: there are none.
        rule: the choice between masks and light pixels, in words.
    """

    def __init__(self, targets: Targets) -> None:
        self._experiment = targets.scenes.experiment
        folder = image_folder(Path(self._experiment.config.data.root), log=False)
        images = [targets.scenes.name(each.index) for each in targets]
        files = [mask_of(folder, image) if image else None for image in images]
        self.files = [file for file in files if file is not None]
        self.rule = "masks"
        if len(self.files) < len(targets):
            self.rule = f"pixels whose darkest channel is below {BACKGROUND:g}"
            without = [image for image, file in zip(images, files, strict=True) if file is None]
            found = (
                f"{len(self.files)} of the {len(targets)} targets have a mask, so none is used ({without[0]} has none)"
                if self.files
                else "no masks"
            )
            logger.info("novel views: %s: the object is taken to be the %s", found, self.rule)
            self.files = []
        for file, image in zip(self.files, images, strict=False):
            _check_mask(file, folder / (image or ""))

    def of(self, positions: range, truth: Tensor) -> Tensor:
        """Returns the pixels (N, D, D) bool of the objects in the true views at `positions`."""
        if not self.files:
            return is_object(truth)
        size, rules = self._experiment.config.data.kept_size, self._experiment.rules
        masks = [
            torch.from_numpy(decode(file, size, rules).copy()) for file in self.files[positions.start : positions.stop]
        ]
        found = self._experiment.views.x_start(torch.stack(masks).permute(0, 3, 1, 2).to(truth.device))
        found = found.mean(dim=1) / 2 + 0.5  # (N, D, D), from 0 to 1
        return found > found.amax(dim=(1, 2), keepdim=True) / 2


def _check_mask(file: Path, image_file: Path) -> None:
    """Raises DatasetError if the mask does not have the shape of its image, or is transparent."""
    try:
        with Image.open(file) as mask, Image.open(image_file) as image:
            if abs(mask.width * image.height - mask.height * image.width) > max(mask.size) + max(image.size):
                raise DatasetError(
                    f"the mask {file} has {mask.width} x {mask.height} pixels, and its image {image.width} x "
                    f"{image.height}: give them the same shape"
                )
            if mask.has_transparency_data and np.asarray(mask.convert("RGBA"))[..., 3].min() < 255:
                raise DatasetError(f"the mask {file} is transparent: save it as white on black")
    except OSError as error:
        raise DatasetError(f"cannot read the mask {file} or its image ({error}): restore it") from None
