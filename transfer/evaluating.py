"""Accuracy of a classifier on the test images, and the pseudo-labels before an epoch."""

from collections.abc import Callable

import torch
from torch import Tensor

from datasets.images import Images
from evaluation.features import extract_features
from evaluation.knn import topk_accuracy
from transfer.classifier import Classifier
from transfer.opening import Task
from transfer.state import FinetuneState
from utils.device import autocast, memory_for


def _outputs(task: Task, classifier: Classifier, function: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    """Collective. Returns function(clean views) of all images, (N, D) float32, in evaluation mode."""

    @torch.no_grad()
    def encode(pixels: Tensor, indices: range) -> dict[object, Tensor]:
        with autocast(task.device, task.amp_dtype):
            return {"": function(task.views.evaluation(pixels)).float()}

    classifier.eval()
    size = task.config.evaluation.batch_size
    with memory_for(lambda: f"set evaluation.batch_size={max(1, size // 2)}"):
        return extract_features(encode, images, size, task.device)[""]


def accuracy(task: Task, classifier: Classifier) -> dict[str, float]:
    """Collective. Returns {"top1": ..., "top3": ...} of the test images in per cent. Raises OutOfMemoryError."""
    assert task.test.labels is not None
    return topk_accuracy(_outputs(task, classifier, classifier, task.test), task.test.labels.to(task.device))


def renew_targets(task: Task, state: FinetuneState) -> dict[str, float]:
    """Collective. Replaces the targets by new pseudo-labels. Returns facts about them.

    These are the shares of the unlabelled images without a pseudo-label, and with another one than before; and, if true
    labels are known, the accuracy of the pseudo-labels on the images without given labels. All are in per cent.
    """
    features = _outputs(task, state.model, state.model.features, task.train)
    with memory_for(lambda: "set a lower laplacenet.k, in another output_dir, or use fewer unlabelled images"):
        before, found = state.targets.cpu(), task.method.pseudo_labels(task, features).cpu()
    state.targets = found.to(task.device)
    others = task.given_labels < 0
    facts = {"without": found[others] < 0, "changed": found[others] != before[others]}
    known = others & (task.labels >= 0)
    if known.any():
        facts["accuracy"] = found[known] == task.labels[known]
    return {name: 100 * values.double().mean().item() for name, values in facts.items()}
