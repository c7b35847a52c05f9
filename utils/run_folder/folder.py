"""The folder of a run: locked, compared with the config, resumed from its newest checkpoint, prepared for writing."""

import logging
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol, Self

from config.errors import ConfigError
from config.reading import differences, parse_config
from config.schema import Config
from utils.distributed.collectives import all_equal, barrier, broadcast_object
from utils.distributed.processes import rank
from utils.files import InUseError, lock_file, write_text
from utils.logging import log_to
from utils.run_folder.checkpoint import load_checkpoint, newest_checkpoint
from utils.run_folder.checkpoint_writer import CheckpointWriter
from utils.run_folder.results import RESULTS, belongs_to, read_results
from utils.run_folder.run_log import METRICS, RunLog

logger = logging.getLogger(__name__)

LOCK = ".lock"


class Resumable(Protocol):
    """State that a checkpoint can be loaded into."""

    step: int

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RunFolder:
    """The folder of a run as train.py uses it, in this order: `open`, `check_images`, `resume`, `prepare`.

    A context that releases the lock. `open` to `prepare` are collective; nothing is written before `prepare`.

    Attributes:
        path: the folder, config.output_dir.
        checkpoint: path of the checkpoint that the run resumes from, the same on all ranks; None for a new run.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output_dir)
        self.checkpoint: Path | None = None
        self._config = config
        self._saved: dict[str, Any] | None = None
        self._held = ExitStack()
        self._locked = False

    def open(self) -> None:
        """Collective. Locks a folder that a run has used, and reads its newest checkpoint.

        Raises ConfigError if another process uses the folder or if it holds another experiment, CheckpointError if no
        checkpoint is whole. Logs the run keys that changed.
        """
        if rank() == 0 and (self.path / LOCK).exists():
            self._lock()
        barrier()  # no process reads what another run may still write
        self.checkpoint, self._saved = self._load_newest()
        if not all_equal(self._saved and self._saved["step"]):
            raise ConfigError(f"the machines see different files in {self.path}: output_dir must be storage they share")
        self._check_config()

    def is_finished(self) -> bool:
        """Collective. True if results.json belongs to this config and to the newest checkpoint."""
        results = broadcast_object(read_results(self.path))
        return self._saved is not None and belongs_to(results, self._config, self._saved["step"])

    def check_images(self, digest: str) -> None:
        """Raise ConfigError if the run was trained on images with another digest."""
        if self._saved and self._saved["data"] != digest:
            raise ConfigError(
                f"{self._config.data.root} holds other images than {self.checkpoint} was trained on: "
                "put those back, or choose another output_dir"
            )

    def resume(self, state: Resumable, total_steps: int) -> None:
        """Load the newest checkpoint into `state`, if there is one; raises CheckpointError if it does not fit."""
        if self._saved:
            state.load_state_dict(self._saved)
            logger.info("%s: at step %d of %d", self.checkpoint, state.step, total_steps)

    def prepare(self) -> None:
        """Collective. Locks the folder, makes what a run writes into, and writes config.yaml; raises ConfigError.

        From here on, this process's log goes to logs/rank_<rank>.log.
        """
        if rank() == 0:
            if not self._locked:
                self._lock()
            if self._saved is None and any((self.path / "checkpoints").glob("*.pt")):
                raise ConfigError(f"another run has just used {self.path}: start again to resume it")
            self._make_writable()
        barrier()
        self._saved = None  # frees a copy of the whole state
        self._held.enter_context(log_to(self.path / "logs"))

    def checkpoint_writer(self) -> CheckpointWriter:
        """Writer of this run's checkpoints, for rank 0."""
        return CheckpointWriter(self.path / "checkpoints", self.checkpoint, flush_first=self.path / METRICS)

    def run_log(self, step: int) -> RunLog:
        """Log of this run's reports, from `step` on, for rank 0; raises FolderError."""
        return RunLog(self.path, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def _lock(self) -> None:
        """Make the folder and hold its lock until the context ends; raises ConfigError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(lock_file(self.path / LOCK))
            self._locked = True
        except InUseError as holder:
            raise ConfigError(
                f"{self.path} is in use by {holder}: end it or wait, or choose another output_dir"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot write to output_dir {self.path}: {error.strerror}") from None

    def _load_newest(self) -> tuple[Path | None, dict[str, Any] | None]:
        """Collective. The checkpoint that rank 0 chooses, and its contents on all ranks that see it."""
        newest = newest_checkpoint(self.path / "checkpoints") if rank() == 0 else None
        path = broadcast_object(newest and newest[0])
        if newest or path is None or not path.exists():
            return newest or (None, None)
        return path, load_checkpoint(path)

    def _check_config(self) -> None:
        """Raise ConfigError if the folder holds another experiment or something else; log changed run keys."""
        before = self._config_before()
        if before is None:
            return
        config = self._config
        changed = differences(before, config, run=False)
        constant = config.optimizer.schedule == "constant"  # else the last epoch decides every learning rate
        if "training.epochs" in changed and config.training.epochs > before.training.epochs and constant:
            del changed["training.epochs"]  # more epochs continue the same experiment
        if set(changed) == {"training.epochs"} and not constant:
            raise ConfigError(
                f"{self.path} was begun for {before.training.epochs} epochs, on which optimizer.schedule=cosine "
                "depends: choose another output_dir"
            )
        if changed:
            listing = ", ".join(f"{name} was {old} and is {new}" for name, (old, new) in changed.items())
            raise ConfigError(
                f"{self.path} holds another experiment: {listing}; "
                "choose another output_dir, remove that folder, or give these keys their former values"
            )
        for name, (old, new) in differences(before, config, run=True).items():
            logger.info("%s was %s and is now %s", name, old, new)

    def _config_before(self) -> Config | None:
        """The config that the folder was used with: the checkpoint's, else that of config.yaml; None for a new run."""
        if self._saved:
            return parse_config(self._saved["config"], f"the config in {self.path}")
        written = self.path / "config.yaml"
        if not written.exists():
            return None
        try:
            if not written.read_text().strip():
                raise ConfigError("it is empty")
            return parse_config(written.read_text(), str(written))
        except (ConfigError, UnicodeDecodeError, IsADirectoryError):
            raise ConfigError(f"{written} is not of a run of this program: choose another output_dir") from None

    def _make_writable(self) -> None:
        """Make the folders inside, test that they can be written to, and write config.yaml; raises ConfigError."""
        try:
            for name in ("checkpoints", "logs", "samples", "tensorboard"):
                (self.path / name).mkdir(exist_ok=True)
                TemporaryFile(dir=self.path / name).close()
            for name in (METRICS, RESULTS):
                if (self.path / name).is_dir():
                    raise ConfigError(f"{self.path / name} is a folder: choose another output_dir")
            write_text(self.path / "config.yaml", self._config.to_yaml())
        except OSError as error:
            raise ConfigError(f"cannot write to output_dir {self.path}: {error.strerror}") from None
