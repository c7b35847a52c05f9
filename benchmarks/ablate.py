"""Train the variants of a plan one after another, within a given time, and tabulate what came of them.

The same command goes on where it stopped: runs that are done are not repeated, a run that was under way resumes from
its checkpoint. Each result is a JSON line in `<out>/results.jsonl`, written the moment that it is there, and
`<out>/table.md` is made anew after each. To go on elsewhere, take `results.jsonl` along.

  python -m benchmarks.ablate benchmarks/plans/fashion_mnist.yaml --out runs/fashion
  python -m benchmarks.ablate benchmarks/plans/cifar10.yaml --out runs/ablation --minutes 30 data.root=data
  python -m benchmarks.ablate benchmarks/plans/cifar10.yaml --out runs/ablation --table        # the table alone
"""

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.plan import Ablation, Plan, Run, Stage, read_plan
from benchmarks.tables import tables
from utils.cli import user_errors
from utils.config import ConfigError
from utils.files import InUseError, lock_file, write_text

CALIBRATION_STEPS = 60
FIRST_JUDGING_S, FIRST_START_S = 120.0, 30.0  # guesses, until each has been timed

logger = logging.getLogger(__name__)


class Driver:
    """Makes the runs of `plan` until `end`, in seconds of the monotonic clock, or until a signal says so."""

    def __init__(self, plan: Plan, out: Path, end: float, data: str | None) -> None:
        self.ablation, self.out, self.end, self.data = Ablation(plan, out / "results.jsonl"), out, end, data
        self.judging_s: list[float] = []
        self.start_s: list[float] = []
        self.interrupted = False
        self.failed: list[str] = []

    def left(self) -> float:
        """Seconds left to train: what judging took at most, and half as much again, is kept free."""
        return self.end - 1.5 * max(self.judging_s, default=FIRST_JUDGING_S) - time.monotonic()

    def stop(self) -> bool:
        return self.interrupted or self.left() < 0

    def go(self) -> bool:
        """Whether nothing is left that more time would do."""
        before = {number: signal.signal(number, self.interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._go()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _go(self) -> bool:
        for stage in self.ablation.plan.stages:
            if stage.command:
                self.command(stage)
            try:
                runs = self.ablation.runs(stage)
            except ConfigError as error:
                self.fail(stage.name, error)
                continue
            if stage.variants and not runs:
                self.fail(stage.name, ConfigError("nothing has come of the stage that it builds on"))
            for run in runs:
                done = self.ablation.row(run)
                if done and done["complete"]:
                    continue
                if self.stop() or self.left() < max(self.start_s, default=FIRST_START_S):
                    logger.info("no time is left for %s", run.name)
                    return False
                try:
                    if not self.make(run):
                        return False
                except (RuntimeError, ConfigError) as error:  # out of memory, say: the others may do better
                    self.fail(run.name, error)
                    reason = str(error).partition("\n")[0] or type(error).__name__
                    self.ablation.add(run, {"complete": False, "failed": reason})
        return True

    def interrupt(self, number: int, _: object) -> None:
        """Stop at the next look; the second signal does what it always does."""
        self.interrupted = True
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    def fail(self, name: str, error: Exception) -> None:
        self.failed.append(name)
        logger.info("%s failed: %s", name, str(error).partition("\n")[0])

    def command(self, stage: Stage) -> None:
        """Once, however it ends; what it prints is kept as it comes."""
        assert stage.command is not None
        kept, head = self.out / "commands.txt", f"== {stage.name}: {stage.command}\n"
        limit = min(60 * (stage.minutes or float("inf")), self.end - time.monotonic())
        if self.stop() or limit <= 0 or (kept.exists() and head in kept.read_text(errors="replace")):
            return
        logger.info("%s: %s", stage.name, stage.command)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # else what it printed is lost when time is up
        with open(kept, "a") as file:
            print(head, end="", file=file, flush=True)
            try:
                done = subprocess.run(
                    [sys.executable, *shlex.split(stage.command)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=None if limit == float("inf") else limit,
                    check=False,
                    env=environment,
                )
                ended = f"status {done.returncode}"
            except subprocess.TimeoutExpired:
                ended = f"stopped after {limit:.0f} s"
            print(f"== {stage.name}: {ended}", file=file, flush=True)
        logger.info("%s: %s", stage.name, ended)

    def make(self, run: Run) -> bool:
        """Train and judge one run, and write down what came of it; whether it came to its end."""
        from benchmarks.trial import Trial, write_parts

        began = time.monotonic()
        folder = self.out / "runs" / run.name
        epochs = self.epochs(run, folder)
        if epochs is None:
            logger.info("no time is left for %s", run.name)
            return False
        training = run.config.training.model_copy(update={"epochs": epochs})
        trial = Trial(run.config.model_copy(update={"training": training}), folder / "last.pt")
        logger.info("%s, %d epochs: %s", run.name, epochs, " ".join(run.overrides) or "as it is")
        trial.train(self.stop)
        self.start_s.append(time.monotonic() - began - trial.looked_s)
        if self.interrupted:
            return False
        row = trial.judged()
        self.judging_s.append(row["evaluation_s"])
        if run.stage.keep:
            write_parts(trial.state.ema.module.encoder, self.out / run.name, trial.config.to_yaml())
        self.ablation.add(run, {**row, "data": self.data or run.config.data.name})
        write_text(self.out / "table.md", tables(self.ablation))
        if trial.complete:
            (folder / "last.pt").unlink()
        return trial.complete

    def epochs(self, run: Run, folder: Path) -> int | None:
        """How many fit the stage's budget: counted, or as many as its minutes allow at the speed of a few steps.

        None where the time is over before that is known.
        """
        from benchmarks.trial import Trial

        stage = run.stage
        if stage.epochs:
            return stage.epochs
        if stage.images_of:
            name, variant = stage.images_of.split("/")
            rows = self.ablation.rows(self.ablation.stage(name)).get(variant)
            if not rows:
                raise ConfigError(f"it trains as long as {stage.images_of}, which did not come to its end")
            return max(1, round(rows[0]["epochs"]))
        assert stage.minutes
        kept = folder / f"epochs-{run.digest}"
        if not kept.exists():
            trial = Trial(run.config, None)
            trial.train(lambda: trial.state.step >= CALIBRATION_STEPS or self.stop())
            if trial.images_per_s is None:
                return None
            an_epoch = trial.experiment.loader.steps_per_epoch * trial.config.training.batch_size
            folder.mkdir(parents=True, exist_ok=True)
            write_text(kept, str(max(1, int(60 * stage.minutes * trial.images_per_s / an_epoch))))
        return int(kept.read_text())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML file, as in benchmarks/plans")
    parser.add_argument("--out", type=Path, required=True, help="folder of results and of what resuming needs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="in all; default: as long as it takes")
    parser.add_argument("--data", help="what the tables call the images; default: data.name")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run's config")
    args = parser.parse_intermixed_args(argv)
    end = time.monotonic() + 60 * args.minutes
    with user_errors(ConfigError):
        plan = read_plan(args.plan, args.overrides)
        if args.table:
            print(tables(Ablation(plan, args.out / "results.jsonl")), end="")
            return 0
    from datasets import DatasetError

    with ExitStack() as held, user_errors(ConfigError, DatasetError):
        args.out.mkdir(parents=True, exist_ok=True)
        try:
            held.enter_context(lock_file(args.out / ".lock"))
        except InUseError as holder:
            raise ConfigError(f"{args.out} is in use by {holder}: wait for it to end, or choose another") from None
        driver = Driver(plan, args.out, end, args.data)
        done = driver.go()
    print(tables(driver.ablation))
    if driver.failed:
        print(f"failed: {', '.join(driver.failed)}")
    print("all is done" if done else "not all is done: the same command goes on")
    return 1 if driver.failed else 0


if __name__ == "__main__":
    sys.exit(main())
