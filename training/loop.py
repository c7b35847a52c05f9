"""The training loop: steps, reports, checkpoints and evaluations until the last epoch."""

import logging
import sys
from contextlib import closing, nullcontext
from typing import Any

from tqdm import tqdm

from datasets.images import DatasetError
from experiment.opening import Experiment
from experiment.shares import advice_for_less_memory, batch_norm_batch_size
from training.evaluating import evaluate, evaluation_due
from training.reports import record_evaluation, record_steps
from training.saving import Saver
from training.state import Summary, TrainState
from training.step import learning_rates, train_step, training_pixels
from utils import signals
from utils.device import choose_compile, memory_for
from utils.distributed.collectives import SharedError, broadcast_object, tensor_backend
from utils.distributed.data_parallel import data_parallel
from utils.distributed.processes import rank, world_size
from utils.logging import PhaseTimer, phase_log
from utils.run_folder.folder import RunFolder
from utils.run_folder.run_log import RunLog

MAX_SKIPPED = 20  # steps in a row with non-finite gradients, after which the run ends

logger = logging.getLogger(__name__)


def train(experiment: Experiment, state: TrainState, folder: RunFolder) -> None:
    """Collective. Trains from `state` to the last step. Writes checkpoints, samples and reports into `folder`.

    Each rank trains on its share of each batch. Rank 0 writes.

    Raises:
        DatasetError, FolderError, OutOfMemoryError: on the rank where the error occurs.
        SharedError: at a report, if gradients were not finite for MAX_SKIPPED steps in a row.
        Stopped: after a signal, once the state has been saved.
    """
    config, total_steps = experiment.config.training, experiment.total_steps
    compiles = choose_compile(config.compile, experiment.device)
    if compiles:
        state.soda.compile()  # in place, so that names do not change; the EMA has its own eager copy
    state.wrapped = data_parallel(state.soda)
    _log_circumstances(experiment)
    timer, reported_step = PhaseTimer(), state.step
    log = folder.run_log(state.step) if rank() == 0 else None
    with (
        signals.deferred(),
        Saver(experiment, state, folder, timer) as saver,
        log or nullcontext(),
        closing(training_pixels(experiment, state.step)) as pixels,
        progress_bar(config.batch_size, state.step, total_steps) as bar,
    ):
        if log:
            log.text("config", f"```yaml\n{experiment.config.to_yaml()}```", state.step)
        _evaluate_if_due(experiment, state, folder, log, timer)  # repeats an evaluation that was interrupted
        first = ", compiling first" if compiles else ""
        phase_log.info("training from step %d to %d%s", state.step, total_steps, first)
        while state.step < total_steps:
            try:
                with memory_for(lambda: advice_for_less_memory(config)):
                    _, grad_norm = train_step(experiment, state, pixels, timer)
            except DatasetError:  # not a collective save: the other ranks continue, and their losses are not saved
                saver.save(alone=True)
                raise
            bar.update(config.batch_size)

            if state.step % config.log_every == 0 or state.step == total_steps:
                with timer.phase("wait for the device"):  # each step only queues its work
                    summary, last_grad_norm = state.tally.take(), grad_norm.item()
                if log:
                    num_steps = state.step - reported_step
                    rates = dict(zip(("encoder", "decoder"), learning_rates(experiment, state.step - 1), strict=True))
                    record_steps(log, experiment, state, rates, summary, last_grad_norm, timer, num_steps)
                bar.set_postfix(loss=f"{summary.losses['loss']:.4f}", refresh=False)
                reported_step = state.step
                if summary.most_in_a_row >= MAX_SKIPPED:
                    saver.finish()
                    raise SharedError(_not_finite(experiment, state.step, summary, saver.saved_step, folder))

            stopped_by = saver.save_if_due(before_evaluation=evaluation_due(experiment, state.step))
            if stopped_by:
                saver.finish()
                phase_log.info("stopped at step %d, state saved", state.step)
                raise signals.Stopped(stopped_by, f" at step {state.step}, state saved")
            _evaluate_if_due(experiment, state, folder, log, timer)
        phase_log.info("finished")


def _evaluate_if_due(
    experiment: Experiment, state: TrainState, folder: RunFolder, log: RunLog | None, timer: PhaseTimer
) -> None:
    """Collective. Evaluates and records the result if this is due and not yet done. A signal ends it immediately."""
    if not evaluation_due(experiment, state.step):
        return
    with signals.obeyed():  # the state has been saved, and an evaluation does not change it
        reported = broadcast_object(log is not None and log.has("evaluation", state.step))
        # After the last step, the evaluation is repeated, because results.json may be missing.
        if reported and state.step < experiment.total_steps:
            return
        phase_log.info("evaluation at step %d", state.step)
        with timer.phase("evaluation"):
            found = evaluate(experiment, state.ema.ema_model, state.step)
            if log:
                record_evaluation(log, experiment, found, folder.path)
    phase_log.info("evaluated; training from step %d to %d", state.step, experiment.total_steps)


def progress_bar(batch_size: int, step: int, total_steps: int) -> Any:
    """Returns a progress bar that counts images on rank 0. Without a terminal, it is drawn every 30 seconds."""
    return tqdm(
        total=total_steps * batch_size,
        initial=step * batch_size,
        desc="training",
        unit="img",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=rank() > 0,
    )


def _log_circumstances(experiment: Experiment) -> None:
    training = experiment.config.training
    if experiment.test is None:
        logger.info("the images have no labels: k-NN and linear probe are skipped")
    if world_size() > 1:
        share = training.batch_size // world_size()
        backend = tensor_backend()
        logger.info(
            "%d processes: %d images of each batch per process, gradients reduced by %s", world_size(), share, backend
        )
    if batch_norm_batch_size(training) < training.batch_size:
        logger.info("BatchNorm normalises over %d images at a time", batch_norm_batch_size(training))


def _not_finite(experiment: Experiment, step: int, summary: Summary, saved_step: int | None, folder: RunFolder) -> str:
    """Returns the error message that ends the run."""
    encoder_lr, decoder_lr = learning_rates(experiment, step - 1)
    last = f"The last checkpoint is of step {saved_step}, in {folder.path / 'checkpoints'}"
    saved = "Nothing is saved yet" if saved_step is None else last
    return (
        f"gradients were not finite in {summary.most_in_a_row} steps in a row before step {step}, at learning rates "
        f"{encoder_lr:g} (encoder) and {decoder_lr:g} (decoder). These steps were skipped. {saved}. Check the images, "
        "or use lower learning rates in another output_dir"
    )
