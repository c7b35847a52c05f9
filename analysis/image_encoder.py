"""The encoder of a checkpoint as one module that maps pixels to features."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from datasets.decoding import central_square
from datasets.operations import resize as resize_antialiased
from experiment.trained import Trained, check_no_cameras, check_timestep, read_trained
from model.encoder import Encoder


class ImageEncoder(nn.Module):
    """The EMA encoder with the normalisation of its input. Images are not augmented.

    Args:
        stored_size: size in pixels of the squares that `image_size` was made from (`data.stored_size`), or None. Such
            squares are accepted as well. They are resized in the same way as for training and evaluation.
        resize: True accepts images of any size. Their central square is resized on the host, in the same way as the
            data sets decode image files.

    Attributes:
        encoder: maps normalised images to features (the interface is `Encoder`).
        mean, std: (3, 1, 1) mean and standard deviation of the training images per channel, for pixels in [0, 1].
        image_size: height and width in pixels of the images that the encoder was trained on.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        image_size: int,
        stored_size: int | None = None,
        resize: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.image_size, self.resize = encoder, image_size, resize
        self._stored_size = stored_size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Maps (N, 3, image_size, image_size) uint8 to {"pooled": (N, pooled_dim), "z": (N, latent_dim)}, float32.

        Stored squares, of (stored_size, stored_size), are resized first.

        Raises:
            TypeError: the pixels are not a uint8 tensor.
            ValueError: the pixels have another shape, and their height and width cannot be changed because `resize` is
                not set.
        """
        self._check(pixels)
        if tuple(pixels.shape[2:]) not in self._sizes():
            pixels = _resize(pixels, self._stored_size or self.image_size)
        if pixels.shape[-1] != self.image_size:
            pixels = resize_antialiased(pixels, self.image_size)
        views = pixels.float().div(255).sub(self.mean).div(self.std)
        return self.encoder.features(views)

    def _sizes(self) -> list[tuple[int, int]]:
        """Returns the sizes (height, width) of the images that are not cropped."""
        return [(size, size) for size in (self.image_size, self._stored_size) if size]

    def _check(self, pixels: Tensor) -> None:
        size = self.image_size
        if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8:
            kind = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
            raise TypeError(
                f"the encoder takes a uint8 tensor of pixels from 0 to 255, not {kind}: convert pixels x in [0, 1] by "
                "(255 * x).round().byte(), and integers from 0 to 255 by torch.as_tensor(x).byte()"
            )
        shape = tuple(pixels.shape)
        if pixels.ndim != 4 or shape[1] != 3:
            raise ValueError(f"the encoder takes pixels (N, 3, {size}, {size}), not {shape}: change their shape")
        if not self.resize and shape[2:] not in self._sizes():
            raise ValueError(
                f"the encoder takes pixels (N, 3, {size}, {size}), not {shape}: resize them, or call "
                "load_encoder(checkpoint, resize=True)"
            )


def _resize(pixels: Tensor, size: int) -> Tensor:
    """Returns the central squares of images (N, 3, H, W) uint8, resized by PIL: (N, 3, size, size) uint8."""
    height, width = pixels.shape[2:]
    box = central_square(width, height)
    images = (Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy())
    squares = [np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box)) for image in images]
    resized = torch.from_numpy(np.stack(squares) if squares else np.zeros((0, size, size, 3), np.uint8))
    return resized.permute(0, 3, 1, 2).to(pixels.device)


def trained_encoder(trained: Trained, resize: bool = False, timestep: int | None = None) -> ImageEncoder:
    """Returns the EMA encoder of a checkpoint that has been read, on the host in evaluation mode.

    Raises CheckpointError if the checkpoint does not fit its config, or holds no statistics of its images, and
    ConfigError if a time-dependent encoder has no timestep.
    """
    check_timestep(trained.config, timestep)
    check_no_cameras(trained.config, "an encoder of single images, as of embed.py and load_encoder,")
    (mean, std), encoder = trained.statistics(), trained.soda().encoder
    size, stored_size = trained.config.encoder_size, trained.config.data.stored_size
    of_one_z = encoder if timestep is None else encoder.at(timestep)
    return ImageEncoder(of_one_z, mean, std, size, stored_size, resize).eval().requires_grad_(False)


def load_encoder(checkpoint: str | Path, resize: bool = False, timestep: int | None = None) -> ImageEncoder:
    """Returns the EMA encoder of a checkpoint file, on the host in evaluation mode.

    Raises CheckpointError if the checkpoint cannot be used, and ConfigError if its config is not valid, or if a
    time-dependent encoder has no timestep.

    Args:
        resize: False: the encoder takes only images of the size that it was trained on, and squares of
            data.stored_size. True: it crops and resizes others.
        timestep: timestep of the features of a time-dependent encoder (`encoder.time_dependent`).
    """
    return trained_encoder(read_trained(None, Path(checkpoint), []), resize, timestep)
