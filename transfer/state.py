"""State of finetune.py: the classifier, its moving average, the optimiser, and the labels of the current epoch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiment.models import to_device
from experiment.starting import StartingWeights, start_from
from training.state import RunState, Tally, averaged
from transfer.classifier import Classifier, build_classifier
from transfer.opening import Task
from utils.device import FUSED, memory_for
from utils.randomness import derive_seed
from utils.run_folder.checkpoint import CheckpointError


@dataclass(kw_only=True)
class FinetuneState(RunState):
    """Everything that training changes. The model is a Classifier.

    Attributes:
        classes: names of the classes. They do not change.
        labelled: indices of the labelled images. They do not change.
        targets: (N,) int64 on the device, label of each training image in the current epoch: true labels of labelled
            images, and -1 or pseudo-labels of all others.
    """

    classes: list[str]
    labelled: Tensor
    targets: Tensor

    def state_dict(self, alone: bool = False) -> dict[str, Any]:
        """Collective unless `alone`. Returns the state. With `alone`, the tally covers only this rank's share."""
        more = {"classes": self.classes, "labelled": self.labelled, "targets": self.targets}
        return super().state_dict(alone) | more

    def _load(self, state: dict[str, Any]) -> None:
        if not torch.equal(state["labelled"], self.labelled):
            raise CheckpointError(
                "the run was started with other labelled images: restore the file in `labelled`, or choose another "
                "output_dir"
            )
        super()._load(state)
        self.targets.copy_(state["targets"])


def initial_state(task: Task, starting: Mapping[str, StartingWeights]) -> FinetuneState:
    """Returns the state before the first step.

    Seeds torch's default generators. Raises OutOfMemoryError.

    Args:
        starting: weights that "encoder" starts from; {}: random weights, or a run that resumes.
    """
    config = task.config
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    with memory_for(lambda: "use a smaller encoder or another device"):
        classifier = build_classifier(config, len(task.info.classes))
        is_known = any(found.statistics for found in starting.values())
        start_from(classifier, starting, "the images that it was trained on" if is_known else "this run's own images")
        if not task.method.trains_encoder:
            classifier.freeze_encoder()
        classifier = to_device(classifier, task.device)
        return FinetuneState(
            model=classifier,
            ema=averaged(classifier, config.training),
            optimizer=_optimizer(task, classifier),
            scaler=torch.amp.GradScaler(task.device.type, enabled=task.amp_dtype == torch.float16),
            tally=Tally(task.device, ["loss"]),
            started_from={part: found.digest for part, found in starting.items()},
            classes=task.info.classes,
            labelled=task.labelled,
            targets=task.given_labels.to(task.device),
        )


def _optimizer(task: Task, classifier: Classifier) -> torch.optim.Optimizer:
    """Returns SGD with Nesterov momentum, with a group of parameters for each group of layers."""
    keys = task.config.optimizer
    optimizer = torch.optim.SGD(
        [{"params": group} for group in classifier.layer_groups()],
        lr=keys.lr,
        momentum=keys.momentum,
        nesterov=True,
        weight_decay=keys.weight_decay,
        fused=task.device.type in FUSED,
    )
    # torch leaves the momentum of a first step that is skipped uninitialised.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
