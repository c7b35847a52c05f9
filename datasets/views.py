"""The views of an image: source and target for training, the probe's augmentation, and the plain test view.

Every augmentation goes a sample at a time through torchvision's transforms on PIL images, each sample seeded, so
a view is a function of the image and its seed alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2


def _augmentation(view: Any, image_size: int) -> v2.Compose:
    """A PIL image -> a PIL image of the same size, by the keys of one `views.*` section of the config."""
    steps = []
    if view.crop_flip_probability > 0:
        crop = v2.RandomResizedCrop(image_size, scale=view.crop_scale, ratio=view.crop_ratio)
        flip = v2.RandomHorizontalFlip(view.flip_probability)
        steps.append(v2.RandomApply([crop, flip], p=view.crop_flip_probability))
    if view.randaugment_probability > 0:
        randaugment = v2.RandAugment(view.randaugment_num_ops, view.randaugment_magnitude)
        steps.append(v2.RandomApply([randaugment], p=view.randaugment_probability))
    if view.affine_probability > 0:
        affine = v2.RandomAffine(
            view.affine_degrees,
            translate=(view.affine_translate, view.affine_translate),
            scale=view.affine_scale,
            shear=view.affine_shear,
            interpolation=v2.InterpolationMode.BILINEAR,
        )
        steps.append(v2.RandomApply([affine], p=view.affine_probability))
    return v2.Compose(steps or [v2.Identity()])


def _augment(pixels: Tensor, seeds: Sequence[int], augmentation: v2.Compose) -> Tensor:
    """(N, 3, H, W) uint8 -> the same, each sample augmented with its own seed; the global generator is left alone."""
    out = torch.empty_like(pixels)
    before = torch.random.get_rng_state()
    for index, (image, seed) in enumerate(zip(pixels.permute(0, 2, 3, 1).numpy(), seeds, strict=True)):
        torch.default_generator.manual_seed(seed)
        out[index] = v2.functional.pil_to_tensor(augmentation(Image.fromarray(image)))
    torch.random.set_rng_state(before)
    return out


class Views:
    """Batches of uint8 images (N, 3, H, W) on the host -> batches of float32 views on `device`.

    Args:
        config: the `views` section, of which `source` and `target` are used, each the keys of an augmentation.
        mean, std: of the data set's channels, on the scale of [0, 1].
    """

    def __init__(
        self, config: Any, image_size: int, mean: Sequence[float], std: Sequence[float], device: torch.device
    ) -> None:
        self._source = _augmentation(config.source, image_size)
        self._target = _augmentation(config.target, image_size)
        self._image_size = image_size
        self._noise_std = config.source.noise_std
        self._device = device
        self._mean = torch.tensor(mean, device=device)[:, None, None]
        self._std = torch.tensor(std, device=device)[:, None, None]

    def _normalize(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self._device, non_blocking=True).float() / 255 - self._mean) / self._std

    def denormalize(self, views: Tensor) -> Tensor:
        """Normalised views back on the scale of [0, 1], for pictures."""
        return views * self._std + self._mean

    def source(self, pixels: Tensor, seeds: Sequence[int], noise: Tensor) -> Tensor:
        """x_source: augmented, normalised, plus `noise` (N, 3, H, W), standard normal, times `noise_std`."""
        return self._normalize(_augment(pixels, seeds, self._source)) + self._noise_std * noise

    def target(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        """x_start: augmented and scaled to [-1, 1]."""
        return _augment(pixels, seeds, self._target).to(self._device, non_blocking=True).float() / 127.5 - 1

    def augmented(self, pixels: Tensor, seeds: Sequence[int], view: Any) -> Tensor:
        """A training view of the evaluation: augmented by the keys of `view`, such as `views.probe`; normalised."""
        return self._normalize(_augment(pixels, seeds, _augmentation(view, self._image_size)))

    def evaluation(self, pixels: Tensor) -> Tensor:
        """The test view: normalised, nothing else."""
        return self._normalize(pixels)
