"""Training and judging of single runs before a deadline."""

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ablations.runs import Ablation, Run
from ablations.tables import markdown_tables
from config.errors import ConfigError
from utils import signals
from utils.files import write_text
from utils.text import join_names

if TYPE_CHECKING:
    from ablations.trial import Trial

CALIBRATION_STEPS = 60
FIRST_JUDGING_S, FIRST_STARTUP_S = 120.0, 30.0  # estimates that are used until each has been measured

logger = logging.getLogger(__name__)


class Runner:
    """Trains and judges runs, one at a time, as far as the time allows.

    Args:
        ablation: plan and results. New results are recorded there.
        out: folder of the results.
        deadline: time of `time.monotonic()`, in seconds, at which the runner must have finished.
        data_name: name of the data set in the tables; None: the config's `data.name`.
    """

    def __init__(self, ablation: Ablation, out: Path, deadline: float, data_name: str | None) -> None:
        self.ablation, self.out, self.deadline, self.data_name = ablation, out, deadline, data_name
        self._judging_s: list[float] = []
        self._startup_s: list[float] = []

    def seconds_left(self) -> float:
        """Returns the seconds left for training: 1.5 times the longest evaluation so far is reserved for judging."""
        return self.deadline - 1.5 * max(self._judging_s, default=FIRST_JUDGING_S) - time.monotonic()

    def must_stop(self) -> bool:
        """Returns True if a signal has arrived or no time is left."""
        return bool(signals.received()) or self.seconds_left() < 0

    def has_time_to_start(self) -> bool:
        """Returns True if the time is enough to load the images and to start a run."""
        return not self.must_stop() and self.seconds_left() >= max(self._startup_s, default=FIRST_STARTUP_S)

    def train_and_judge(self, run: Run, folder: Path) -> bool:
        """Trains a run as far as the time allows, judges it and records the result. Returns True if it is complete.

        If a signal arrives, the run is only saved, and False is returned. Raises an error if the run cannot be trained.

        Args:
            folder: folder of the run's checkpoint.
        """
        from ablations.trial import Trial, check_encoder_parts

        began = time.monotonic()
        epochs = self._epochs_of(run, folder)
        if epochs is None:
            return False
        training = run.config.training.model_copy(update={"epochs": epochs})
        config = run.config.model_copy(update={"training": training})
        if run.stage.keep:
            check_encoder_parts(self.out / run.name, config)
        trial = Trial(config, folder / "last.pt", run.judging, run.stage.control)
        logger.info("%s, %d epochs: %s", run.name, epochs, " ".join(run.overrides) or "no overrides")
        others = self.ablation.results_on_other_images(run, trial.experiment.data_digest)
        if others:
            logger.info(
                "since the results of %s, the training images have changed, or data.holdout divides them in another "
                "way: do not compare these results with that of %s",
                join_names(others),
                run.name,
            )
        steps_per_epoch, every = trial.experiment.steps_per_epoch, run.stage.judge_every or epochs
        judged_step = (self.ablation.row_of(run) or {}).get("epochs", 0.0) * steps_per_epoch
        *ends, last = (epoch * steps_per_epoch for epoch in [*range(every, epochs, every), epochs])
        # A run that failed has no judged step, but its checkpoint may have passed some of the ends.
        due = [end for end in ends if end > judged_step and end >= trial.state.step]
        for index, end in enumerate([*due, last]):
            trial.train(self.must_stop, end=end)
            if index == 0:
                self._startup_s.append(time.monotonic() - began - trial.seconds_after_first_step)
            if signals.received():
                return False
            self._judge(run, trial)
            if trial.state.step < end or (not trial.complete and self.must_stop()):
                return False
        (folder / "last.pt").unlink()
        return True

    def _judge(self, run: Run, trial: "Trial") -> None:
        """Judges a run and records the result."""
        from ablations.trial import write_encoder_parts

        result = trial.judged()
        self._judging_s.append(result["evaluation_s"])
        if run.stage.keep:
            write_encoder_parts(trial.state.ema.ema_model.encoder, self.out / run.name, trial.config.to_yaml())
        self.ablation.record(run, {**result, "data": self.data_name or run.config.data.name})
        write_text(self.out / "table.md", markdown_tables(self.ablation))

    def _epochs_of(self, run: Run, folder: Path) -> int | None:
        """Returns the number of epochs of a run; None if the time is up, or a signal arrives, before it is known.

        If the stage gives minutes, a few training steps are timed to find the number. It is stored in the run's folder,
        so that a resumed run has the same length. Raises ConfigError if the run that `images_of` names is not complete.
        """
        from ablations.trial import Trial

        stage = run.stage
        if stage.epochs:
            return stage.epochs
        if stage.images_of:
            epochs = self.ablation.epochs_of_reference_run(stage)
            if epochs is None:
                raise ConfigError(
                    f"its length is that of {stage.images_of}, which is not complete: fix the failure of that run"
                )
            return epochs
        assert stage.minutes
        kept = folder / "length.json"
        length = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else None
        if length is None or not run.is_result(length):
            training = run.config.training
            # An epoch may have few steps.
            longer = training.model_copy(update={"epochs": max(training.epochs, CALIBRATION_STEPS)})
            trial = Trial(run.config.model_copy(update={"training": longer}), None, control=stage.control)
            trial.train(lambda: trial.state.step >= CALIBRATION_STEPS or self.must_stop())
            if trial.images_per_s is None:
                return None
            images_per_epoch = trial.experiment.steps_per_epoch * trial.config.training.batch_size
            epochs = max(1, int(60 * stage.minutes * trial.images_per_s / images_per_epoch))
            length = {**run.identity, "config": run.config.to_yaml(), "epochs": epochs}
            write_text(kept, json.dumps(length))
        return int(length["epochs"])
