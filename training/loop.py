"""The training loop: steps, reports, checkpoints and evaluations until the last epoch."""

import json
import logging
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from datasets import DatasetError
from training.experiment import Experiment
from training.judge import baselines, config_protocols, encode_with, judge, sample_grid, save_png
from training.step import learning_rates, train_step, training_pixels
from utils.checkpoint import CheckpointInterval, TrainState, save_checkpoint
from utils.config_file import result_digest
from utils.device import choose_compile, peak_memory_mb
from utils.distributed import all_reduce, backend, from_rank_0, rank, world_size
from utils.files import write_text
from utils.logging import PhaseTimer, RunLog
from utils.parallel import data_parallel

logger = logging.getLogger(__name__)

RESULTS = "results.json"  # the closing table, with the config and the step that it belongs to


def read_results(folder: Path) -> dict[str, Any]:
    """What the last evaluation of the run in `folder` left; empty where there is nothing that can be read."""
    try:
        return dict(json.loads((folder / RESULTS).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def train(experiment: Experiment, state: TrainState, folder: Path) -> None:
    """Go on from `state` to the last step, writing checkpoints, samples and reports into `folder`.

    Every process trains its share of each batch; rank 0 writes.
    """
    config = experiment.config.training
    steps_per_epoch, total_steps = experiment.loader.steps_per_epoch, experiment.total_steps
    if choose_compile(config.compile, experiment.device):
        state.soda.compile()  # in place, so that names stay; the EMA has copied the eager model
    state.wrapped = data_parallel(state.soda)
    log = RunLog(folder, state.step) if rank() == 0 else None
    timer = PhaseTimer()
    if log:
        log.text("config", f"```yaml\n{experiment.config.to_yaml()}```", state.step)
    interval = CheckpointInterval(config.checkpoint_every, steps_per_epoch)
    loss_sum, first_step = torch.zeros((), device=experiment.device), state.step
    bar = tqdm(
        total=total_steps * config.batch_size,
        initial=state.step * config.batch_size,
        desc="training",
        unit="img",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=log is None,
    )

    def save(name: str) -> None:
        with timer.phase("checkpoint"):
            path, text = folder / "checkpoints" / name, experiment.config.to_yaml()
            save_checkpoint(path, state.state_dict(), text, experiment.data_digest)

    if world_size() > 1:
        mine = config.batch_size // world_size()
        logger.info("%d processes, %d images of each batch each, gradients by %s", world_size(), mine, backend())
    if batch_norm_batch_size(experiment) < config.batch_size:
        logger.info("BatchNorm normalises over %d images at a time", batch_norm_batch_size(experiment))
    # An evaluation that a killed run did not finish is made up for before the next step.
    evaluate_if_due(experiment, state, folder, log, timer)
    with closing(training_pixels(experiment, state.step)) as pixels, bar:
        while state.step < total_steps:
            try:
                loss, grad_norm = train_step(experiment, state, pixels, timer)
            except DatasetError:
                if log:
                    save("last.pt")
                raise
            loss_sum += loss
            bar.update(config.batch_size)
            epoch, step_of_epoch = divmod(state.step, steps_per_epoch)
            at_end = state.step == total_steps

            if state.step % config.log_every == 0 or at_end:
                steps = state.step - first_step
                with timer.phase("wait for the device"):  # the steps themselves do not
                    mean_loss = all_reduce(loss_sum).item() / (steps * world_size())
                    last_grad_norm = grad_norm.item()
                if log:
                    report(experiment, state, log, timer, steps, mean_loss, last_grad_norm)
                bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
                loss_sum.zero_()
                first_step = state.step
            keep = config.keep_every is not None and step_of_epoch == 0 and epoch % config.keep_every == 0
            if log and (interval.due(state.step) or keep or at_end):
                save("last.pt")
            if log and keep:
                save(f"epoch_{epoch:04d}.pt")
            evaluate_if_due(experiment, state, folder, log, timer)
    if log:
        log.close()


def batch_norm_batch_size(experiment: Experiment) -> int:
    """How many images BatchNorm normalises over: what all processes see in one forward pass."""
    config = experiment.config.training
    return min((config.micro_batch_size or config.batch_size) * world_size(), config.batch_size)


def report(
    experiment: Experiment,
    state: TrainState,
    log: RunLog,
    timer: PhaseTimer,
    steps: int,
    loss: float,
    grad_norm: float,
) -> None:
    """One report on the `steps` steps since the last."""
    total, phases = timer.take()
    training_s = total - phases.get("evaluation", 0) - phases.get("checkpoint", 0)
    encoder_lr, decoder_lr = learning_rates(experiment, state.step - 1)
    log.report(
        "train",
        state.step,
        {
            "epoch": state.step / experiment.loader.steps_per_epoch,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr/encoder": encoder_lr,
            "lr/decoder": decoder_lr,
            "ema_decay": state.ema.get_current_decay(),
            "images_per_s": steps * experiment.config.training.batch_size / training_s,
            "peak_memory_mb": peak_memory_mb(experiment.device),
            **{f"seconds/{name}": seconds for name, seconds in phases.items()},
        },
    )


def evaluate_if_due(
    experiment: Experiment, state: TrainState, folder: Path, log: RunLog | None, timer: PhaseTimer
) -> None:
    """Judge the EMA encoder and draw a grid of samples, every `evaluation.every` epochs and at the end, once.

    At the end the untrained encoder and the raw pixels are judged beside it, for the closing table. All processes
    work; the one that has a log writes.
    """
    epoch, step_of_epoch = divmod(state.step, experiment.loader.steps_per_epoch)
    at_end = state.step == experiment.total_steps
    periodic = step_of_epoch == 0 and epoch > 0 and epoch % experiment.config.evaluation.every == 0
    if not (at_end or periodic):
        return
    reported = from_rank_0(log is not None and log.has("evaluation", state.step))
    if reported and not at_end:
        return
    with timer.phase("evaluation"):
        soda, table, grid = state.ema.ema_model, {}, None
        protocols = [] if experiment.test is None else config_protocols(experiment)
        if protocols:
            encoders = {"trained": encode_with(experiment, soda)} | (baselines(experiment) if at_end else {})
            table = judge(experiment, encoders, protocols)
        if experiment.config.sampling.num_images:
            grid = sample_grid(experiment, soda)
        if log is None:
            return
        values: dict[str, float] = {"epoch": epoch}
        for protocol in protocols:
            accuracies = table[str(protocol)]["trained"]
            values |= {f"{protocol.kind}_{name}": accuracy for name, accuracy in accuracies.items()}
            logger.info("epoch %d, %s: top-1 %.1f, top-3 %.1f", epoch, protocol, *accuracies.values())
        if grid is not None:
            save_png(folder / "samples" / f"epoch_{epoch:04d}.png", grid)
            log.image("samples", state.step, grid)
        if not reported:
            log.report("evaluation", state.step, values, **{protocol.kind: str(protocol) for protocol in protocols})
        if at_end:
            results = {
                "config_digest": result_digest(experiment.config),
                "step": state.step,
                "batch_norm_batch_size": batch_norm_batch_size(experiment),
                "table": table,
            }
            write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")
