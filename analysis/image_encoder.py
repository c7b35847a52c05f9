"""The encoder of a checkpoint as one module: from pixels to features."""

from pathlib import Path

import torch
from torch import Tensor, nn

from experiment.trained import Trained, read_trained
from model.encoder import Encoder


class ImageEncoder(nn.Module):
    """Images, not augmented, to features: the EMA encoder after its normalisation.

    Attributes:
        encoder: takes normalised images (see its contract).
        mean, std: (3, 1, 1) of the training images, on the scale of [0, 1].
        image_size: height and width in pixels of the images that it was trained on.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, mean: list[float], std: list[float], image_size: int) -> None:
        super().__init__()
        self.encoder, self.image_size = encoder, image_size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(N, 3, image_size, image_size) uint8 -> {"pooled": (N, pooled_dim), "z": (N, latent_dim)}, float32."""
        views = pixels.float().div(255).sub(self.mean).div(self.std)
        return self.encoder.features(views)


def trained_encoder(trained: Trained) -> ImageEncoder:
    """The EMA encoder of a checkpoint that was read, on the host, in evaluation mode; raises CheckpointError."""
    mean, std = trained.statistics()
    return ImageEncoder(trained.soda().encoder, mean, std, trained.config.encoder_size).eval().requires_grad_(False)


def load_encoder(checkpoint: str | Path) -> ImageEncoder:
    """The EMA encoder of a checkpoint file, on the host, in evaluation mode; raises CheckpointError and ConfigError."""
    return trained_encoder(read_trained(None, Path(checkpoint), []))
