"""The training loop of a classifier: pseudo-labels, steps, reports, checkpoints and evaluations."""

import logging
from contextlib import closing, nullcontext

from config.keys import flat
from datasets.images import DatasetError
from training.evaluating import evaluation_due
from training.loop import MAX_SKIPPED, progress_bar
from training.reports import record_steps
from training.saving import Saver
from transfer.evaluating import accuracy, renew_targets
from transfer.opening import Task
from transfer.state import FinetuneState
from transfer.step import learning_rates, step_pixels, train_step
from utils import signals
from utils.device import memory_for
from utils.distributed.collectives import SharedError, broadcast_object
from utils.distributed.data_parallel import data_parallel
from utils.distributed.processes import rank
from utils.logging import PhaseTimer, phase_log
from utils.run_folder.folder import RunFolder
from utils.run_folder.results import write_results
from utils.run_folder.run_log import RunLog

logger = logging.getLogger(__name__)


def finetune(task: Task, state: FinetuneState, folder: RunFolder) -> None:
    """Collective. Trains from `state` to the last step. Writes checkpoints and reports into `folder`.

    Each rank trains on its share of each batch. Rank 0 writes. Raises the errors of `training.loop.train`.
    """
    config, total_steps = task.config.training, task.total_steps
    state.wrapped = data_parallel(state.model)
    timer, reported_step = PhaseTimer(), state.step
    log = folder.run_log(state.step) if rank() == 0 else None
    with (
        signals.deferred(),
        Saver(task, state, folder, timer) as saver,
        log or nullcontext(),
        closing(step_pixels(task, state.step)) as pixels,
        progress_bar(config.batch_size, state.step, total_steps) as bar,
    ):
        if log:
            log.text("config", f"```yaml\n{task.config.to_yaml()}```", state.step)
        _evaluate_if_due(task, state, folder, log, timer)  # repeats an evaluation that was interrupted
        phase_log.info("training from step %d to %d", state.step, total_steps)
        while state.step < total_steps:
            _renew_targets_if_due(task, state, log, timer)
            try:
                with memory_for(lambda: "use a smaller training.batch_size, in another output_dir"):
                    grad_norm = train_step(task, state, pixels, timer)
            except DatasetError:  # not a collective save: the other ranks continue, and their losses are not saved
                saver.save(alone=True)
                raise
            bar.update(config.batch_size)

            if state.step % config.log_every == 0 or state.step == total_steps:
                with timer.phase("wait for the device"):  # each step only queues its work
                    summary, last_grad_norm = state.tally.take(), grad_norm.item()
                if log:
                    rates = {f"group_{i}": rate for i, rate in enumerate(learning_rates(task, state, state.step - 1))}
                    num_steps = state.step - reported_step
                    record_steps(log, task, state, rates, summary, last_grad_norm, timer, num_steps)
                bar.set_postfix(loss=f"{summary.losses['loss']:.4f}", refresh=False)
                reported_step = state.step
                if summary.most_in_a_row >= MAX_SKIPPED:
                    saver.finish()
                    raise SharedError(
                        f"gradients were not finite in {summary.most_in_a_row} steps in a row before step "
                        f"{state.step}: check the images, or use a lower optimizer.lr in another output_dir"
                    )

            stopped_by = saver.save_if_due(before_evaluation=evaluation_due(task, state.step))
            if stopped_by:
                saver.finish()
                phase_log.info("stopped at step %d, state saved", state.step)
                raise signals.Stopped(stopped_by, f" at step {state.step}, state saved")
            _evaluate_if_due(task, state, folder, log, timer)
        phase_log.info("finished")


def _renew_targets_if_due(task: Task, state: FinetuneState, log: RunLog | None, timer: PhaseTimer) -> None:
    """Collective. Computes and reports pseudo-labels at the start of an epoch that uses them."""
    epoch, step_of_epoch = divmod(state.step, task.steps_per_epoch)
    if step_of_epoch or not task.method.stage(epoch).num_unlabelled:
        return
    phase_log.info("pseudo-labels of epoch %d", epoch)
    with timer.phase("pseudo-labels"):
        facts = renew_targets(task, state)
    if log and not log.has("pseudo_labels", state.step):
        log.report("pseudo_labels", state.step, facts)


def _evaluate_if_due(
    task: Task, state: FinetuneState, folder: RunFolder, log: RunLog | None, timer: PhaseTimer
) -> None:
    """Collective. Evaluates and records the result if this is due and not yet done. A signal ends it immediately."""
    if not evaluation_due(task, state.step):
        return
    with signals.obeyed(), timer.phase("evaluation"):  # the state has been saved, and an evaluation does not change it
        at_end = state.step == task.total_steps
        if broadcast_object(log is not None and log.has("evaluation", state.step)) and not at_end:
            return
        phase_log.info("evaluation at step %d", state.step)
        table = {"EMA": accuracy(task, state.ema.ema_model)}
        if at_end:
            table["last weights"] = accuracy(task, state.model)
        if log:
            _record(log, task, state.step, table)
            if at_end:
                write_results(folder.path, task.config, state.step, table={describe(task): table})


def _record(log: RunLog, task: Task, step: int, table: dict[str, dict[str, float]]) -> None:
    epoch, found = step // task.steps_per_epoch, table["EMA"]
    logger.info("epoch %d: top-1 %.1f, top-3 %.1f of the test images", epoch, found["top1"], found["top3"])
    if not log.has("evaluation", step):
        log.report("evaluation", step, {"epoch": epoch, **found})
    if step == task.total_steps:
        shown = {key: value for key, value in flat(task.config).items() if key != "training.epochs"}
        log.hyperparameters(shown, [f"evaluation/{name}" for name in ("epoch", *found)])


def describe(task: Task) -> str:
    """Returns the name of the task's row in the table of accuracies."""
    config = task.config
    start = "encoder.weights" if config.encoder.weights else "random weights"
    split = "given" if config.labelled else f"split {config.label_split}"
    return f"{config.method}, {len(task.labelled)} labels ({split}), from {start}"
