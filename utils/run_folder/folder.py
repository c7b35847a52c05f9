"""The run folder: locking, comparison with the config, resuming, and preparation for writing."""

import logging
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol, Self

from config.errors import ConfigError
from config.keys import differences
from config.reading import parse
from config.schema import RunConfig
from utils.distributed.collectives import all_equal, all_gather_object, barrier, broadcast_object
from utils.distributed.processes import rank
from utils.files import InUseError, lock_file, write_text
from utils.logging import log_to
from utils.run_folder.checkpoint import image_statistics, load_checkpoint, newest_checkpoint
from utils.run_folder.checkpoint_writer import CheckpointWriter
from utils.run_folder.results import RESULTS, is_judged_by, read_results
from utils.run_folder.run_log import METRICS, RunLog

logger = logging.getLogger(__name__)

LOCK = ".lock"
SHARING_SECONDS = 60  # time in which all machines must see a new file; NFS caches names for up to a minute
SUBFOLDERS = ("checkpoints", "logs", "samples", "tensorboard")
OUTPUTS = (*SUBFOLDERS, "pictures", "features", "predictions")
"""Subfolders of a run folder to which any of the programs writes."""


def is_run_folder(path: Path) -> bool:
    """Returns True if a run has written to this folder. Returns False if the folder cannot be read."""
    try:
        return (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()
    except PermissionError:
        return False


class Resumable(Protocol):
    """State that a checkpoint can be loaded into."""

    step: int

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the contents of a checkpoint. Raises CheckpointError if they do not fit."""


class RunFolder:
    """Folder of a run. Call its methods on all ranks in this order: `open`, `check_images`, `resume`, `prepare`.

    A context manager that releases the lock on exit. Before `prepare`, only the lock of an existing folder is written.

    Attributes:
        path: the folder, `output_dir` of the config.
        checkpoint: path of the checkpoint from which the run resumes, the same on all ranks; None for a new run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.output_dir)
        self.checkpoint: Path | None = None
        self._config = config
        self._saved: dict[str, Any] | None = None
        self._held = ExitStack()
        self._locked = False

    def open(self) -> None:
        """Collective. Locks the folder if a run has used it, and reads its newest checkpoint.

        Logs the run keys that have changed. Raises ConfigError if another process uses the folder, if the folder holds
        another experiment, or if the machines see different checkpoints. Raises CheckpointError if all checkpoints are
        damaged.
        """
        if rank() == 0 and (self.path / LOCK).exists():
            self._lock()
        barrier()  # no rank reads the folder before rank 0 has locked it
        self.checkpoint, self._saved = self._load_newest()
        if not all_equal(self._saved and self._saved["step"]):
            raise self._not_shared()
        self._check_config()

    def is_finished(self) -> bool:
        """Collective. Returns True if results.json belongs to this config and to the newest checkpoint."""
        results = broadcast_object(read_results(self.path))
        return self._saved is not None and is_judged_by(results, self._config, self._saved["step"])

    def log_finished(self) -> None:
        """Logs that the run is finished, and how to train longer."""
        end, epochs = self._config.optimizer.fixed_end, self._config.training.epochs
        advice = f"choose another output_dir: {end} fixes the last epoch" if end else "raise training.epochs"
        text = "finished: all %d epochs are done, and images are not compared again; to train longer, %s"
        logger.info(text, epochs, advice)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of the channels in the checkpoint from which the run resumes; None if not known.

        They are forgotten by `prepare`.
        """
        return image_statistics(self._saved) if self._saved else None

    @property
    def grey_bits(self) -> int | None:
        """Range of greys in the checkpoint from which the run resumes. Forgotten by `prepare`."""
        return self._saved.get("grey_bits") if self._saved else None

    @property
    def started_from(self) -> dict[str, str]:
        """Digest of the file that each part of the run started from, in its checkpoint. Forgotten by `prepare`."""
        return dict(self._saved.get("started_from", {})) if self._saved else {}

    def check_images(self, digest: str) -> None:
        """Raises ConfigError if the run was trained on images with a digest other than `digest`."""
        if self._saved and self._saved["data"] != digest:
            raise ConfigError(
                f"{self._config.training_images} holds other images than {self.checkpoint} was trained on: "
                "put the original images back, or choose another output_dir"
            )

    def resume(self, state: Resumable, total_steps: int) -> None:
        """Loads the newest checkpoint, if there is one, into `state`.

        Raises CheckpointError if it does not fit, and ConfigError if training.epochs was changed too late.
        """
        if self._saved:
            self._check_epochs(self._saved["step"], total_steps)
            state.load_state_dict(self._saved)
            logger.info("resuming from %s at step %d of %d", self.checkpoint, state.step, total_steps)

    def prepare(self) -> None:
        """Collective. Locks the folder, creates its subfolders and writes config.yaml.

        Raises ConfigError if the folder cannot be written to, if another run uses it or has just used it, or if the
        machines do not share it. From here on, the log of this process is also written to logs/rank_<rank>.log.
        """
        if rank() == 0:
            if not self._locked:
                self._lock()
            if self._saved is None and any((self.path / "checkpoints").glob("*.pt")):
                raise ConfigError(f"another run has just used {self.path}: start this program again to resume that run")
            self._make_writable()
        barrier()
        self._check_shared()
        self._saved = None  # frees a copy of the complete state
        self._held.enter_context(log_to(self.path / "logs"))

    def checkpoint_writer(self) -> CheckpointWriter:
        """Returns the writer of this run's checkpoints. Call it only on rank 0."""
        return CheckpointWriter(self.path / "checkpoints", self.checkpoint, flush_first=self.path / METRICS)

    def run_log(self, step: int) -> RunLog:
        """Returns the log of this run's reports, from `step` on. Call it only on rank 0. Raises FolderError."""
        return RunLog(self.path, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def _lock(self) -> None:
        """Creates the folder and holds its lock until the context ends. Raises ConfigError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(lock_file(self.path / LOCK))
            self._locked = True
        except InUseError as holder:
            raise ConfigError(
                f"{self.path} is in use by {holder}: end that process, wait for it, or choose another output_dir"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"cannot write to output_dir {self.path} ({error.strerror}): "
                "fix the storage or choose another output_dir"
            ) from None

    def _load_newest(self) -> tuple[Path | None, dict[str, Any] | None]:
        """Collective. Returns the path and the contents of the checkpoint that rank 0 chooses.

        Returns (None, None) if there is no checkpoint, and on a rank that does not see the file.
        """
        newest = newest_checkpoint(self.path / "checkpoints") if rank() == 0 else None
        path = broadcast_object(newest and newest[0])
        if newest or path is None or not path.exists():
            return newest or (None, None)
        return path, load_checkpoint(path)

    def _check_config(self) -> None:
        """Raises ConfigError if the folder is that of another experiment or program. Logs the run keys that changed."""
        before = self._config_before()
        if before is None:
            return
        config = self._config
        changed = differences(before, config, run=False)
        rates = config.optimizer
        old_epochs, new_epochs = changed.get("training.epochs", (0, 0))
        if set(changed) == {"training.epochs"} and rates.schedule == "cosine":
            raise ConfigError(
                f"{self.path} was started with training.epochs={old_epochs}, and the learning rates of "
                f"{rates.fixed_end} depend on it: restore this value or choose another output_dir"
            )
        # More epochs continue the same experiment. Before the cool-down, its end does not matter: see `_check_epochs`.
        if rates.schedule == "constant" and (new_epochs > old_epochs or rates.cooldown_epochs):
            changed.pop("training.epochs", None)
        if changed:
            listing = ", ".join(f"{name} was {old} and is {new}" for name, (old, new) in changed.items())
            raise ConfigError(
                f"{self.path} holds another experiment ({listing}): "
                "choose another output_dir, remove the folder, or restore the old values of these keys"
            )
        for name, (old, new) in differences(before, config, run=True).items():
            logger.info("%s was %s and is now %s", name, old, new)

    def _check_epochs(self, step: int, total_steps: int) -> None:
        """Raises ConfigError if training.epochs has changed, and `step` is later than the begin of a cool-down.

        Until then, the run is the same as one that was started with the new value.
        """
        before, new = self._config_before(), self._config.training.epochs
        old, cooldown = before.training.epochs if before else new, self._config.optimizer.cooldown_epochs
        constant = min(old, new) - cooldown  # epochs before the earlier one of the two cool-downs
        if old != new and cooldown and step > constant * (total_steps // new):
            raise ConfigError(
                f"{self.path} was started with training.epochs={old}, which can be changed to {new} only in its first "
                f"{constant:g} epochs, before the cool-down: restore this value or choose another output_dir"
            )
        if old != new:
            logger.info("training.epochs was %d and is now %d", old, new)

    def _config_before(self) -> RunConfig | None:
        """Returns the config in the checkpoint, or else in config.yaml; None for a new run. Raises ConfigError."""
        schema = type(self._config)
        if self._saved:
            try:
                return parse(schema, self._saved["config"], f"the config in {self.path}")
            except ConfigError as error:
                raise ConfigError(f"{error}, or choose another output_dir") from None
        written = self.path / "config.yaml"
        if not written.exists():
            return None
        try:
            if not written.read_text(encoding="utf-8").strip():
                raise ConfigError("it is empty")
            return parse(schema, written.read_text(encoding="utf-8"), str(written))
        except (ConfigError, UnicodeDecodeError, IsADirectoryError):
            raise ConfigError(f"{written} was not written by this program: choose another output_dir") from None

    def _check_shared(self) -> None:
        """Collective. Raises ConfigError if a rank does not see config.yaml, which rank 0 has written."""
        for attempt in range(SHARING_SECONDS):
            time.sleep(min(attempt, 1))
            for folder in (self.path.parent, self.path):
                with suppress(OSError):
                    list(folder.iterdir())  # NFS remembers that a name is missing, until its folder is listed
            if all(all_gather_object((self.path / "config.yaml").exists())):
                return
        raise self._not_shared()

    def _not_shared(self) -> ConfigError:
        return ConfigError(f"the machines see different files in {self.path}: set output_dir to shared storage")

    def _make_writable(self) -> None:
        """Creates the subfolders, tests that they can be written to, and writes config.yaml. Raises ConfigError."""
        try:
            for name in SUBFOLDERS:
                (self.path / name).mkdir(exist_ok=True)
                TemporaryFile(dir=self.path / name).close()
            for name in (METRICS, RESULTS):
                if (self.path / name).is_dir():
                    raise ConfigError(f"{self.path / name} is a folder, not a file: choose another output_dir")
            write_text(self.path / "config.yaml", self._config.to_yaml())
        except OSError as error:
            raise ConfigError(
                f"cannot write to output_dir {self.path} ({error.strerror}): "
                "fix the storage or choose another output_dir"
            ) from None
