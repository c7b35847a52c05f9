"""Trains and judges the variants of a plan one after another, within a time limit, and tabulates the results.

Run the same command again to resume: complete runs are not repeated, and an incomplete run continues from its
checkpoint. Each result is appended to `<out>/results.jsonl` as soon as it is known, as one JSON line. Then
`<out>/table.md` is rewritten. To resume on another machine, copy `results.jsonl` there.

To train several variants side by side, start the same command several times: each driver takes the next run that no
other one has. A driver waits for the others only if a later stage needs their results. Give each driver its share of
the cores with OMP_NUM_THREADS, or a GPU with CUDA_VISIBLE_DEVICES.

A run that fails does not stop the driver. Drivers that were running when it failed do not repeat it. A driver that is
started later does.

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
from pathlib import Path

from ablations.plan import Plan, Stage, read_plan
from ablations.result_rows import RESULTS
from ablations.runner import Runner
from ablations.runs import Ablation, Run
from ablations.tables import markdown_tables
from config.errors import ConfigError
from utils import cli, signals
from utils.distributed.processes import world_size
from utils.files import InUseError, lock_file, write_text

POLL_S = 1.0  # seconds between looks at the runs of other drivers

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
        self.ablation, self.out = Ablation(plan, out / RESULTS), out
        self.failed: list[str] = []
        self._runner = Runner(self.ablation, out, deadline, data_name)
        self._at_start = Ablation(plan, out / RESULTS)
        self._held: dict[str, tuple[Run, str]] = {}  # {name of a run: (run, process that holds its lock)}

    def run_stages(self) -> bool:
        """Trains and judges all runs that are neither complete nor held by other drivers.

        Returns False if the deadline or a signal stopped the driver before its last run was complete. The driver reacts
        to a signal the next time that it checks the clock. Further signals change nothing, except that a second Ctrl-C
        ends the program immediately.
        """
        with signals.deferred():
            for stage in self.ablation.plan.stages:
                if not (self._run_command(stage) if stage.command else self._run_variants(stage)):
                    return False
            return self._take_over()

    def held_by_others(self) -> dict[str, str]:
        """Returns {name of a run that other drivers work on: process that holds it}."""
        self.ablation.read_results()
        return {name: holder for name, (run, holder) in self._held.items() if not self.ablation.is_complete(run)}

    def _run_variants(self, stage: Stage) -> bool:
        """Trains and judges the runs of a stage. Returns False if the deadline or a signal stopped it early."""
        if not self._work_on(self.ablation.runs_needed_by(stage), wait=True):
            return False
        try:
            runs = self.ablation.first_runs_of(stage)
            if not runs:
                raise ConfigError("its base stage has no complete run: fix the failures there")
        except ConfigError as error:
            self._log_failure(stage.name, error)
            return True
        if stage.again:  # needs the results of all first runs
            return self._work_on(runs, wait=True) and self._work_on(self.ablation.runs_of(stage), wait=False)
        return self._work_on(runs, wait=False)

    def _take_over(self) -> bool:
        """Trains the runs that other drivers have left incomplete. Returns False if it was stopped early."""
        num_held = -1
        while num_held != len(self._held):
            num_held = len(self._held)
            if not self._work_on([run for run, _ in self._held.values()], wait=False):
                return False
        return True

    def _work_on(self, runs: list[Run], wait: bool) -> bool:
        """Trains and judges the runs that are not complete. Returns False if the deadline or a signal stopped it early.

        Args:
            wait: True: waits for runs that other drivers hold, and takes over those that they leave incomplete; False:
                skips these runs.
        """
        waiting_for: list[Run] = []
        while runs:
            held = []
            for run in runs:
                folder = self.out / "runs" / run.name
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    lock = lock_file(folder / ".lock")
                except InUseError as holder:
                    held.append(run)
                    self._held[run.name] = run, str(holder)
                    continue
                with lock:
                    self._held.pop(run.name, None)
                    if not self._finish(run, folder):
                        return False
            if not (held and wait):
                return True
            if held != waiting_for:
                logger.info("waiting for %s", ", ".join(f"{run.name} ({self._held[run.name][1]})" for run in held))
            time.sleep(POLL_S)
            if self._runner.must_stop():
                return False
            runs = waiting_for = held
        return True

    def _finish(self, run: Run, folder: Path) -> bool:
        """Trains and judges a run whose folder this driver holds. Returns False if the deadline or a signal stopped it.

        If the run fails, this is logged and recorded.
        """
        from datasets.images import DatasetError
        from utils.device import OutOfMemoryError
        from utils.run_folder.checkpoint import CheckpointError

        self.ablation.read_results()  # another driver may have worked on the run
        row = self.ablation.row_of(run)
        if row and row["complete"]:
            return True
        if row and "failed" in row and self.ablation.num_failures(run) > self._at_start.num_failures(run):
            if run.name not in self.failed:
                self._log_failure(run.name, ConfigError(f"{row['failed']} (in another driver)"))
            return True
        try:
            if self._runner.has_time_to_start() and self._runner.train_and_judge(run, folder):
                return True
            logger.info(
                "%s is incomplete: %s", run.name, "stopped by a signal" if signals.received() else "no time left"
            )
            return False
        except (RuntimeError, ConfigError, DatasetError, CheckpointError, OutOfMemoryError) as error:
            self._log_failure(run.name, error)  # other variants may work, for example with less memory
            reason = str(error).partition("\n")[0] or type(error).__name__
            self.ablation.record(run, {"complete": False, "failed": reason})
            return True

    def _log_failure(self, name: str, error: Exception) -> None:
        self.failed.append(name)
        logger.info("%s failed: %s", name, str(error).partition("\n")[0])

    def _run_command(self, stage: Stage) -> bool:
        """Runs the command of a stage once. Returns False if the deadline or a signal came before its end.

        The command is not repeated, even if it failed or was stopped at the time limit of its stage. Its output is
        appended to commands.txt while it runs.
        """
        folder = self.out / "runs" / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        waiting_for = ""
        while True:
            try:
                lock = lock_file(folder / ".lock")
            except InUseError as holder:  # waits, because later stages may use what the command makes
                if waiting_for != str(holder):
                    logger.info("waiting for %s (%s)", stage.name, holder)
                waiting_for = str(holder)
                time.sleep(POLL_S)
                if self._runner.must_stop():
                    return False
                continue
            with lock:
                ended = folder / "ended.txt"  # the command, if it has ended
                if ended.exists() and ended.read_text(encoding="utf-8") == stage.command:
                    return True
                if self._runner.must_stop() or not self._run_locked(stage):
                    return False
                write_text(ended, str(stage.command))
                return True

    def _run_locked(self, stage: Stage) -> bool:
        """Runs the command of a stage. Returns False if the deadline or a signal stopped it."""
        assert stage.command is not None
        own_limit, left = 60 * (stage.minutes or float("inf")), self._runner.deadline - time.monotonic()
        limit = min(own_limit, left)
        logger.info("%s: %s", stage.name, stage.command)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # otherwise buffered output is lost at a time-out
        with open(self.out / "commands.txt", "a", encoding="utf-8") as file:
            print(f"== {stage.name}: {stage.command}", file=file, flush=True)
            try:
                process = subprocess.run(
                    [sys.executable, *shlex.split(stage.command)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=None if limit == float("inf") else limit,
                    check=False,
                    env=environment,
                )
                stopped = process.returncode != 0 and signals.received()
                end = f"status {process.returncode}"
            except subprocess.TimeoutExpired:
                stopped = left < own_limit
                end = f"stopped after {limit:.0f} s"
            if stopped:
                end = "interrupted"
            print(f"== {stage.name}: {end}", file=file, flush=True)
        logger.info("%s: %s", stage.name, end)
        return not stopped


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status.

    The status is 1 if a run failed or could not be started, and otherwise 75 if a signal or the time limit has stopped
    the command early. The exit status of a stage's command has no effect on it.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML file of the plan, such as ablations/plans/cifar10.yaml")
    parser.add_argument(
        "--out",
        type=cli.path_option,
        required=True,
        help="folder of the results and of the checkpoints needed to resume",
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
        if not args.minutes > 0:  # also if it is not a number
            raise ConfigError(f"--minutes {args.minutes} leaves no time: give more than 0")
        plan = read_plan(args.plan, args.overrides)
        if args.table:
            tables = markdown_tables(Ablation(plan, args.out / RESULTS))
            if not tables:
                raise ConfigError(f"{args.out / RESULTS} has no results of this plan: check --out and the overrides")
            print(tables, end="")
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        driver = Driver(plan, args.out, deadline, args.data)
        finished = driver.run_stages()
    held = [f"{name} ({holder})" for name, holder in driver.held_by_others().items()]
    print(markdown_tables(driver.ablation))
    if driver.failed:
        print(f"failed: {', '.join(driver.failed)}")
    if not finished:
        print("not all stages are done: run the same command again to resume")
    elif held:
        print(f"all stages are done, except runs of other drivers: {', '.join(held)}")
    else:
        print("all stages are done")
    if driver.failed:
        return 1
    return 0 if finished else signals.STATUS


if __name__ == "__main__":
    cli.run(main)
