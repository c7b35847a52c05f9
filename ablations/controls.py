"""Controls for SODA: the encoder of a config, trained on the same images by another objective.

To add a control, write a subclass of Control and add it to CONTROLS and to the names in ablations/plan.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.batch import source_draws
from experiment.opening import Experiment
from training.state import Snapshot, TrainState
from training.step import learning_rates
from utils.device import autocast


class Control(nn.Module, ABC):
    """An objective for the encoder alone, with the layers that only this objective needs.

    A training step reads the same images as SODA's, in the same order, and draws the same source views. The decoder is
    not used. Only one process can train.

    Attributes:
        num_views: number of source views of each image.
    """

    num_views = 1

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

    def __init__(self, pooled_dim: int, num_classes: int) -> None:
        from pytorch_metric_learning.losses import NTXentLoss

        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(pooled_dim, pooled_dim), nn.ReLU(inplace=True), nn.Linear(pooled_dim, 128)
        )
        self.nt_xent = NTXentLoss(temperature=0.5)

    def loss(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """See Control.loss."""
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
        """See Control.loss."""
        return F.cross_entropy(self.classifier(pooled[:, 0]).float(), labels)


CONTROLS: dict[str, type[Control]] = {"simclr": SimCLR, "supervised": Supervised}


def attach_control(experiment: Experiment, state: TrainState, name: str) -> Control:
    """Adds a control to the model and to the optimiser of `state`, with the encoder's learning rate, and returns it."""
    control = CONTROLS[name](state.soda.encoder.pooled_dim, len(experiment.info.classes)).to(experiment.device)
    state.soda.control = control  # saved in checkpoints
    state.optimizer.add_param_group({**state.optimizer.param_groups[0], "params": list(control.parameters())})
    return control


def control_step(experiment: Experiment, state: TrainState, control: Control, pixels: Iterator[Tensor]) -> Tensor:
    """Runs one optimiser step with a control's objective. Returns the loss, a scalar on the device.

    If the norm of the gradient is not finite, the step is skipped: weights and BatchNorm statistics do not change.
    Synchronises with the device.

    Args:
        pixels: iterator made by `training_pixels`, at `state.step`.
    """
    positions = range(experiment.config.training.batch_size)
    draws = source_draws(experiment, control.num_views, positions, "source", state.step)
    images = next(pixels).to(experiment.device)
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
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.soda.parameters(), experiment.config.optimizer.max_grad_norm)
    if norm.isfinite():
        state.scaler.step(state.optimizer)
    else:
        before.restore(norm.isfinite().logical_not())
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update()
    state.step += 1
    return loss.detach()
