"""Train the variants of a plan one after another, within a given time, and tabulate what came of them.

The same command goes on where it stopped: runs that are done are not repeated, a run that was under way resumes from
its checkpoint. Each result is a JSON line in `<out>/results.jsonl`, written the moment that it is there, and
`<out>/table.md` is made anew after each.

  python -m benchmarks.ablate benchmarks/plans/fashion_mnist.yaml --out runs/fashion
  python -m benchmarks.ablate benchmarks/plans/cifar10.yaml --out runs/ablation --minutes 30 data.root=data
  python -m benchmarks.ablate benchmarks/plans/cifar10.yaml --out runs/ablation --table        # the table alone
"""

import argparse
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.plan import Plan, Results, Run, Stage, config_of, read_plan, runs_of
from benchmarks.tables import tables
from utils.cli import user_errors
from utils.config import ConfigError

CALIBRATION_STEPS = 60
FIRST_JUDGING_S = 30.0  # a guess, until one has been timed

logger = logging.getLogger(__name__)


class Driver:
    """Makes the runs of `plan` until `end`, in seconds of the monotonic clock; `more` overrides all of them."""

    def __init__(self, plan: Plan, out: Path, end: float, more: list[str]) -> None:
        self.plan, self.out, self.end, self.more = plan, out, end, more
        self.results = Results(out / "results.jsonl")

    def out_of_time(self) -> bool:
        """Whether what is left is for judging: as long as the longest took so far, and half as much again."""
        judging_s = [row["evaluation_s"] for row in self.results.rows.values() if "failed" not in row]
        return time.monotonic() > self.end - 1.5 * max(judging_s, default=FIRST_JUDGING_S)

    def go(self) -> bool:
        """Whether nothing is left that more time would do."""
        for stage in self.plan.stages:
            if stage.command:
                self.command(stage)
            for run in runs_of(stage, self.plan, self.results):
                if self.results.finished(run):
                    continue
                if self.out_of_time():
                    logger.info("no time is left for %s", run.name)
                    return False
                try:
                    if not self.make(run):
                        return False
                except RuntimeError as error:  # out of memory, say: the others may do better
                    reason = str(error).splitlines()[0]
                    logger.info("%s failed: %s", run.name, reason)
                    self.results.add(run, {"complete": False, "failed": reason})
        return True

    def command(self, stage: Stage) -> None:
        """Once; what it prints is kept in `<name>.txt`."""
        assert stage.command is not None
        kept = self.out / f"{stage.name}.txt"
        left = min(60 * (stage.minutes or float("inf")), self.end - time.monotonic())
        if kept.exists() or left <= 0:
            return
        logger.info("%s: %s", stage.name, stage.command)
        partial = kept.with_suffix(".partial")
        with open(partial, "wb") as file:
            try:
                command = [sys.executable, *shlex.split(stage.command)]
                limit = None if left == float("inf") else left
                environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # else what it printed is lost when time is up
                done = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=False, env=environment
                )
                ended = f"status {done.returncode}"
            except subprocess.TimeoutExpired:
                ended = "no time left"
        if ended == "status 0":
            partial.replace(kept)
        else:
            logger.info("%s ended with %s: see %s", stage.name, ended, partial)

    def make(self, run: Run) -> bool:
        """Train and judge one run, and write down what came of it; whether it came to its end."""
        from benchmarks.trial import Trial, write_parts

        checkpoint = self.out / "runs" / run.name / "last.pt"
        trial = Trial(config_of(run, self.plan, self.more, self.epochs(run, checkpoint)), checkpoint)
        logger.info("%s, %d epochs: %s", run.name, trial.config.training.epochs, " ".join(run.overrides) or "as it is")
        trial.train(self.out_of_time)
        self.results.add(run, trial.judged())
        (self.out / "table.md").write_text(tables(self.plan, self.results))
        if run.stage.keep:
            write_parts(trial.state.ema.ema_model.encoder, self.out / f"{run.name}.pt")
        if trial.complete:
            checkpoint.unlink(missing_ok=True)
        return trial.complete

    def epochs(self, run: Run, checkpoint: Path) -> int:
        """How many fit the stage's budget: counted, or as many as its minutes allow at the speed of a few steps."""
        from benchmarks.trial import Trial

        stage = run.stage
        if stage.epochs:
            return stage.epochs
        if stage.images_of:
            rows = self.results.of(*stage.images_of.split("/"))
            if not rows:
                raise ConfigError(f"{run.name} trains as long as {stage.images_of}, which did not come to its end")
            return max(1, round(rows[0]["epochs"]))
        assert stage.minutes
        kept = checkpoint.with_name("epochs")
        if not kept.exists():
            trial = Trial(config_of(run, self.plan, self.more, epochs=1000), None)
            trial.train(lambda: trial.state.step >= CALIBRATION_STEPS or self.out_of_time())
            an_epoch = trial.experiment.loader.steps_per_epoch * trial.config.training.batch_size
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(str(max(1, int(60 * stage.minutes * (trial.images_per_s or 0) / an_epoch))))
        return int(kept.read_text())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML file, as in benchmarks/plans")
    parser.add_argument("--out", type=Path, required=True, help="folder of results and of what resuming needs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="in all; default: as long as it takes")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run's config")
    args = parser.parse_intermixed_args(argv)
    end = time.monotonic() + 60 * args.minutes
    with user_errors(ConfigError):
        plan = read_plan(args.plan, args.overrides)
        args.out.mkdir(parents=True, exist_ok=True)
        if args.table:
            print(tables(plan, Results(args.out / "results.jsonl")))
            return 0
    from datasets import DatasetError

    with user_errors(ConfigError, DatasetError):
        done = Driver(plan, args.out, end, args.overrides).go()
    print(tables(plan, Results(args.out / "results.jsonl")))
    print("all is done" if done else "the time is over: the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
