"""Writes accuracies and measures of a checkpoint to the file of --results, or measures to results.json of its run."""

import json
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
from utils.files import FolderError, check_writable, write_text, writing_to
from utils.run_folder.results import RESULTS, is_of_experiment, read_results, write_measures

logger = logging.getLogger(__name__)


class Record:
    """Writes measures of a checkpoint to a JSON file: {"measures": {name: {"protocol", "rows", "decimals"}}}.

    Without `file`, measures are added to results.json of the run, if it is of the checkpoint's step and the images
    are those of the run. (Its accuracies are written by train.py.)

    Args:
        file: JSON file for accuracies and measures of any images. Results that it already has are kept, except those of
            the same names.

    Raises ConfigError if `file` exists and has no results of this checkpoint and these images. Raises OSError if it
    cannot be written.
    """

    def __init__(self, trained: Trained, experiment: Experiment, file: Path | None = None) -> None:
        self._trained, self._images, self._file = trained, experiment.digests, file.resolve() if file else None
        self._obstacle: str | None = None
        self._failure: FolderError | None = None
        if file:
            self._origin = {"checkpoint": trained.digest, "step": trained.step, "data": self._images}
            if not self._is_ours(file):
                known = "checkpoint" in _read(file)
                why = "has no results of this checkpoint and these images" if known else "is not a file of --results"
                raise ConfigError(f"{file} {why}: set --results to another file")
            check_writable(file)
        elif not trained.saw_images_of(experiment):
            self._obstacle = "they are of other images than those of the run"
        elif not self._belongs_to_run():
            path = trained.folder / RESULTS
            self._obstacle = f"{path} is not that of step {trained.step} of this run and of these images"
        else:
            try:
                check_writable(trained.folder / RESULTS)
            except OSError as error:
                self._obstacle = f"{trained.folder / RESULTS} cannot be written ({error.strerror})"

    def log_obstacle(self) -> None:
        """Logs the reason if measures cannot be recorded, and what to do."""
        if self._obstacle:
            text = "the measures are not added to %s, because %s; test.py --results FILE writes them to another file"
            logger.info(text, RESULTS, self._obstacle)

    def check(self) -> None:
        """Raises FolderError if accuracies or a measure could not be written."""
        if self._failure:
            raise self._failure

    def add_accuracies(self, table: Table) -> None:
        """Adds accuracies to `file`, or replaces those of the same protocol and encoder. Call it on rank 0."""
        if self._file:
            self._write("accuracies", table=with_cells(_read(self._file).get("table", {}), table))

    def add(self, name: str, measured: Measured) -> None:
        """Adds a measure, or replaces it. Call it on rank 0."""
        if self._obstacle:
            return
        known = (_read(self._file) if self._file else read_results(self._trained.folder)).get("measures", {})
        before = known.get(name, {}).get("protocol", measured.protocol)
        written = self._write(f"measure {name}", measures=known | {name: asdict(measured)})
        if written and before != measured.protocol:
            path = self._file or RESULTS
            logger.info("the measure %s in %s replaced one with another protocol: %s", name, path, before)

    def _is_ours(self, file: Path) -> bool:
        """Returns True if the file is missing, or has results of this checkpoint and these images."""
        return not file.exists() or (file.is_file() and self._origin.items() <= _read(file).items())

    def _belongs_to_run(self) -> bool:
        results = read_results(self._trained.folder)
        is_ours = is_of_experiment(results, self._trained.trained_with, self._trained.step)
        return is_ours and results.get("images", self._images) == self._images

    def _write(self, what: str, **contents: Any) -> bool:
        """Returns True if the contents could be written. Logs a warning otherwise."""
        trained, file = self._trained, self._file
        try:
            if file:
                if not self._is_ours(file):
                    raise FolderError(f"{file} was changed by another program: set --results to another file")
                with writing_to(file.parent):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_text(file, json.dumps({**_read(file), **self._origin, **contents}, indent=1) + "\n")
            elif self._belongs_to_run():
                write_measures(trained.folder, contents["measures"])
            else:
                raise FolderError(f"{trained.folder / RESULTS} was changed or removed: restore it and start again")
        except FolderError as error:
            logger.warning("not recorded: %s: %s", what, error)
            self._failure = self._failure or error
            return False
        return True


def _read(file: Path) -> dict[str, Any]:
    """Returns the contents of a JSON file, or an empty dict if it is missing or holds no object."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def with_cells(table: Table, new: Table) -> Table:
    """Returns the table with the cells of `new`, which replace those of the same protocol and encoder."""
    protocols = dict.fromkeys([*table, *new])
    return {protocol: {**table.get(protocol, {}), **new.get(protocol, {})} for protocol in protocols}


def report(found: Iterable[tuple[str, Measured]], record: Record) -> dict[str, Measured]:
    """Collective. Prints and records each table as soon as it is computed. Returns the tables by name."""
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
    is_ours = is_of_experiment(results, trained.trained_with, trained.step)
    recorded = results.get("measures", {}) if is_ours else {}
    return {name: Measured(each["protocol"], each["rows"], each.get("decimals", 1)) for name, each in recorded.items()}
