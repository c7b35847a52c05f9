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
        encoder_size: height and width S in pixels of the images. All views are drawn at this size.
        decoder_size: height and width D in pixels of the images that the decoder denoises; D divides S.
        mean, std: statistics of the data set's channels, on the scale of [0, 1].
    """

    def __init__(
        self,
        config: schema.Views,
        *,
        encoder_size: int,
        decoder_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> None:
        self._source = Augmentation(config.source, encoder_size)
        self._target = Augmentation(config.target, encoder_size)
        self._encoder_size, self._decoder_size = encoder_size, decoder_size
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
        factor = self._encoder_size // self._decoder_size
        return F.avg_pool2d(images, factor) if factor > 1 else images

    def source(self, pixels: Tensor, source: SourceDraw) -> Tensor:
        """Returns one source view (N, 3, S, S): augmented and normalised pixels plus `noise_std` times the noise."""
        draw, noise = source
        return self._noisy(self._augment(pixels, self._source.parameters(draw)), noise)

    def _noisy(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return self._normalize(pixels).add_(noise, alpha=self._noise_std)

    def pair(self, pixels: Tensor, sources: Sequence[SourceDraw], target: Draw) -> tuple[Tensor, Tensor]:
        """Returns (x_source (N, K, 3, S, S), x_start (N, 3, D, D)).

        Each source view is made as in `source`. x_start is augmented, scaled to [-1, 1] and then averaged down to the
        decoder's size. All views are augmented as one batch, because this needs fewer calls.

        Args:
            sources: random numbers of the K source views.
            target: random numbers of the target view.
        """
        parameters = [self._source.parameters(draw) for draw, _ in sources] + [self._target.parameters(target)]
        pixels = pixels.to(self._device, non_blocking=True)
        views = self._augment(pixels.repeat(len(parameters), 1, 1, 1), reduce(Parameters.concatenate, parameters))
        *augmented, target_view = views.split(len(pixels))
        source_views = [self._noisy(view, noise) for view, (_, noise) in zip(augmented, sources, strict=True)]
        first, *others = source_views
        x_source = torch.stack(source_views, dim=1) if others else first[:, None]  # one view needs no copy
        return x_source, self.x_start(target_view)

    def augmented(self, pixels: Tensor, draw: Draw, view: schema.View) -> Tensor:
        """Returns augmented views for the evaluation: augmented by `view`, such as `views.probe`, and normalised."""
        return self._normalize(self._augment(pixels, Augmentation(view, self._encoder_size).parameters(draw)))

    def evaluation(self, pixels: Tensor) -> Tensor:
        """Returns clean views for the evaluation: normalised, not augmented."""
        return self._normalize(pixels)
