"""Trains and judges the variants of a plan one after another, within a time limit, and tabulates the results.

Run the same command again to resume: complete runs are not repeated, and an incomplete run continues from its
checkpoint. Each result is appended to `<out>/results.jsonl` as soon as it is known, as one JSON line. Then
`<out>/table.md` is rewritten. To resume on another machine, copy `results.jsonl` there.

To train several variants side by side, start the same command several times: each driver takes the next run that no
other one has. Give each driver its share of the cores with OMP_NUM_THREADS, or a GPU with CUDA_VISIBLE_DEVICES.

  python -m ablations.ablate ablations/plans/fashion_mnist.yaml --out runs/fashion
  python -m ablations.ablate ablations/plans/cifar10.yaml --out runs/ablation --minutes 30 data.root=data
  python -m ablations.ablate ablations/plans/cifar10.yaml --out runs/ablation --table        # only prints the table
"""

import argparse
import logging
import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ablations.plan import CONTROL_NEEDS, Ablation, Plan, Run, Stage, read_plan
from ablations.result_rows import RESULTS
from ablations.tables import markdown_tables
from config.errors import ConfigError
from utils import cli, signals
from utils.distributed.processes import world_size
from utils.files import InUseError, lock_file, write_text

if TYPE_CHECKING:
    from ablations.trial import Trial

CALIBRATION_STEPS = 60
POLL_S = 5.0  # seconds between looks at the runs of other drivers
FIRST_JUDGING_S, FIRST_STARTUP_S = 120.0, 30.0  # estimates that are used until each has been measured

logger = logging.getLogger(__name__)


