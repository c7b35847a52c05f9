"""Ways to train a classifier with few labels. To add one, write a subclass of Method and add it to METHODS."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from config import schema
from config.finetune_schema import FinetuneConfig
from model import names

if TYPE_CHECKING:
    from torch import Tensor

    from transfer.opening import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """Batches and views of an epoch.

    Attributes:
        view: augmentation of the images.
        num_views: number of views of each image.
        num_unlabelled: images of each batch that are not labelled. The others are labelled.
        mixup_alpha: parameter of mixup's weights; 0: no mixup.
    """

    view: schema.View
    num_views: int = 1
    num_unlabelled: int = 0
    mixup_alpha: float = 0.0


class Method:
    """Fine-tuning: all layers are trained by cross-entropy on weak views of the labelled images.

    Attributes:
        trains_encoder: False keeps the encoder as it is.
        uses_unlabelled: True if training uses images without labels.
    """

    trains_encoder: ClassVar[bool] = True
    uses_unlabelled: ClassVar[bool] = False

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config

    def stage(self, epoch: int) -> Stage:
        """Returns the batches and views of an epoch, counted from 0."""
        return Stage(self.config.views.weak)

    def pseudo_labels(self, task: Task, features: Tensor) -> Tensor:
        """Collective. Returns a label or -1 for each training image, (N,) int64, before an epoch that uses them.

        Args:
            features: (N, D) features of all training images, clean views.
        """
        raise NotImplementedError


class Probe(Method):
    """Linear probe: only the layers on top of the encoder are trained, on weak views of the labelled images.

    The timestep of a time-dependent encoder is trained as well.
    """

    trains_encoder = False


class LaplaceNet(Method):
    """LaplaceNet (Sellars et al., arXiv 2106.04527).

    The first epochs are supervised. Before each later epoch, labels are propagated over a graph of all training images.
    Training uses strong views of images with true labels and of images with pseudo-labels.
    """

    uses_unlabelled = True

    def stage(self, epoch: int) -> Stage:
        keys, views = self.config.laplacenet, self.config.views
        if epoch < keys.supervised_epochs:
            return Stage(views.weak)
        num_unlabelled = self.config.training.batch_size - keys.labelled_batch_size
        return Stage(views.strong, keys.num_views, num_unlabelled, keys.mixup_alpha)

    def pseudo_labels(self, task: Task, features: Tensor) -> Tensor:
        from transfer.graph import align, neighbour_graph, propagate

        keys, given = self.config.laplacenet, task.given_labels
        if keys.k >= len(features):
            text = "laplacenet.k=%d is lowered to %d, because there are %d training images"
            logger.info(text, keys.k, len(features) - 1, len(features))
        num_classes = len(task.info.classes)
        shares = propagate(
            neighbour_graph(features, keys.k),
            given,
            num_classes,
            alpha=keys.alpha,
            tolerance=keys.tolerance,
            max_iterations=keys.max_iterations,
        )
        frequencies = given[task.labelled].bincount(minlength=num_classes).double() / len(task.labelled)
        found = align(shares, frequencies, keys.alignment_rounds).argmax(dim=1)
        found[shares.sum(dim=1) == 0] = -1  # no label reaches these images
        return torch.where(given >= 0, given, found)


METHODS: dict[names.Method, type[Method]] = {"probe": Probe, "finetune": Method, "laplacenet": LaplaceNet}
"""Class of each value of the key `method`."""
