"""The training loop: steps, reports, checkpoints and evaluations until the last epoch."""

import logging
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datasets import DatasetError
from training.experiment import Experiment, batch_norm_batch_size, less_memory
from training.reports import evaluate_if_due, evaluation_due, not_finite, report
from training.state import TrainState
from training.step import train_step, training_pixels
from utils import signals
from utils.agreement import Agreement
from utils.checkpoint_writer import CheckpointWriter
from utils.device import choose_compile, memory_for
from utils.distributed import SharedError, backend, exchange, rank, world_size
from utils.logging import PhaseTimer, phases
from utils.parallel import data_parallel
from utils.run_log import METRICS, RunLog

MAX_SKIPPED = 20  # steps in a row whose gradients are not finite

logger = logging.getLogger(__name__)


def train(experiment: Experiment, state: TrainState, folder: Path, resumed_from: Path | None) -> None:
    """Go on from `state` to the last step, writing checkpoints, samples and reports into `folder`.

    Every process trains its share of each batch; rank 0 writes. Raises DatasetError, FolderError, OutOfMemoryError,
    SharedError where numbers are not finite, and Stopped after a signal, once what was reached is saved.
    """
    config = experiment.config.training
    steps_per_epoch, total_steps = experiment.loader.steps_per_epoch, experiment.total_steps
    compiles = choose_compile(config.compile, experiment.device)
    if compiles:
        state.soda.compile()  # in place, so that names stay; the EMA has copied the eager model
    state.wrapped = data_parallel(state.soda)
    tell_how_it_is_shared(experiment)
    log = RunLog(folder, state.step) if rank() == 0 else None
    writer = CheckpointWriter(folder / "checkpoints", resumed_from, flush_first=folder / METRICS) if log else None
    timer, agree = PhaseTimer(), Agreement()
    interval = CheckpointInterval(config.checkpoint_every, steps_per_epoch)
    first_step, saved_step = state.step, state.step if resumed_from else None
    if log:
        log.text("config", f"```yaml\n{experiment.config.to_yaml()}```", state.step)

    def save(keep_as: str | None = None, alone: bool = False) -> None:
        """All processes call it together, or one `alone`."""
        nonlocal saved_step
        saved_step = state.step
        phases.info("saving step %d", state.step)
        with timer.phase("checkpoint"):
            contents = state.state_dict(alone)
            if writer:
                statistics = [list(experiment.info.mean), list(experiment.info.std)]
                contents |= {"config": experiment.config.to_yaml(), "data": experiment.data_digest}
                contents["statistics"] = statistics  # without which nobody else can use the encoder
                writer.save(contents, keep_as)
        phases.info("training from step %d to %d", state.step, total_steps)

    def finish_saving() -> None:
        """All processes: a launcher that sees one of them end gives the others little time."""
        if writer:
            writer.wait()
        exchange()

    def evaluate() -> None:
        with signals.obeyed():  # nothing changes, and what was reached is saved
            evaluate_if_due(experiment, state, folder, log, timer)

    with (
        signals.deferred(),
        writer or nullcontext(),
        log or nullcontext(),
        closing(training_pixels(experiment, state.step)) as pixels,
        progress_bar(config.batch_size, state.step, total_steps) as bar,
    ):
        evaluate()  # what a run that was stopped could not finish is made up for
        phases.info("training from step %d to %d%s", state.step, total_steps, ", compiling first" if compiles else "")
        while state.step < total_steps:
            try:
                with memory_for(lambda: less_memory(experiment)):
                    _, grad_norm = train_step(experiment, state, pixels, timer)
            except DatasetError:  # which the others have not met
                save(alone=True)
                raise
            bar.update(config.batch_size)
            if state.step % config.log_every == 0 or state.step == total_steps:
                summary = report(experiment, state, log, timer, state.step - first_step, grad_norm)
                bar.set_postfix(loss=f"{summary.loss:.4f}", refresh=False)
                first_step = state.step
                if summary.most_in_a_row >= MAX_SKIPPED:
                    finish_saving()
                    raise SharedError(not_finite(experiment, state.step, summary, saved_step))
            if writer:
                writer.check()

            stop, overdue = agree(signals.received(), rank() == 0 and interval.overdue())
            evaluation = evaluation_due(experiment, state.step)
            if evaluation and not stop:
                stop = max(exchange(signals.received()))  # it is not to wait for minutes of judging
            epoch, step_of_epoch = divmod(state.step, steps_per_epoch)
            keep = config.keep_every is not None and step_of_epoch == 0 and epoch % config.keep_every == 0
            if interval.due(state.step) or overdue or keep or evaluation or stop:
                save(f"epoch_{epoch:04d}.pt" if keep else None)
            if stop:
                finish_saving()
                phases.info("stopped at step %d, saved", state.step)
                raise signals.Stopped(stop, f" at step {state.step}, which is saved")
            if evaluation:
                evaluate()
                phases.info("evaluated; training from step %d to %d", state.step, total_steps)
        agree.wait()
        phases.info("finished")


def progress_bar(batch_size: int, step: int, total_steps: int) -> Any:
    """Images done, on rank 0; half-minutely where nobody watches."""
    return tqdm(
        total=total_steps * batch_size,
        initial=step * batch_size,
        desc="training",
        unit="img",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=rank() > 0,
    )


def tell_how_it_is_shared(experiment: Experiment) -> None:
    if world_size() > 1:
        mine = experiment.config.training.batch_size // world_size()
        logger.info("%d processes, %d images of each batch each, gradients by %s", world_size(), mine, backend())
    if batch_norm_batch_size(experiment) < experiment.config.training.batch_size:
        logger.info("BatchNorm normalises over %d images at a time", batch_norm_batch_size(experiment))


class CheckpointInterval:
    """When a checkpoint is due, from `N steps`, `N epochs` or `N minutes`: at a step, or by this process's clock."""

    def __init__(self, text: str, steps_per_epoch: int) -> None:
        number, unit = text.split()
        self._seconds = 60 * int(number) if unit == "minutes" else None
        self._steps = int(number) * (steps_per_epoch if unit == "epochs" else 1)
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        return self._seconds is None and step % self._steps == 0

    def overdue(self) -> bool:
        """Once after so many minutes."""
        if self._seconds is None or time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True
