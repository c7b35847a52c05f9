"""Accuracies and measures of a checkpoint in a results.json: of its run, or of a folder of their own."""

import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config.errors import ConfigError
from evaluation.judge import Table
from evaluation.measures.base import Measured
from experiment.opening import Experiment
from experiment.trained import Trained
from utils.distributed.processes import rank
from utils.files import FolderError, check_writable
from utils.run_folder.folder import is_run_folder
from utils.run_folder.results import RESULTS, belongs_to, read_results, write_results

logger = logging.getLogger(__name__)


class Record:
    """Adds measures of a checkpoint to a results.json, under "measures": {name: {"protocol", "rows", "decimals"}}.

    Args:
        folder: folder for the file, which is created if it is missing. None: the file is that of the run; only measures
            are added to it, and only if it is that of this step of the run, and the images are those of the run.

    Attributes:
        obstacle: reason why measures are not added to the file of the run; None if they are added.
        failure: first error in writing the file; None if there was none.

    Raises ConfigError if `folder` is a run folder, or if its file has results of another checkpoint or of other images.
    Raises OSError if the file cannot be written.
    """

    obstacle: str | None = None
    failure: FolderError | None = None

    def __init__(self, trained: Trained, experiment: Experiment, folder: Path | None = None) -> None:
        self._trained, self._folder, self._own_folder = trained, folder or trained.folder, folder is not None
        self._origin = {"checkpoint": trained.digest, "data": experiment.data_digest} if folder else {}
        path, before = self._folder / RESULTS, read_results(self._folder)
        if self._own_folder:
            if is_run_folder(self._folder):  # train.py takes a run with results of its newest step as finished
                raise ConfigError(f"--results {folder} is the folder of a run: set it to another folder")
            if path.exists() and not self._origin.items() <= before.items():
                raise ConfigError(
                    f"{path} has results of another checkpoint or of other images: set --results to another folder"
                )
            check_writable(path)
        elif not trained.saw_images_of(experiment):
            self.obstacle = "they are of other images than those of the run"
        elif not belongs_to(before, trained.trained_with, trained.step):
            self.obstacle = f"{path} is not that of step {trained.step} of this run"

    def check(self) -> None:
        """Raises FolderError if a measure could not be written."""
        if self.failure:
            raise self.failure

    def add(self, name: str, measured: Measured) -> None:
        """Adds a measure, or replaces it. Call it on rank 0. Logs a warning if the file cannot be written."""
        if self.obstacle:
            return
        known = read_results(self._folder).get("measures", {})
        before = known.get(name, {}).get("protocol", measured.protocol)
        written = self._write(f"the measure {name} is", measures=known | {name: asdict(measured)})
        if written and before != measured.protocol:
            logger.info("the measure %s in %s replaced one with another protocol: %s", name, RESULTS, before)

    def add_accuracies(self, table: Table) -> None:
        """Adds the accuracies, or replaces them, in a folder of their own. (Those of a run are written by train.py.)

        Call it on rank 0. Logs a warning if the file cannot be written.
        """
        if self._own_folder:
            self._write("the accuracies are", table=table)

    def _write(self, what: str, **contents: Any) -> bool:
        """Returns True if the contents could be written."""
        config, step = self._trained.trained_with, self._trained.step
        try:
            write_results(self._folder, config, step, **self._origin, **contents)
        except FolderError as error:
            logger.warning("%s not recorded: %s", what, error)
            self.failure = self.failure or error
            return False
        return True


def report(found: Iterable[tuple[str, Measured]], record: Record) -> dict[str, Measured]:
    """Collective. Prints and records each table as soon as it is computed. Returns the tables by name."""
    if record.obstacle:
        text = "the measures are not added to %s, because %s; test.py --results FOLDER writes them into another folder"
        logger.info(text, RESULTS, record.obstacle)
    measured = {}
    for name, table in found:
        measured[name] = table
        if rank() == 0:
            print(f"\n{name}: {table}", flush=True)
            record.add(name, table)
    return measured


def recorded_measures(trained: Trained) -> dict[str, Measured]:
    """Returns the measures that results.json has of this step of the run, by name."""
    results = read_results(trained.folder)
    recorded = results.get("measures", {}) if belongs_to(results, trained.trained_with, trained.step) else {}
    return {name: Measured(each["protocol"], each["rows"], each.get("decimals", 1)) for name, each in recorded.items()}
