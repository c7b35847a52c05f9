"""The encoder of a checkpoint as one module that maps pixels to features."""

from pathlib import Path

import torch
from torch import Tensor, nn

from experiment.trained import Trained, read_trained
from model.encoder import Encoder


class ImageEncoder(nn.Module):
    """The EMA encoder with the normalisation of its input. Images are not augmented.

    Attributes:
        encoder: maps normalised images to features (the interface is `Encoder`).
        mean, std: (3, 1, 1) mean and standard deviation of the training images per channel, for pixels in [0, 1].
        image_size: height and width in pixels of the images that the encoder was trained on.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, mean: list[float], std: list[float], image_size: int) -> None:
        super().__init__()
        self.encoder, self.image_size = encoder, image_size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Maps (N, 3, image_size, image_size) uint8 to {"pooled": (N, pooled_dim), "z": (N, latent_dim)}, float32."""
        views = pixels.float().div(255).sub(self.mean).div(self.std)
        return self.encoder.features(views)


def trained_encoder(trained: Trained) -> ImageEncoder:
    """Returns the EMA encoder of a checkpoint that has been read, on the host in evaluation mode.

    Raises CheckpointError if the checkpoint does not fit its config, or holds no statistics of its images.
    """
    mean, std = trained.statistics()
    return ImageEncoder(trained.soda().encoder, mean, std, trained.config.encoder_size).eval().requires_grad_(False)


def load_encoder(checkpoint: str | Path) -> ImageEncoder:
    """Returns the EMA encoder of a checkpoint file, on the host in evaluation mode.

    Raises CheckpointError if the checkpoint cannot be used, and ConfigError if its config is not valid.
    """
    return trained_encoder(read_trained(None, Path(checkpoint), []))
