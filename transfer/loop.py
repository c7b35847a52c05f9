"""Training of a classifier: pseudo-labels, steps and evaluations, in the training loop of all programs."""

import logging
from collections.abc import Generator, Iterator

from torch import Tensor

from config.keys import flat
from training.loop import Job, run_job
from training.saving import Saver
from transfer.evaluating import accuracy, renew_targets
from transfer.opening import Task
from transfer.state import FinetuneState
from transfer.step import learning_rates, step_pixels, train_step
from utils import signals
from utils.logging import PhaseTimer, phase_log
from utils.run_folder.folder import RunFolder
from utils.run_folder.results import write_results
from utils.run_folder.run_log import RunLog, tag_of

logger = logging.getLogger(__name__)


def finetune(task: Task, state: FinetuneState, folder: RunFolder) -> None:
    """Collective. Trains a classifier from `state` to the last step. Raises the errors of `run_job`."""
    run_job(FinetuneJob(task, state, folder))


class FinetuneJob(Job[Task, FinetuneState]):
    """Training of a classifier, as finetune.py does it."""

    def pixels(self) -> Generator[Tensor, None, None]:
        return step_pixels(self.opened, self.state.step)

    def before_step(self, saver: Saver, log: RunLog | None, timer: PhaseTimer) -> None:
        """Collective. Computes and reports pseudo-labels at the start of an epoch that uses them.

        A signal interrupts this computation. The state is therefore saved first, and a resumed run repeats the
        computation.
        """
        task, state = self.opened, self.state
        epoch, step_of_epoch = divmod(state.step, task.steps_per_epoch)
        if step_of_epoch or not task.method.stage(epoch).num_unlabelled:
            return
        if saver.saved_step != state.step:
            saver.save()
        phase_log.info("pseudo-labels of epoch %d", epoch)
        with signals.obeyed(), timer.phase("pseudo-labels"):
            facts = renew_targets(task, state)
        if log and not log.has("pseudo_labels", state.step):
            log.report("pseudo_labels", state.step, facts)
        phase_log.info("training from step %d to %d", state.step, task.total_steps)

    def step(self, pixels: Iterator[Tensor], timer: PhaseTimer) -> Tensor:
        return train_step(self.opened, self.state, pixels, timer)

    def rates(self, step: int) -> dict[str, float]:
        return {f"group_{index}": rate for index, rate in enumerate(learning_rates(self.opened, self.state, step))}

    def evaluate(self, log: RunLog | None) -> None:
        """Collective. Evaluates the EMA and, after the last step, also the last weights."""
        task, state = self.opened, self.state
        table = {"EMA": accuracy(task, state.ema.ema_model)}
        at_end = state.step == task.total_steps
        if at_end:
            table["last weights"] = accuracy(task, state.model)
        if log:
            _record(log, task, state.step, table)
            if at_end:
                rows = {describe(task, state): table}
                images = [task.data_digest, task.test.digest()]
                write_results(
                    self.folder.path, task.config, state.step, images, table=rows, started_from=state.started_from
                )

    def less_memory(self) -> str:
        return "use a smaller training.batch_size, in another output_dir"


def _record(log: RunLog, task: Task, step: int, table: dict[str, dict[str, float]]) -> None:
    epoch, found = step // task.steps_per_epoch, table["EMA"]
    logger.info("epoch %d: top-1 %.1f, top-3 %.1f of the test images", epoch, found["top1"], found["top3"])
    if not log.has("evaluation", step):
        log.report("evaluation", step, {"epoch": epoch, **found})
    if step == task.total_steps:
        shown = {key: value for key, value in flat(task.config).items() if key != "training.epochs"}
        log.hyperparameters(shown, [tag_of("evaluation", name) for name in ("epoch", *found)])


def describe(task: Task, state: FinetuneState) -> str:
    """Returns the name of the run's row in the table of accuracies."""
    digest = state.started_from.get("encoder")
    start = f"weights {digest[:8]}" if digest else "random weights"
    split = "given" if task.config.labelled else f"split {task.config.label_split}"
    return f"{task.config.method}, {len(task.labelled)} labels ({split}), from {start}"
