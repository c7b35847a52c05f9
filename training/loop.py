"""The training loop of all programs: steps, reports, checkpoints and evaluations until the last epoch."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from datasets.images import DatasetError
from experiment.opening import Experiment
from experiment.shares import advice_for_less_memory, batch_norm_batch_size
from training.evaluating import evaluate, evaluation_due, look_due
from training.reports import record_evaluation, record_steps
from training.saving import Opened, Saver
from training.state import RunState, Summary, TrainState
from training.step import learning_rates, train_step, training_pixels
from utils import signals
from utils.device import choose_compile, memory_for
from utils.distributed.collectives import SharedError, broadcast_object, tensor_backend
from utils.distributed.data_parallel import data_parallel
from utils.distributed.processes import rank, world_size
from utils.logging import PhaseTimer, phase_log, progress
from utils.run_folder.folder import RunFolder
from utils.run_folder.run_log import RunLog

MAX_SKIPPED = 20  # steps in a row with non-finite gradients, after which the run ends

OpenedT = TypeVar("OpenedT", bound=Opened)
StateT = TypeVar("StateT", bound=RunState)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job(ABC, Generic[OpenedT, StateT]):
    """A program's part in the training loop: its images, steps and evaluations.

    Attributes:
        opened: the opened config.
        state: everything that training changes.
        folder: folder of the run.
    """

    opened: OpenedT
    state: StateT
    folder: RunFolder

    @abstractmethod
    def pixels(self) -> Generator[Any, None, None]:
        """Yields the images that this rank needs for each step, from the present step to the last one."""

    def before_step(self, saver: Saver, log: RunLog | None, timer: PhaseTimer) -> None:
        """Collective. Does what is due before the next step; by default, nothing."""

    @abstractmethod
    def step(self, pixels: Iterator[Any], timer: PhaseTimer) -> Tensor:
        """Collective. Runs one optimiser step. Returns the gradient norm before clipping, a scalar on the device."""

    @abstractmethod
    def rates(self, step: int) -> dict[str, float]:
        """Returns the learning rates at `step` by name, for the reports."""

    def evaluation_due(self) -> bool:
        """Returns True if the EMA model is to be evaluated after the step that was done last."""
        return evaluation_due(self.opened, self.state.step)

    @abstractmethod
    def evaluate(self, log: RunLog | None) -> None:
        """Collective. Evaluates the EMA model, and writes the result if there is a log."""

    @abstractmethod
    def less_memory(self) -> str:
        """Returns advice for the user after a step that needs too much memory."""


class SodaJob(Job[Experiment, TrainState]):
    """Training of SODA, as train.py does it."""

    def pixels(self) -> Generator[Any, None, None]:
        return training_pixels(self.opened, self.state.step)

    def step(self, pixels: Iterator[Any], timer: PhaseTimer) -> Tensor:
        return train_step(self.opened, self.state, pixels, timer)[1]

    def rates(self, step: int) -> dict[str, float]:
        return dict(zip(("encoder", "decoder"), learning_rates(self.opened, step), strict=True))

    def evaluation_due(self) -> bool:
        """Returns True also at early steps, when latents and samples are due."""
        return super().evaluation_due() or look_due(self.opened, self.state.step)

    def evaluate(self, log: RunLog | None) -> None:
        found = evaluate(self.opened, self.state.ema.ema_model, self.state.step)
        if log:
            record_evaluation(log, self.opened, found, self.folder.path)

    def less_memory(self) -> str:
        return advice_for_less_memory(self.opened.config.training)


def train(experiment: Experiment, state: TrainState, folder: RunFolder) -> None:
    """Collective. Trains SODA from `state` to the last step. Raises the errors of `run_job`."""
    compiles = choose_compile(experiment.config.training.compile, experiment.device)
    if compiles:
        state.soda.compile()  # in place, so that names do not change; the EMA has its own eager copy
    _log_circumstances(experiment)
    run_job(SodaJob(experiment, state, folder), ", compiling first" if compiles else "")


def run_job(job: Job[Any, Any], note: str = "") -> None:
    """Collective. Trains from the job's state to the last step. Writes checkpoints and reports into its folder.

    Each rank trains on its share of each batch. Rank 0 writes.

    Args:
        note: text added to the log line at the start of training.

    Raises:
        DatasetError, FolderError, OutOfMemoryError: on the rank where the error occurs.
        SharedError: at a report, if gradients were not finite for MAX_SKIPPED steps in a row.
        Stopped: after a signal, once the state has been saved.
    """
    opened, state, folder = job.opened, job.state, job.folder
    config, total_steps = opened.config.training, opened.total_steps
    state.wrapped = data_parallel(state.model)
    log = folder.run_log(state.step) if rank() == 0 else None  # imports TensorBoard, which takes seconds
    timer, reported_step = PhaseTimer(), state.step
    with (
        signals.deferred(),
        Saver(opened, state, folder, timer) as saver,
        log or nullcontext(),
        closing(job.pixels()) as pixels,
        progress(total_steps * config.batch_size, "training", "img", state.step * config.batch_size) as bar,
    ):
        if log:
            log.text("config", f"```yaml\n{opened.config.to_yaml()}```", state.step)
        _evaluate_if_due(job, log, timer)  # repeats an evaluation that was interrupted
        phase_log.info("training from step %d to %d%s", state.step, total_steps, note)
        while state.step < total_steps:
            try:
                with memory_for(job.less_memory):
                    job.before_step(saver, log, timer)
                    grad_norm = job.step(pixels, timer)
            except DatasetError:  # not a collective save: the other ranks continue, and their losses are not saved
                saver.save(alone=True)
                raise
            bar.update(config.batch_size)

            if state.step % config.log_every == 0 or state.step == total_steps:
                with timer.phase("wait for the device"):  # each step only queues its work
                    summary, last_grad_norm = state.tally.take(), grad_norm.item()
                if log:
                    num_steps = state.step - reported_step
                    rates = job.rates(state.step - 1)
                    record_steps(log, opened, state, rates, summary, last_grad_norm, timer, num_steps)
                bar.set_postfix(loss=f"{summary.losses['loss']:.4f}", refresh=False)
                reported_step = state.step
                if summary.most_in_a_row >= MAX_SKIPPED:
                    saver.finish()
                    raise SharedError(_not_finite(job, summary, saver.saved_step))

            stopped_by = saver.save_if_due(before_evaluation=job.evaluation_due())
            if stopped_by:
                saver.finish()
                phase_log.info("stopped at step %d, state saved", state.step)
                raise signals.Stopped(stopped_by, f" at step {state.step}, state saved")
            _evaluate_if_due(job, log, timer)
        phase_log.info("finished")


def _evaluate_if_due(job: Job[Any, Any], log: RunLog | None, timer: PhaseTimer) -> None:
    """Collective. Evaluates and records the result if this is due and not yet done. A signal ends it immediately."""
    step, total_steps = job.state.step, job.opened.total_steps
    if not job.evaluation_due():
        return
    with signals.obeyed():  # the state has been saved, and an evaluation does not change it
        reported = broadcast_object(log is not None and log.has("evaluation", step))
        # After the last step, the evaluation is repeated, because results.json may be missing.
        if reported and step < total_steps:
            return
        phase_log.info("evaluation at step %d", step)
        with timer.phase("evaluation"):
            job.evaluate(log)
    if step < total_steps:
        phase_log.info("evaluated; training from step %d to %d", step, total_steps)


def _log_circumstances(experiment: Experiment) -> None:
    training = experiment.config.training
    if not experiment.has_test_labels:
        logger.info("the images have no labels: k-NN and linear probe are skipped")
    if world_size() > 1:
        share = training.batch_size // world_size()
        backend = tensor_backend()
        logger.info(
            "%d processes: %d images of each batch per process, gradients reduced by %s", world_size(), share, backend
        )
    warmup_epochs = experiment.config.optimizer.warmup_epochs
    if warmup_epochs > training.epochs:
        logger.warning(
            "the run of %d epochs ends before the warm-up of %g (optimizer.warmup_epochs): the learning rates reach "
            "%.0f %% of their values",
            *(training.epochs, warmup_epochs, 100 * training.epochs / warmup_epochs),
        )
    if batch_norm_batch_size(training) < training.batch_size:
        logger.info("BatchNorm normalises over %d images at a time", batch_norm_batch_size(training))


def _not_finite(job: Job[Any, Any], summary: Summary, saved_step: int | None) -> str:
    """Returns the error message that ends the run."""
    step = job.state.step
    rates = ", ".join(f"{rate:g} ({name})" for name, rate in job.rates(step - 1).items())
    last = f"The last checkpoint is of step {saved_step}, in {job.folder.path / 'checkpoints'}"
    saved = "Nothing is saved yet" if saved_step is None else last
    return (
        f"gradients were not finite in {summary.most_in_a_row} steps in a row before step {step}, at learning rates "
        f"{rates}. These steps were skipped. {saved}. Check the images, or use lower learning rates in another "
        "output_dir"
    )
