"""One training step of a classifier. Random draws are functions of (seed, purpose, step)."""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from training.state import Snapshot
from training.step import rate_factor, update
from transfer.mixing import Pairs, draw_pairs, mixed_cross_entropy
from transfer.opening import Task
from transfer.state import FinetuneState
from utils.device import autocast, copy_to
from utils.distributed.processes import my_range
from utils.logging import PhaseTimer
from utils.randomness import uniforms


def pairs_of(task: Task, step: int) -> Pairs:
    """Returns the images of the global batch that this rank uses at `step`, and how it mixes them."""
    batch_size = task.config.training.batch_size
    alpha = task.method.stage(step // task.steps_per_epoch).mixup_alpha
    return draw_pairs(batch_size, my_range(batch_size), alpha, task.config.seed, step)


def step_pixels(task: Task, step: int) -> Generator[Tensor, None, None]:
    """Yields the images that this rank uses at each step, from `step` to the end of training."""
    steps = range(step, task.total_steps)
    indices = (task.draws.indices(each)[pairs_of(task, each).rows] for each in steps)
    return task.train.batches(indices, pin_memory=task.device.type == "cuda")


def learning_rates(task: Task, state: FinetuneState, step: int) -> list[float]:
    """Returns the learning rate of each group of layers at `step`. It is `layer_decay` times that of the next group."""
    keys, count = task.config.optimizer, len(state.optimizer.param_groups)
    highest = keys.lr * rate_factor(keys, step, task.steps_per_epoch, task.total_steps)
    return [highest * keys.layer_decay ** (count - 1 - group) for group in range(count)]


def train_step(task: Task, state: FinetuneState, pixels: Iterator[Tensor], timer: PhaseTimer) -> Tensor:
    """Collective. Runs one optimiser step. Returns the gradient norm before clipping, a scalar on the device.

    A step whose gradients are not finite is skipped, as in train.py.

    Args:
        pixels: iterator made by `step_pixels`, at `state.step`.

    Raises:
        DatasetError: an image cannot be read. The state has not changed.
    """
    step, stage = state.step, task.method.stage(state.step // task.steps_per_epoch)
    with timer.phase("images"):
        images = next(pixels).to(task.device, non_blocking=True)
    for group, rate in zip(state.optimizer.param_groups, learning_rates(task, state, step), strict=True):
        group["lr"] = rate
    state.model.train()
    before = Snapshot(state.model.buffers())
    with timer.phase("views"):
        pairs = pairs_of(task, step).to(task.device)
        views = [pairs.mix(_view(task, images, pairs, step, number)) for number in range(stage.num_views)]
        targets = state.targets[copy_to(task.draws.indices(step)[pairs.rows], task.device)]
        labels, partner_labels = (targets[part].repeat(stage.num_views) for part in (pairs.own, pairs.partner))
    with timer.phase("forward"), autocast(task.device, task.amp_dtype):
        logits = state.wrapped(torch.cat(views))
    loss = mixed_cross_entropy(logits, labels, partner_labels, pairs.weight)
    with timer.phase("backward"):
        state.scaler.scale(loss).backward()
    grad_norm, skipped = update(state, task.config.optimizer.max_grad_norm, before, timer)
    state.tally.add({"loss": loss.detach()}, skipped)
    return grad_norm


def _view(task: Task, images: Tensor, pairs: Pairs, step: int, number: int) -> Tensor:
    """Returns a view (M, 3, S, S) of each image. Its random numbers belong to the image's position in the batch."""
    positions = range(task.config.training.batch_size)

    def draw(columns: int, stream: str = "") -> Tensor:
        return uniforms(positions, columns, task.config.seed, f"view {number}{stream}", step)[pairs.rows]

    return task.views.augmented(images, draw, task.method.stage(step // task.steps_per_epoch).view)
