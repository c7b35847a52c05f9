"""Views of images: source and target views for training, augmented and plain views for the evaluation."""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from config import schema
from datasets.augmentation import Augmentation, Draw, Parameters, augment

SourceDraw = tuple[Draw, Tensor]
"""Random numbers of one source view: the draws of its augmentation, and standard normal noise (N, 3, S, S)."""

CPU_CHUNK = 512  # samples augmented at the same time; more would not fit in the CPU's caches


class Views:
    """Maker of views: batches of uint8 images (N, 3, S, S) -> batches of float32 views on `device`.

    Args:
        config: the `views` section; only `source` and `target` are used.
        image_size: height and width S of the images in pixels. All views are drawn at this size.
        decoder_size: height and width D in pixels of the images that the decoder denoises; D divides S.
        mean, std: statistics of the data set's channels, on the scale of [0, 1].
    """

    def __init__(
        self,
        config: schema.Views,
        image_size: int,
        decoder_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> None:
        self._source = Augmentation(config.source, image_size)
        self._target = Augmentation(config.target, image_size)
        self._image_size, self._decoder_size = image_size, decoder_size
        self._noise_std = config.source.noise_std
        self._device = device
        self._mean = torch.tensor(mean, device=device)[:, None, None]
        self._std = torch.tensor(std, device=device)[:, None, None]

    def _augment(self, pixels: Tensor, parameters: Parameters) -> Tensor:
        pixels = pixels.to(self._device, non_blocking=True)
        size = CPU_CHUNK if self._device.type == "cpu" else len(pixels)
        starts = range(0, len(pixels), size)
        return torch.cat([augment(pixels[s : s + size], parameters[s : s + size]) for s in starts])

    def _normalize(self, pixels: Tensor) -> Tensor:
        return pixels.to(self._device, non_blocking=True).float().div_(255).sub_(self._mean).div_(self._std)

    def denormalize(self, views: Tensor) -> Tensor:
        """Converts normalised views back to the scale of [0, 1], for pictures."""
        return views * self._std + self._mean

    def x_start(self, pixels: Tensor) -> Tensor:
        """Converts pixels (N, 3, S, S) uint8, on any device, to images of the decoder (N, 3, D, D) in [-1, 1]."""
        return self._reduce(pixels.float().div_(127.5).sub_(1))

    def x_start_of(self, views: Tensor) -> Tensor:
        """Converts normalised views (N, 3, S, S) to images of the decoder (N, 3, D, D) in [-1, 1]."""
        return self._reduce(self.denormalize(views) * 2 - 1)

    def _reduce(self, images: Tensor) -> Tensor:
        """Averages images (N, 3, S, S) over squares of S/D x S/D pixels: (N, 3, D, D)."""
        factor = self._image_size // self._decoder_size
        return F.avg_pool2d(images, factor) if factor > 1 else images

    def source(self, pixels: Tensor, sources: Sequence[SourceDraw]) -> Tensor:
        """Returns x_source (N, K, 3, S, S): augmented and normalised pixels plus `noise_std` times the noise.

        Args:
            sources: random numbers of the K source views.
        """
        return self._stack([self._augment(pixels, self._source.parameters(draw)) for draw, _ in sources], sources)

    def pair(self, pixels: Tensor, sources: Sequence[SourceDraw], target: Draw) -> tuple[Tensor, Tensor]:
        """Returns (x_source (N, K, 3, S, S), x_start (N, 3, D, D)).

        x_source is made as in `source`. x_start is augmented, scaled to [-1, 1] and then averaged down to the decoder's
        size. All views are augmented as one batch, because this needs fewer calls.
        """
        parameters = [self._source.parameters(draw) for draw, _ in sources] + [self._target.parameters(target)]
        pixels = pixels.to(self._device, non_blocking=True)
        views = self._augment(pixels.repeat(len(parameters), 1, 1, 1), reduce(Parameters.concatenate, parameters))
        *augmented, target_view = views.split(len(pixels))
        return self._stack(augmented, sources), self.x_start(target_view)

    def _stack(self, augmented: Sequence[Tensor], sources: Sequence[SourceDraw]) -> Tensor:
        views = [
            self._normalize(pixels).add_(noise, alpha=self._noise_std)
            for pixels, (_, noise) in zip(augmented, sources, strict=True)
        ]
        return torch.stack(views, dim=1) if len(views) > 1 else views[0][:, None]  # one view needs no copy

    def augmented(self, pixels: Tensor, draw: Draw, view: schema.View) -> Tensor:
        """Returns augmented views for the evaluation: augmented by `view`, such as `views.probe`, and normalised."""
        return self._normalize(self._augment(pixels, Augmentation(view, self._image_size).parameters(draw)))

    def evaluation(self, pixels: Tensor) -> Tensor:
        """Returns clean views for the evaluation: normalised, not augmented."""
        return self._normalize(pixels)
