"""Controls for SODA: the encoder of a config, trained on the same images by another objective.

To add a control, write a subclass of Control and add it to CONTROLS.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.errors import ConfigError
from config.keys import flat
from config.schema import Config
from experiment.batch import Pixels, source_draws
from experiment.opening import Experiment
from training.state import Snapshot, TrainState
from training.step import learning_rates, update
from utils import cli
from utils.device import autocast
from utils.logging import PhaseTimer

# Keys of the decoder and of its objective. A plan may set them for its other stages.
OF_THE_DECODER = (
    "decoder.",
    "diffusion.",
    "views.target.",
    "views.same",
    "optimizer.decoder_lr",
    "training.mask.",
    "training.timesteps.",
    "training.min_snr_gamma",
)
# Keys that change how SODA trains the encoder. A control does the same only if they are switched off.
OF_THE_ENCODER = (
    *("views.num_sources", "training.micro_batch_size", "training.compile", "training.terms."),
    *("encoder.frozen", "encoder.time_dependent"),
)


class Control(nn.Module, ABC):
    """An objective for the encoder alone, with the layers that only this objective needs.

    A training step reads the same images as SODA's, in the same order, and draws the same source views. The decoder is
    not used. Only one process can train.

    Attributes:
        num_views: number of source views of each image.
        package: package that is needed in addition to requirements.txt; None: none.
    """

    num_views: ClassVar[int] = 1
    package: ClassVar[str | None] = None

    @abstractmethod
    def loss(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of a batch, a scalar.

        Args:
            pooled: (N, K, pooled_dim) pooled features of the K = `num_views` views of each image.
            labels: (N,) int64.
        """


class SimCLR(Control):
    """SimCLR (Chen et al. 2020): views of an image attract each other, and views of other images repel.

    The loss is NT-Xent of pytorch-metric-learning on a projection of the pooled features.
    """

    num_views = 2
    package = "pytorch_metric_learning"

    def __init__(self, pooled_dim: int, num_classes: int) -> None:
        from pytorch_metric_learning.losses import NTXentLoss

        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(pooled_dim, pooled_dim), nn.ReLU(inplace=True), nn.Linear(pooled_dim, 128)
        )
        self.nt_xent = NTXentLoss(temperature=0.5)

    def loss(self, pooled: Tensor, labels: Tensor) -> Tensor:
        projected = self.projection(pooled).float().flatten(0, 1)  # (N K, 128)
        of_image = torch.arange(len(pooled), device=pooled.device).repeat_interleave(pooled.shape[1])
        found: Tensor = self.nt_xent(projected, of_image)
        return found


class Supervised(Control):
    """Classification with labels: cross-entropy of a linear layer on the pooled features."""

    def __init__(self, pooled_dim: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(pooled_dim, num_classes)

    def loss(self, pooled: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(pooled[:, 0]).float(), labels)


CONTROLS: dict[str, type[Control]] = {"simclr": SimCLR, "supervised": Supervised}


def check_control(name: str, config: Config, common: Config | None = None) -> None:
    """Raises ConfigError if there is no such control, its package is missing, or it would ignore a key of the config.

    Args:
        common: the config without the overrides of the control's own variant, which must not set keys of the decoder;
            None: this is not checked.
    """
    if name not in CONTROLS:
        raise ConfigError(f"there is no control {name}: choose one of {', '.join(CONTROLS)}")
    package = CONTROLS[name].package
    if package:
        cli.require(package)
    values, common_values, defaults = flat(config), flat(common or config), flat(Config())
    ignored = [key for key in values if key.startswith(OF_THE_DECODER) and values[key] != common_values[key]]
    ignored += [key for key in values if key.startswith(OF_THE_ENCODER) and values[key] not in (defaults[key], False)]
    if ignored:
        raise ConfigError(f"the control {name} ignores {', '.join(ignored)}: do not set it")
    if config.data.has_cameras:
        raise ConfigError(f"the control {name} ignores cameras: choose another data set than data.name=posed")
    if config.evaluation.features.startswith("decoder."):
        raise ConfigError(f"the control {name} trains no decoder: set evaluation.features to z or pooled")


def attach_control(experiment: Experiment, state: TrainState, name: str) -> Control:
    """Adds a control to the model and to the optimiser of `state`, with the encoder's learning rate, and returns it.

    Raises ConfigError if the control would ignore a key of the experiment's config.
    """
    check_control(name, experiment.config)
    control = CONTROLS[name](state.soda.encoder.pooled_dim, len(experiment.info.classes)).to(experiment.device)
    state.soda.control = control  # saved in checkpoints
    state.optimizer.add_param_group({**state.optimizer.param_groups[0], "params": list(control.parameters())})
    return control


def control_step(experiment: Experiment, state: TrainState, control: Control, pixels: Iterator[Pixels]) -> Tensor:
    """Runs one optimiser step with a control's objective. Returns the loss, a scalar on the device.

    If the norm of the gradient is not finite, the step is skipped: weights and BatchNorm statistics do not change.

    Args:
        pixels: iterator made by `training_pixels`, at `state.step`.
    """
    positions = range(experiment.config.training.batch_size)
    draws = source_draws(experiment, control.num_views, positions, "source", state.step)
    images = next(pixels)
    assert isinstance(images, Tensor), "check_control refuses images with cameras"
    images = images.to(experiment.device)
    x = torch.stack([experiment.views.source(images, draw) for draw in draws], dim=1)  # (N, K, 3, S, S)
    assert experiment.train.labels is not None
    labels = experiment.train.labels[experiment.loader.indices(state.step, positions)].to(experiment.device)
    lr, _ = learning_rates(experiment, state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.soda.train()
    before = Snapshot(state.soda.buffers())
    with autocast(experiment.device, experiment.amp_dtype):
        pooled = state.soda.encoder.pooled(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        loss = control.loss(pooled, labels)
    state.scaler.scale(loss).backward()
    update(state, experiment.config.optimizer.max_grad_norm, before, PhaseTimer())
    return loss.detach()
