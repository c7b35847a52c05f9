"""The measures of a checkpoint in its run's results.json, under the key "measures"."""

import logging
from collections.abc import Iterable
from dataclasses import asdict

from evaluation.measures.base import Measured
from experiment.opening import Experiment
from experiment.trained import Trained
from utils.distributed.processes import rank
from utils.files import FolderError
from utils.run_folder.results import RESULTS, belongs_to, read_results, write_results

logger = logging.getLogger(__name__)


class Record:
    """Adds measures of a checkpoint to the results.json of its run: {name: {"protocol", "rows", "decimals"}}.

    Nothing is added, and the reason is logged, if the file is not that of this step of the run, or if the images are
    not those of the run.

    Attributes:
        failure: first error in writing the file; None if there was none.
    """

    failure: FolderError | None = None

    def __init__(self, trained: Trained, experiment: Experiment) -> None:
        self._trained = trained
        is_of_run = trained.saw_images_of(experiment)
        self._applies = is_of_run and belongs_to(read_results(trained.folder), trained.trained_with, trained.step)
        if not self._applies:
            reason = (
                f"{trained.folder / RESULTS} is not that of step {trained.step} of this run"
                if is_of_run
                else "they are of other images than those of the run"
            )
            logger.info("the measures are not added to %s, because %s", RESULTS, reason)

    def check(self) -> None:
        """Raises FolderError if a measure could not be written."""
        if self.failure:
            raise self.failure

    def add(self, name: str, measured: Measured) -> None:
        """Adds a measure, or replaces it. Call it on rank 0. Logs a warning if the file cannot be written."""
        if not self._applies:
            return
        folder, config, step = self._trained.folder, self._trained.trained_with, self._trained.step
        known = read_results(folder).get("measures", {})
        before = known.get(name, {}).get("protocol", measured.protocol)
        try:
            write_results(folder, config, step, measures=known | {name: asdict(measured)})
        except FolderError as error:
            logger.warning("the measure %s is not recorded: %s", name, error)
            self.failure = self.failure or error
        else:
            if before != measured.protocol:
                logger.info("the measure %s in %s replaced one with another protocol: %s", name, RESULTS, before)


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
    recorded = results.get("measures", {}) if belongs_to(results, trained.trained_with, trained.step) else {}
    return {name: Measured(each["protocol"], each["rows"], each.get("decimals", 1)) for name, each in recorded.items()}
