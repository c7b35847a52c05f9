"""The classifier: an encoder and a linear layer on its features."""

import logging

import torch
from torch import Tensor, nn

from config.errors import ConfigError
from config.finetune_schema import FinetuneConfig
from experiment.models import NOT_LAYERS
from experiment.starting import StartingWeights, read_parts
from model.build import build_encoder
from model.encoder import Encoder, OnEncoder

logger = logging.getLogger(__name__)


class Classifier(OnEncoder):
    """logits = linear(BatchNorm(features of the encoder)). The linear layer starts at zero.

    Args:
        features: `pooled` or `z`.
        batch_norm: False leaves BatchNorm out.

    Attributes:
        timestep: parameter of a time-dependent encoder's timestep, sigmoid(timestep) * (T - 1), which starts in the
            middle and is trained; None: the encoder does not depend on the timestep.
    """

    def __init__(self, encoder: Encoder, num_classes: int, features: str, batch_norm: bool) -> None:
        super().__init__(encoder)
        self._pooled = features == "pooled"
        width = encoder.pooled_dim if self._pooled else encoder.latent_dim
        # A BatchNorm2d, because data_parallel makes it normalise over all processes.
        self.norm: nn.Module = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.head = nn.Linear(width, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.timestep = nn.Parameter(torch.zeros(())) if encoder.is_time_dependent else None

    def features(self, x: Tensor) -> Tensor:
        """Returns the features (N, D) of images (N, 3, H, W), normalised as the encoder expects them."""
        timesteps = None
        if self.timestep is not None and self.encoder.time is not None:
            timesteps = self.timestep.sigmoid()[None] * (self.encoder.time.num_timesteps - 1)  # (1,)
        return self.encoder.pooled(x, timesteps) if self._pooled else self.encoder(x, timesteps)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (N, num_classes) of images (N, 3, H, W)."""
        return self.head(self.norm(self.features(x)[:, :, None, None]).flatten(1))

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Returns the trained parameters in groups, from the first layers of the encoder to the layers on top of it."""
        top = [*self.norm.parameters(), *self.head.parameters()]
        if self.timestep is not None:
            top.append(self.timestep)
        groups = [*self.encoder.layer_groups(), top]
        trained = [[each for each in group if each.requires_grad] for group in groups]
        return [group for group in trained if group]


def build_classifier(config: FinetuneConfig, num_classes: int) -> Classifier:
    """Builds the classifier of a config. Its initial weights are drawn from torch's default generator."""
    keys = config.classifier
    encoder = build_encoder(config.encoder.model_dump(exclude=NOT_LAYERS), config.diffusion.model_dump())
    classifier = Classifier(encoder, num_classes, keys.features, keys.batch_norm)
    if keys.features == "pooled":
        classifier.encoder.fc.requires_grad_(False)  # not used
    return classifier


def read_starting_weights(config: FinetuneConfig) -> dict[str, StartingWeights]:
    """Collective. Returns the weights that the encoder starts from, as {"encoder": ...}; {} if the config names none.

    Raises ConfigError if the file is missing, does not fit the encoder, or is not the same on all ranks.
    """
    with torch.device("meta"):
        classifier = build_classifier(config, num_classes=1)
    found = read_parts(config, {"encoder": config.encoder.weights}, classifier)
    if config.method == "probe" and not found:
        logger.info("method=probe without encoder.weights: the encoder keeps its random initial weights")
    elif config.method == "probe" and config.classifier.features == "z" and found["encoder"].new:
        raise ConfigError(
            f"method=probe needs all weights, but {config.encoder.weights} has no {found['encoder'].new[0]} of the "
            "model's shape: set encoder.latent_dim to the width in the file, or classifier.features=pooled"
        )
    return found
