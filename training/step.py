"""One training step: draw the batch, denoise, update. Every draw is a function of (seed, purpose, step)."""

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets import Draw
from training.experiment import Experiment
from training.state import Snapshot, TrainState
from utils.device import FUSED, autocast
from utils.distributed import share, world_size
from utils.logging import PhaseTimer
from utils.randomness import CHUNK, derive_seed, generator, image_noise, uniforms


@dataclass(frozen=True)
class Batch:
    """What a forward pass sees, N samples of the global batch.

    Attributes:
        x_source: (N, 3, H, W) source view, normalised, with its noise.
        x_start: (N, 3, H, W) target view in [-1, 1].
        timesteps: (N,) int64.
        noise: (N, 3, H, W) standard normal.
        drop_mask: (N, sections) bool; True drops a section of the sample's latent.
    """

    x_source: Tensor
    x_start: Tensor
    timesteps: Tensor
    noise: Tensor
    drop_mask: Tensor


def read_pixels(experiment: Experiment, wanted: Iterable[tuple[int, range]]) -> Generator[Tensor, None, None]:
    """Images (N, 3, H, W) uint8 of each (step, positions in its global batch) in turn, read ahead."""
    indices = (experiment.loader.indices(step, positions) for step, positions in wanted)
    return experiment.train.batches(indices, pin_memory=experiment.device.type == "cuda")


def training_pixels(experiment: Experiment, step: int) -> Generator[Tensor, None, None]:
    """This process's share of each batch, from `step` to the end of training."""
    mine = share(experiment.config.training.batch_size, CHUNK)
    return read_pixels(experiment, ((step, mine) for step in range(step, experiment.total_steps)))


def draw_source(experiment: Experiment, pixels: Tensor, step: int, positions: range) -> Tensor:
    """Source views (N, 3, H, W) of the images `pixels` at `positions` of the global batch of `step`."""
    seed = experiment.config.seed
    noise = image_noise(pixels.shape[1:], positions, seed, "source noise", step, device=experiment.device)
    return experiment.views.source(pixels, draws(experiment, positions, "source view", step), noise)


def draws(experiment: Experiment, positions: range, purpose: str, *counters: int) -> Draw:
    """What decides how the samples at `positions` are augmented."""
    return lambda width, part="": uniforms(positions, width, experiment.config.seed, purpose + part, *counters)


def draw_batch(experiment: Experiment, pixels: Tensor, step: int, positions: range) -> Batch:
    """The samples at `positions` of the global batch of `step`, made of their images `pixels`."""
    config, seed, device = experiment.config, experiment.config.seed, experiment.device
    # Small draws are made for the whole batch, so that each sample gets the same however the batch is split.
    batch_size, here = config.training.batch_size, slice(positions.start, positions.stop)
    timesteps = torch.randint(
        config.diffusion.num_timesteps, (batch_size,), generator=generator(seed, "timesteps", step)
    )[here]
    mask, sections = config.training.mask, (batch_size, config.decoder.num_sections)
    whole = torch.rand(batch_size, generator=generator(seed, "drop mask", step)) < mask.latent_probability
    each = torch.rand(sections, generator=generator(seed, "section mask", step)) < mask.section_probability
    drop_mask = (whole[:, None] | each)[here]
    x_source, x_start = experiment.views.pair(
        pixels,
        draws(experiment, positions, "source view", step),
        draws(experiment, positions, "target view", step),
        image_noise(pixels.shape[1:], positions, seed, "source noise", step, device=device),
    )
    return Batch(
        x_source=x_source,
        x_start=x_start,
        timesteps=timesteps.to(device, non_blocking=True),
        noise=image_noise(pixels.shape[1:], positions, seed, "noise", step, device=device),
        drop_mask=drop_mask.to(device, non_blocking=True),
    )


def learning_rates(experiment: Experiment, step: int) -> tuple[float, float]:
    """Of encoder and decoder at `step`: a linear warm-up, the first step already above zero, then as configured."""
    config, total_steps = experiment.config.optimizer, experiment.total_steps
    warmup_steps = round(config.warmup_epochs * experiment.loader.steps_per_epoch)
    factor = min(1.0, (step + 1) / max(1, warmup_steps))
    if config.schedule == "cosine" and step >= warmup_steps:
        factor = (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2
    return config.encoder_lr * factor, config.decoder_lr * factor


def train_step(
    experiment: Experiment, state: TrainState, pixels: Iterator[Tensor], timer: PhaseTimer
) -> tuple[Tensor, Tensor]:
    """One optimiser step over one global batch. Returns (loss, gradient norm before clipping), on the device.

    `pixels` is what `training_pixels` gives from `state.step` on. The loss is the mean over this process's share of
    the batch, the gradient's norm that of the whole batch. Where that is not finite, the step is skipped, by all
    processes alike: but for the step's number, the tally and the loss scale, the state stays what it was. Raises
    DatasetError, the state being what it was, where an image cannot be read.
    """
    config, device = experiment.config, experiment.device
    mine = share(config.training.batch_size, CHUNK)
    size = min(config.training.micro_batch_size or len(mine), len(mine))
    with timer.phase("images"):
        # All before anything changes: an image that cannot be read leaves the state whole.
        parts = list(zip(range(mine.start, mine.stop, size), next(pixels).split(size), strict=True))
    state.soda.train()
    statistics = Snapshot(state.soda.buffers())
    for group, lr in zip(state.optimizer.param_groups, learning_rates(experiment, state.step), strict=True):
        group["lr"] = lr

    total_loss = torch.zeros((), device=device)
    for start, chosen in parts:
        with timer.phase("views"):
            batch = draw_batch(experiment, chosen, state.step, range(start, start + size))
        is_last = start + size == mine.stop  # only now do processes average their gradients
        with nullcontext() if is_last or world_size() == 1 else state.wrapped.no_sync():
            with timer.phase("forward"):
                torch.manual_seed(derive_seed(config.seed, "dropout", state.step, start))

                def denoise(x_t: Tensor, timesteps: Tensor, batch: Batch = batch) -> Tensor:
                    return state.wrapped(batch.x_source, x_t, timesteps, batch.drop_mask)

                with autocast(device, experiment.amp_dtype):
                    loss = experiment.diffusion.loss(denoise, batch.x_start, batch.timesteps, batch.noise)
                loss = loss / len(parts)
                total_loss += loss.detach()
            with timer.phase("backward"):
                state.scaler.scale(loss).backward()

    with timer.phase("update"):
        state.scaler.unscale_(state.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(state.soda.parameters(), config.optimizer.max_grad_norm)
        skipped = grad_norm.isfinite().logical_not().float()
        state.tally.add(total_loss, skipped)
        statistics.restore(skipped.bool())
        known_to_host = device.type not in FUSED and bool(skipped.item())
        if not known_to_host:
            state.optimizer.found_inf = skipped  # type: ignore[attr-defined]
            state.optimizer.step()  # not the scaler's, which looks at the scaled gradients alone
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
    with timer.phase("EMA"):
        if not known_to_host:
            state.ema.update(skipped)
    state.step += 1
    return total_loss, grad_norm
