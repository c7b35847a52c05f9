"""Views of images: source and target views for training, augmented and plain views for the evaluation."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from config import schema
from datasets.augmentation import Augmentation, Draw, Parameters, augment
from datasets.operations import resize
from utils.threads import map_in_threads

SourceDraw = tuple[Draw, Tensor]
"""Random numbers of one source view: the draws of its augmentation, and standard normal noise (N, 3, S, S)."""

CPU_CHUNK = 2**20  # pixels of the views that a CPU thread augments at the same time; more would not fit in its caches


class Views:
    """Maker of views: batches of uint8 images (N, 3, P, P) -> batches of float32 views on `device`.

    Without a stored size, images have the encoder's size: P = S. Both views are drawn at this size, and the target view
    is averaged down to the decoder's size D. With a stored size P, each view is cropped from the stored image and is
    resized once, with antialiasing, to its own size. This is the usual augmentation of photographs, because a small
    crop then has details that an image of S pixels has lost.

    Args:
        config: the `views` section; only `source` and `target` are used.
        encoder_size: height and width S in pixels of the views that the encoder receives.
        decoder_size: height and width D in pixels of the images that the decoder denoises; D divides S.
        stored_size: height and width P in pixels of the images, or None.
        mean, std: statistics of the data set's channels, on the scale of [0, 1].
    """

    def __init__(
        self,
        config: schema.Views,
        *,
        encoder_size: int,
        decoder_size: int,
        stored_size: int | None = None,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> None:
        self._source = Augmentation(config.source, encoder_size, stored_size)
        self._target = Augmentation(config.target, decoder_size if stored_size else encoder_size, stored_size)
        self._encoder_size, self._decoder_size, self._stored_size = encoder_size, decoder_size, stored_size
        self._noise_std = config.source.noise_std
        self._device = device
        self._mean = torch.tensor(mean, device=device)[:, None, None]
        self._std = torch.tensor(std, device=device)[:, None, None]

    def _augment(self, pixels: Tensor, parameters: Parameters, size: int) -> Tensor:
        """Returns augmented pixels (N, 3, size, size) uint8."""
        pixels = pixels.to(self._device, non_blocking=True)
        to_size = size if self._stored_size else None
        return self._in_parts(len(pixels), size, lambda part: augment(pixels[part], parameters[part], to_size))

    def _normalize(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self._device, non_blocking=True)
        return self._in_parts(
            len(pixels),
            pixels.shape[-1],
            lambda part: pixels[part].float().div_(255).sub_(self._mean).div_(self._std),
        )

    def _in_parts(self, num_samples: int, size: int, make: Callable[[slice], Tensor]) -> Tensor:
        """Returns make(part) for all parts of a batch of views of `size` pixels. On CPUs, threads share the parts."""
        if self._device.type != "cpu" or num_samples == 0:
            return make(slice(0, num_samples))
        threads = torch.get_num_threads()
        rounds = math.ceil(num_samples * size**2 / (threads * CPU_CHUNK))
        chunk = math.ceil(num_samples / (threads * rounds))
        parts = [slice(start, start + chunk) for start in range(0, num_samples, chunk)]
        return torch.cat(map_in_threads(make, parts))

    def denormalize(self, views: Tensor) -> Tensor:
        """Converts normalised views back to the scale of [0, 1], for pictures."""
        return views * self._std + self._mean

    def x_start(self, pixels: Tensor) -> Tensor:
        """Converts pixels (N, 3, P, P) uint8, on any device, to images of the decoder (N, 3, D, D) in [-1, 1]."""
        return self._reduce(_scale(pixels)) if self._stored_size is None else _scale(resize(pixels, self._decoder_size))

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
        augmented = self._augment(pixels, self._source.parameters(draw), self._encoder_size)
        return self._normalize(augmented).add_(noise, alpha=self._noise_std)

    def pair(
        self,
        pixels: Tensor,
        sources: Sequence[SourceDraw],
        target: Draw,
        source_pixels: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (x_source (N, K, 3, S, S), x_start (N, 3, D, D)).

        Each source view is made as in `source`. The target view is augmented and scaled to [-1, 1].

        Args:
            sources: random numbers of the K source views.
            target: random numbers of the target view.
            source_pixels: images of each source view, on the same device, if they are other images than `pixels`.
        """
        pixels = pixels.to(self._device, non_blocking=True)
        seen = [pixels] * len(sources) if source_pixels is None else source_pixels
        source_views = [self.source(images, source) for images, source in zip(seen, sources, strict=True)]
        first, *others = source_views
        x_source = torch.stack(source_views, dim=1) if others else first[:, None]  # one view needs no copy
        size = self._encoder_size if self._stored_size is None else self._decoder_size
        return x_source, self.x_start(self._augment(pixels, self._target.parameters(target), size))

    def augmented(self, pixels: Tensor, draw: Draw, view: schema.View) -> Tensor:
        """Returns augmented views for the evaluation: augmented by `view`, such as `views.probe`, and normalised."""
        parameters = Augmentation(view, self._encoder_size, self._stored_size).parameters(draw)
        return self._normalize(self._augment(pixels, parameters, self._encoder_size))

    def evaluation(self, pixels: Tensor) -> Tensor:
        """Returns clean views for the evaluation (N, 3, S, S): normalised, not augmented.

        Stored images are resized as a whole. They are already central squares, so nothing more is cropped.
        """
        return self._normalize(pixels if self._stored_size is None else resize(pixels, self._encoder_size))


def _scale(pixels: Tensor) -> Tensor:
    """Converts levels from 0 to 255 to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)
