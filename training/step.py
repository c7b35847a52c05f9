"""One training step: draw the batch, denoise, update. Random draws are functions of (seed, purpose, step)."""

import math
from collections.abc import Generator, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from config.schema import Rates
from experiment.batch import Pixels, draw_batch, read_pixels
from experiment.opening import Experiment
from experiment.shares import micro_batch_size
from training.losses import ForwardPass, loss_terms
from training.state import RunState, Snapshot, TrainState
from utils.device import FUSED, autocast
from utils.distributed.processes import my_range, world_size
from utils.logging import PhaseTimer
from utils.randomness import CHUNK, derive_seed


def training_pixels(experiment: Experiment, step: int) -> Generator[Pixels, None, None]:
    """Yields the images of this rank's share of each batch, from `step` to the end of training."""
    share = my_range(experiment.config.training.batch_size, CHUNK)
    return read_pixels(experiment, ((later, share) for later in range(step, experiment.total_steps)))


def learning_rates(experiment: Experiment, step: int) -> tuple[float, float]:
    """Returns the learning rates of encoder and decoder at `step`.

    A linear warm-up, which starts above zero, is followed by the schedule. A cool-down ends it.
    """
    config = experiment.config.optimizer
    factor = rate_factor(config, step, experiment.steps_per_epoch, experiment.total_steps)
    return config.encoder_lr * factor, config.decoder_lr * factor


def rate_factor(rates: Rates, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Returns the factor by which learning rates are multiplied at `step`, from 0 to 1."""
    warmup_steps = round(rates.warmup_epochs * steps_per_epoch)
    factor = min(1.0, (step + 1) / max(1, warmup_steps))
    if rates.schedule == "cosine" and step >= warmup_steps:
        factor = (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2
    cooldown_steps = round(rates.cooldown_epochs * steps_per_epoch)
    if cooldown_steps:
        factor *= min(1.0, (total_steps - step) / cooldown_steps)
    return factor


def train_step(
    experiment: Experiment, state: TrainState, pixels: Iterator[Pixels], timer: PhaseTimer
) -> tuple[Tensor, Tensor]:
    """Collective. Runs one optimiser step on one global batch. Returns (loss, gradient norm before clipping).

    Both are scalars on the device. The loss is the mean over this rank's share of the batch. The gradient norm is that
    of the global batch.

    If the norm is not finite, all ranks skip the step: weights, moments, BatchNorm statistics and the sampler's history
    do not change. A skipped step still increases `state.step`, and the EMA still moves towards the weights.

    Args:
        pixels: iterator made by `training_pixels`, at `state.step`.

    Raises:
        DatasetError: an image cannot be read. The state has not changed.
    """
    config, device = experiment.config, experiment.device
    share, micro_size = my_range(config.training.batch_size, CHUNK), micro_batch_size(config.training)
    with timer.phase("images"):
        # All images are read before anything changes, so that an unreadable image leaves the state unchanged.
        starts = range(share.start, share.stop, micro_size)  # positions in the global batch
        micro_batches = list(zip(starts, next(pixels).split(micro_size), strict=True))
    state.soda.train()
    before = Snapshot([*state.soda.buffers(), *state.timestep_sampler.tensors()])
    for group, lr in zip(state.optimizer.param_groups, learning_rates(experiment, state.step), strict=True):
        group["lr"] = lr

    totals: dict[str, Tensor] = {}
    for start, images in micro_batches:
        with timer.phase("views"):
            positions = range(start, start + micro_size)
            batch = draw_batch(experiment, images, state.step, positions, state.timestep_sampler)
        # Ranks average their gradients only in the last backward pass.
        is_last = start + micro_size == share.stop
        with nullcontext() if is_last or world_size() == 1 else state.wrapped.no_sync():
            with timer.phase("forward"):
                # Dropout masks come from torch's default generators.
                torch.manual_seed(derive_seed(config.seed, "dropout", state.step, start))
                x_t = experiment.diffusion.q_sample(batch.x_start, batch.timesteps, batch.noise)
                with autocast(device, experiment.amp_dtype):
                    denoised = state.wrapped(
                        batch.x_source, x_t, batch.timesteps, batch.drop_mask, batch.latent_noise, batch.rays
                    )
                found = ForwardPass(config.training, experiment.diffusion, batch, x_t, *denoised)
                losses = loss_terms(found)
                state.timestep_sampler.observe(batch.timesteps, found.errors)
                losses = {name: loss / len(micro_batches) for name, loss in losses.items()}
                totals = {name: totals.get(name, 0) + loss.detach() for name, loss in losses.items()}
            with timer.phase("backward"):
                state.scaler.scale(losses["loss"]).backward()

    grad_norm, skipped = update(state, config.optimizer.max_grad_norm, before, timer)
    state.tally.add(totals, skipped)
    state.timestep_sampler.end_step(state.step)
    return totals["loss"], grad_norm


def update(state: RunState, max_grad_norm: float, before: Snapshot, timer: PhaseTimer) -> tuple[Tensor, Tensor]:
    """Ends an optimiser step: clips the gradients, changes weights and EMA, and counts the step.

    If the gradient norm is not finite, the weights do not change, and the tensors in `before` are restored.

    Args:
        max_grad_norm: larger gradients are scaled down to this norm.
        before: copies of what the forward passes of this step have changed, such as BatchNorm statistics.

    Returns:
        (gradient norm before clipping, 1 if the update was skipped and else 0), two float32 scalars on the device. The
        gradients of all ranks are the same, so both are as well.
    """
    with timer.phase("update"):
        state.scaler.unscale_(state.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), max_grad_norm)
        skipped = grad_norm.isfinite().logical_not().float()
        before.restore(skipped.bool())
        # scaler.step skips a step only if a gradient is not finite. The norm can overflow although all are finite.
        if grad_norm.device.type in FUSED:
            state.optimizer.found_inf = skipped  # type: ignore[attr-defined]  # skips the step on the device
            state.optimizer.step()
        elif not skipped.item():
            state.optimizer.step()
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
    with timer.phase("EMA"):
        state.ema.update()
    state.step += 1
    return grad_norm, skipped
