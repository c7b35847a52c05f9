"""Checkpoints during training: the steps at which they are due, their contents, and the signals that stop the run."""

import time
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Protocol

import torch

from config.schema import RunConfig
from datasets.sources import DatasetInfo
from training.state import RunState
from utils import signals
from utils.distributed.collectives import DelayedMax, all_gather_object, barrier
from utils.distributed.processes import rank
from utils.logging import PhaseTimer, phase_log
from utils.run_folder.folder import RunFolder


class Opened(Protocol):
    """Opened config of a program that trains, such as an `Experiment`."""

    @property
    def config(self) -> RunConfig:
        """The config."""

    @property
    def device(self) -> torch.device:
        """Device of this rank."""

    @property
    def data_digest(self) -> str:
        """Digest of the training images, their labels and the names of their classes."""

    @property
    def info(self) -> DatasetInfo:
        """Facts about the data set."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of training steps of an epoch."""

    @property
    def total_steps(self) -> int:
        """Number of training steps of the complete run."""


def checkpoint_contents(experiment: Opened, state: RunState, alone: bool = False) -> dict[str, Any]:
    """Collective unless `alone`. Returns the contents of a checkpoint.

    These are the training state, the config, the digest of the images, the mean and standard deviation of their
    channels, and the range of their greys (see `Rules.grey_bits`). They are enough to use the model without the images.
    """
    return state.state_dict(alone) | {
        "config": experiment.config.to_yaml(),
        "data": experiment.data_digest,
        "statistics": [list(experiment.info.mean), list(experiment.info.std)],
        "grey_bits": experiment.info.grey_bits,
    }


class Saver:
    """Context manager that saves checkpoints when they are due. On exit, it waits until the last one is on the disk.

    Attributes:
        saved_step: step of the newest checkpoint; None if the run has none.
    """

    def __init__(self, experiment: Opened, state: RunState, folder: RunFolder, timer: PhaseTimer) -> None:
        self._experiment, self._state, self._timer = experiment, state, timer
        self._config = experiment.config.training
        self._writer = folder.checkpoint_writer() if rank() == 0 else None
        self._interval = CheckpointInterval(self._config.checkpoint_every, experiment.steps_per_epoch)
        self._delayed_max = DelayedMax()
        self.saved_step = state.step if folder.checkpoint else None

    def save(self, keep_as: str | None = None, alone: bool = False) -> None:
        """Collective unless `alone`. Copies the state to the host. A thread of rank 0 writes it.

        Args:
            keep_as: second file name, under which the checkpoint is kept permanently.
            alone: save without the other ranks. Only rank 0 writes. The tally and the history of adaptive
                timesteps cover only its share of each batch.
        """
        if alone and not self._writer:
            return
        experiment, state = self._experiment, self._state
        self.saved_step = state.step
        phase_log.info("saving step %d", state.step)
        with self._timer.phase("checkpoint"):
            contents = checkpoint_contents(experiment, state, alone)
            if self._writer:
                self._writer.save(contents, keep_as)
        phase_log.info("training from step %d to %d", state.step, experiment.total_steps)

    def save_if_due(self, before_evaluation: bool) -> int:
        """Collective. Saves if a checkpoint is due or if a signal stops the run. Returns the signal's number, or 0.

        All ranks take the same decision without synchronising with the device. With several ranks, a step acts on the
        requests that ranks made at the step before. Raises FolderError if the last checkpoint could not be written.
        """
        if self._writer:
            self._writer.check()
        stop, overdue = self._delayed_max(signals.received(), rank() == 0 and self._interval.overdue())
        if before_evaluation and not stop:
            # Without this, only the ranks that have received a signal would stop, and the others would evaluate.
            stop = max(all_gather_object(signals.received()))
        epoch, step_of_epoch = divmod(self._state.step, self._experiment.steps_per_epoch)
        keep_every = self._config.keep_every
        keep = keep_every is not None and step_of_epoch == 0 and epoch % keep_every == 0
        if self._interval.due(self._state.step) or overdue or keep or before_evaluation or stop:
            self.save(f"epoch_{epoch:04d}.pt" if keep else None)
        return stop

    def finish(self) -> None:
        """Collective. Waits until the last checkpoint is on the disk.

        Call it before this process ends: a launcher that sees one process end leaves little time to the others.
        """
        if self._writer:
            self._writer.wait()
        barrier()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._writer or nullcontext():  # waits for the last checkpoint even if other ranks are lost
            if error is None:
                self._delayed_max.wait()


class CheckpointInterval:
    """Interval between checkpoints, given as `N steps`, `N epochs` or `N minutes`."""

    def __init__(self, text: str, steps_per_epoch: int) -> None:
        number, unit = text.split()
        self._seconds = 60 * int(number) if unit == "minutes" else None
        self._steps = int(number) * (steps_per_epoch if unit == "epochs" else 1)
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Returns True at every N-th step, or at the end of every N-th epoch; False for `N minutes`."""
        return self._seconds is None and step % self._steps == 0

    def overdue(self) -> bool:
        """Returns True if N minutes have passed, by this rank's clock, since it last returned True or was created."""
        if self._seconds is None or time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True