class Driver:
    """Driver that trains and judges the runs of a plan until the deadline, or until a signal arrives.

    Several drivers may share a folder. A driver holds the lock of a run's folder while it works on the run.

    Args:
        plan: stages to run, in order.
        out: folder of the results.
        deadline: time of `time.monotonic()`, in seconds, at which the driver must have finished.
        data_name: name of the data set in the tables; None: the config's `data.name`.

    Attributes:
        failed: names of the runs that failed, and of the stages whose runs could not be started. Commands that fail are
            only logged.
    """

    def __init__(self, plan: Plan, out: Path, deadline: float, data_name: str | None) -> None:
        self.ablation, self.out, self.deadline, self.data_name = Ablation(plan, out / RESULTS), out, deadline, data_name
        self.failed: list[str] = []
        self._judging_s: list[float] = []
        self._startup_s: list[float] = []

    def run_stages(self) -> bool:
        """Trains and judges all runs that are not complete yet.

        Returns False if the deadline or a signal stopped the driver before the last run was complete. The driver reacts
        to a signal the next time that it checks the clock. Further signals change nothing, except that a second Ctrl-C
        ends the program immediately.
        """
        with signals.deferred():
            for stage in self.ablation.plan.stages:
                if stage.command:
                    self._run_command(stage)
                elif not self._run_variants(stage):
                    return False
            return True

    def _run_variants(self, stage: Stage) -> bool:
        """Trains and judges the runs of a stage. Returns False if the deadline or a signal stopped it early.

        At the end, waits for the runs of the stage that other drivers hold, and takes over those that they leave
        incomplete.
        """
        try:
            runs = self.ablation.runs_of(stage)
        except ConfigError as error:
            self._log_failure(stage.name, error)
            return True
        if not runs:
            self._log_failure(stage.name, ConfigError("its base stage has no complete run: fix the failures there"))
        while runs:
            held_by_others = []
            for run in runs:
                folder = self.out / "runs" / run.name
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    lock = lock_file(folder / ".lock")
                except InUseError:
                    held_by_others.append(run)
                    continue
                with lock:
                    if not self._finish(run, folder):
                        return False
            runs = held_by_others
            if runs:
                time.sleep(POLL_S)
                if self._must_stop():
                    return False
        return True

    def _finish(self, run: Run, folder: Path) -> bool:
        """Trains and judges a run whose folder this driver holds. Returns False if the deadline or a signal stopped it.

        If the run fails, this is logged and recorded.
        """
        from utils.device import OutOfMemoryError
        from utils.run_folder.checkpoint import CheckpointError

        self.ablation.read_results()  # another driver may have completed the run
        row = self.ablation.row_of(run)
        if row and row["complete"]:
            return True
        try:
            if self._has_time_to_start() and self._train_and_judge(run, folder):
                return True
            logger.info(
                "%s is incomplete: %s", run.name, "stopped by a signal" if signals.received() else "no time left"
            )
            return False
        except (RuntimeError, ConfigError, CheckpointError, OutOfMemoryError) as error:
            self._log_failure(run.name, error)  # other variants may work, for example with less memory
            reason = str(error).partition("\n")[0] or type(error).__name__
            self.ablation.record(run, {"complete": False, "failed": reason})
            return True

    def _seconds_left(self) -> float:
        """Returns the seconds left for training: 1.5 times the longest evaluation so far is reserved for judging."""
        return self.deadline - 1.5 * max(self._judging_s, default=FIRST_JUDGING_S) - time.monotonic()

    def _must_stop(self) -> bool:
        return bool(signals.received()) or self._seconds_left() < 0

    def _has_time_to_start(self) -> bool:
        return not self._must_stop() and self._seconds_left() >= max(self._startup_s, default=FIRST_STARTUP_S)

    def _log_failure(self, name: str, error: Exception) -> None:
        self.failed.append(name)
        logger.info("%s failed: %s", name, str(error).partition("\n")[0])

    def _run_command(self, stage: Stage) -> None:
        """Runs the command of a stage once. It is not repeated, even if it failed or was stopped at its time limit.

        The output of the command is appended to commands.txt while it runs.
        """
        kept, head = self.out / "commands.txt", f"== {stage.name}: {stage.command}\n"
        folder = self.out / "runs" / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        while True:  # wait while another driver runs the command
            limit = min(60 * (stage.minutes or float("inf")), self.deadline - time.monotonic())
            if self._must_stop() or limit <= 0:
                return
            with suppress(InUseError), lock_file(folder / ".lock"):
                if not (kept.exists() and head in kept.read_text(errors="replace")):
                    self._run_locked(stage, kept, head, limit)
                return
            time.sleep(POLL_S)

    def _run_locked(self, stage: Stage, kept: Path, head: str, limit: float) -> None:
        """Runs the command of a stage for at most `limit` seconds. Appends `head` and its output to the file `kept`."""
        assert stage.command is not None
        logger.info("%s: %s", stage.name, stage.command)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # otherwise buffered output is lost at a time-out
        with open(kept, "a") as file:
            print(head, end="", file=file, flush=True)
            try:
                process = subprocess.run(
                    [sys.executable, *shlex.split(stage.command)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=None if limit == float("inf") else limit,
                    check=False,
                    env=environment,
                )
                end = f"status {process.returncode}"
            except subprocess.TimeoutExpired:
                end = f"stopped after {limit:.0f} s"
            print(f"== {stage.name}: {end}", file=file, flush=True)
        logger.info("%s: %s", stage.name, end)

    def _train_and_judge(self, run: Run, folder: Path) -> bool:
        """Trains a run as far as the time allows, judges it and records the result. Returns True if it is complete.

        If a signal arrives, the run is only saved, and False is returned.
        """
        from ablations.trial import Trial

        began = time.monotonic()
        epochs = self._epochs_of(run, folder)
        if epochs is None:
            return False
        training = run.config.training.model_copy(update={"epochs": epochs})
        trial = Trial(
            run.config.model_copy(update={"training": training}), folder / "last.pt", run.judging, run.stage.control
        )
        logger.info("%s, %d epochs: %s", run.name, epochs, " ".join(run.overrides) or "no overrides")
        steps_per_epoch, every = trial.experiment.loader.steps_per_epoch, run.stage.judge_every or epochs
        judged_step = (self.ablation.row_of(run) or {}).get("epochs", 0.0) * steps_per_epoch
        *ends, last = (epoch * steps_per_epoch for epoch in [*range(every, epochs, every), epochs])
        # A run that failed has no judged step, but its checkpoint may have passed some of the ends.
        due = [end for end in ends if end > judged_step and end >= trial.state.step]
        for index, end in enumerate([*due, last]):
            trial.train(self._must_stop, end=end)
            if index == 0:
                self._startup_s.append(time.monotonic() - began - trial.seconds_after_first_step)
            if signals.received():
                return False
            self._judge(run, trial)
            if trial.state.step < end or (not trial.complete and self._must_stop()):
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
            name, variant = stage.images_of.split("/")
            rows = self.ablation.complete_rows(self.ablation.stage(name)).get(variant)
            if not rows:
                raise ConfigError(
                    f"its length is that of {stage.images_of}, which is not complete: fix the failure of that run"
                )
            return max(1, round(rows[0]["epochs"]))
        assert stage.minutes
        kept = folder / f"epochs-{run.digest}"
        if not kept.exists():
            trial = Trial(run.config, None, control=stage.control)
            trial.train(lambda: trial.state.step >= CALIBRATION_STEPS or self._must_stop())
            if trial.images_per_s is None:
                return None
            images_per_epoch = trial.experiment.loader.steps_per_epoch * trial.config.training.batch_size
            write_text(kept, str(max(1, int(60 * stage.minutes * trial.images_per_s / images_per_epoch))))
        return int(kept.read_text())


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status.

    The status is 1 if a run failed or could not be started. The exit status of a stage's command has no effect on it.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML file of the plan, such as ablations/plans/cifar10.yaml")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the results and of the checkpoints needed to resume"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="time limit for the whole command, in minutes; default: no limit",
    )
    parser.add_argument("--data", help="name of the data set in the tables; default: the config's data.name")
    parser.add_argument("--table", action="store_true", help="only print the table of the results so far")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides that apply to every run")
    args = parser.parse_intermixed_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    with cli.gather_user_errors():
        if world_size() > 1:
            raise ConfigError("an ablation runs in one process: start it without torchrun, once for each GPU")
        plan = read_plan(args.plan, args.overrides)
        cli.require(*(CONTROL_NEEDS[stage.control] for stage in plan.stages if stage.control in CONTROL_NEEDS))
        if args.table:
            print(markdown_tables(Ablation(plan, args.out / RESULTS)), end="")
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        driver = Driver(plan, args.out, deadline, args.data)
        finished = driver.run_stages()
    print(markdown_tables(driver.ablation))
    if driver.failed:
        print(f"failed: {', '.join(driver.failed)}")
    print("all stages are done" if finished else "not all stages are done: run the same command again to resume")
    return 1 if driver.failed else 0


if __name__ == "__main__":
    cli.run(main)
