"""Checkpoints of a run under way: when one is due, what it holds, and the signals that stop the run."""

import time
from contextlib import nullcontext
from types import TracebackType
from typing import Any

from experiment.opening import Experiment
from training.state import TrainState
from utils import signals
from utils.distributed.collectives import DelayedMax, all_gather_object, barrier
from utils.distributed.processes import rank
from utils.logging import PhaseTimer, phase_log
from utils.run_folder.folder import RunFolder


def checkpoint_contents(experiment: Experiment, state: TrainState, alone: bool = False) -> dict[str, Any]:
    """Collective unless `alone`. The whole state, and what is needed to use it without the experiment."""
    return state.state_dict(alone) | {
        "config": experiment.config.to_yaml(),
        "data": experiment.data_digest,
        "statistics": [list(experiment.info.mean), list(experiment.info.std)],
    }


class Saver:
    """Saves checkpoints when they are due. On exit, waits until the last one is on the disk."""

    def __init__(self, experiment: Experiment, state: TrainState, folder: RunFolder, timer: PhaseTimer) -> None:
        self._experiment, self._state, self._timer = experiment, state, timer
        self._config = experiment.config.training
        self._writer = folder.checkpoint_writer() if rank() == 0 else None
        self._interval = CheckpointInterval(self._config.checkpoint_every, experiment.loader.steps_per_epoch)
        self._delayed_max = DelayedMax()
        self.saved_step = state.step if folder.checkpoint else None

    def save(self, keep_as: str | None = None, alone: bool = False) -> None:
        """Collective unless `alone`. Copies the state to the host; a thread of rank 0 writes it.

        Args:
            keep_as: a second name under which the checkpoint is kept for good.
        """
        experiment, state = self._experiment, self._state
        self.saved_step = state.step
        phase_log.info("saving step %d", state.step)
        with self._timer.phase("checkpoint"):
            contents = checkpoint_contents(experiment, state, alone)
            if self._writer:
                self._writer.save(contents, keep_as)
        phase_log.info("training from step %d to %d", state.step, experiment.total_steps)

    def save_if_due(self, before_evaluation: bool) -> int:
        """Collective. Saves if a checkpoint is due, or if a signal stops the run. Returns the signal, or 0.

        All processes decide alike without waiting for the device: a step acts on the requests that all ranks made at
        the step before. Raises FolderError if the last checkpoint could not be written.
        """
        if self._writer:
            self._writer.check()
        stop, overdue = self._delayed_max(signals.received(), rank() == 0 and self._interval.overdue())
        if before_evaluation and not stop:
            stop = max(all_gather_object(signals.received()))  # a signal does not wait for minutes of judging
        epoch, step_of_epoch = divmod(self._state.step, self._experiment.loader.steps_per_epoch)
        keep_every = self._config.keep_every
        keep = keep_every is not None and step_of_epoch == 0 and epoch % keep_every == 0
        if self._interval.due(self._state.step) or overdue or keep or before_evaluation or stop:
            self.save(f"epoch_{epoch:04d}.pt" if keep else None)
        return stop

    def finish(self) -> None:
        """Collective. Waits until the last checkpoint is on the disk: launchers give processes little time to end."""
        if self._writer:
            self._writer.wait()
        barrier()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._writer or nullcontext():  # waits for the last checkpoint whatever becomes of the other processes
            if error is None:
                self._delayed_max.wait()


class CheckpointInterval:
    """Tells when a checkpoint is due, from `N steps`, `N epochs` or `N minutes`."""

    def __init__(self, text: str, steps_per_epoch: int) -> None:
        number, unit = text.split()
        self._seconds = 60 * int(number) if unit == "minutes" else None
        self._steps = int(number) * (steps_per_epoch if unit == "epochs" else 1)
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """True at every N-th step or epoch."""
        return self._seconds is None and step % self._steps == 0

    def overdue(self) -> bool:
        """True once when N minutes have passed, by this process's clock."""
        if self._seconds is None or time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True
