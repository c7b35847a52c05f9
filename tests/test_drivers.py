"""Tests of the driver of ablations: runs that stop and resume, fail, and are divided among several drivers."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ablations import ablate, runner, trial
from ablations.plan import read_plan
from ablations.runs import Ablation, accuracies
from ablations.trial import Trial
from config.keys import differences
from config.reading import parse_config
from tests.conftest import ROOT, TINY_RUN, experiment_of
from tests.test_ablate import row_of
from training.saving import checkpoint_contents
from training.state import initial_state
from utils import signals
from utils.device import OutOfMemoryError
from utils.files import lock_file
from utils.run_folder.checkpoint_writer import save_checkpoint

NO_IMAGES = ["data.name=folder", "data.root=nowhere"]
TIMES = {"seconds", "images_per_s", "evaluation_s"}


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a result without its times. All other entries are the same whenever and wherever it is made."""
    return {name: value for name, value in row.items() if name not in TIMES}


class Clock:
    """Clock that advances by one second each time that it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Advances the clock and returns the time, like `time.monotonic`."""
        self.now += 1.0
        return self.now


class Bench:
    """A plan, run on a `Clock`: a command, two short runs, a run whose length is given in minutes, and its control."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.patch, self.capsys = folder, monkeypatch, capsys
        self.plan: dict[str, Any] = {
            "config": str(ROOT / "config" / "digits.yaml"),
            "overrides": [*(o for o in TINY_RUN if not o.startswith("training.epochs")), "training.batch_size=128"],
            "judging": "config",
            "stages": [
                {"name": "hello", "command": "-c 'print(6 * 7)'"},
                {"name": "screen", "epochs": 1, "variants": {"a": [], "b": ["diffusion.schedule=linear"]}},
                {"name": "long", "minutes": 0.1, "base": "screen", "keep": True, "variants": {"best": []}},
                {"name": "control", "images_of": "long/best", "variants": {"a": []}},
            ],
        }

    def make(self, out: str, minutes: float | None = None, *more: str, status: int | None = 0) -> str:
        """Runs the driver on the plan, checks its exit status, and returns what it printed.

        With `status` None, the exit status must be 75 if the driver prints that something is left to do, and else 0.
        """
        path, clock = self.folder / "plan.yaml", Clock()
        path.write_text(json.dumps(self.plan))  # JSON is YAML
        with self.patch.context() as patch:
            patch.setattr(ablate.time, "monotonic", clock.monotonic)  # `trial` uses the same module object
            limit = [] if minutes is None else ["--minutes", str(minutes)]
            found = ablate.main([str(path), "--out", str(self.folder / out), *limit, *more])
        said = self.capsys.readouterr().out
        expected = 75 if "not all stages are done" in said else 0
        assert found == (expected if status is None else status)
        return said

    def rows(self, out: str) -> dict[str, dict[str, Any]]:
        """Returns the last result of each run, by the name of the run."""
        lines = (self.folder / out / "results.jsonl").read_text().splitlines()
        return {row["run"]: row for row in map(json.loads, lines)}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """A `Bench` in a temporary folder."""
    return Bench(tmp_path, monkeypatch, capsys)


@pytest.mark.long
def test_a_plan_stops_and_resumes(bench: Bench, tmp_path: Path) -> None:
    """A plan whose time runs out again and again, even within a run, gives the same results, whatever data.root is."""
    bench.patch.setattr(runner, "FIRST_JUDGING_S", 4.0)
    bench.patch.setattr(runner, "FIRST_STARTUP_S", 2.0)
    bench.patch.setattr(trial, "SAVE_EVERY_S", 3)
    bench.plan["stages"] = bench.plan["stages"][:2]
    starts = 0
    while "not all stages are done" in bench.make("broken", 13 / 60, f"data.root=place_{starts}", status=None):
        starts += 1
        assert starts < 20
    history = [json.loads(line) for line in (tmp_path / "broken" / "results.jsonl").read_text().splitlines()]
    stopped = [row for row in history if not row["complete"]]
    assert starts >= 2 and stopped and all(row["images"] % 128 == 0 < row["images"] for row in stopped)
    commands = (tmp_path / "broken" / "commands.txt").read_text().splitlines()
    assert commands == ["== hello: -c 'print(6 * 7)'", "42", "== hello: status 0"]

    bench.plan["stages"] = bench.plan["stages"][1:]
    bench.make("whole")
    rows = bench.rows("broken")
    assert list(rows) == list(bench.rows("whole")) == ["screen-a-0", "screen-b-0"]
    for name, whole in bench.rows("whole").items():
        texts = [row.pop("config") for row in (whole, rows[name])]
        first, second = (parse_config(text, "a result") for text in texts)
        assert set(differences(first, second, run=True)) == {"data.root"} and not differences(first, second, run=False)
        assert without_times(whole) == without_times(rows[name]), "interruptions must not change the results"
        assert whole["complete"] and len(whole["table"]) == 2


def test_the_length_of_a_run_in_minutes_is_measured_once(bench: Bench, tmp_path: Path) -> None:
    """A length stays valid if only the digest changes, as when the schema gets a key. Another config is timed again."""
    bench.plan["stages"] = [{"name": "long", "minutes": 1, "variants": {"a": []}}]
    (tmp_path / "plan.yaml").write_text(json.dumps(bench.plan))
    ablation = Ablation(read_plan(tmp_path / "plan.yaml", []), tmp_path / "results.jsonl")
    (run,) = ablation.runs_of(ablation.stage("long"))
    bench.patch.setattr(trial, "Trial", lambda *args, **options: pytest.fail("timed again"))

    def length(config: str) -> int | None:
        kept = {"digest": "of an older version", "terms": run.terms, "config": config, "epochs": 7}
        (tmp_path / "length.json").write_text(json.dumps(kept))
        return runner.Runner(ablation, tmp_path, float("inf"), None)._epochs_of(run, tmp_path)

    config = run.config.to_yaml()
    assert length(config) == 7 and config.count("latent_dim: 8") == 1
    with pytest.raises(pytest.fail.Exception, match="timed again"):
        length(config.replace("latent_dim: 8", "latent_dim: 16"))


@pytest.mark.long
def test_lengths_in_minutes_and_of_another_run(bench: Bench, tmp_path: Path) -> None:
    bench.make("out", None, "--data", "what it is")
    rows = bench.rows("out")
    assert [row["complete"] for row in rows.values()] == [True] * 4 and len(rows) == 4
    # 0.1 minutes are 6 seconds, or 6 reads of the clock. Training reads it about twice every ten steps of 128 images.
    assert 1 <= rows["long-best-0"]["epochs"] == rows["control-a-0"]["epochs"] <= 10
    assert not list(tmp_path.rglob("last.pt")) and (tmp_path / "out" / "long-best-0.yaml").exists()
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("**") == 6 and "what it is" in table and table.strip() in bench.make("out")

    bench.plan |= {"judging": "all", "stages": [{"name": "screen", "epochs": 1, "variants": {"a": []}}]}
    assert "| a | 0 |" in bench.make("out")
    judged_by_all = bench.rows("out")["screen-a-0"]["table"]
    assert len(judged_by_all) >= 8, "results judged by the config's protocols must not stand in for those of all"
    for name, cells in rows["screen-a-0"]["table"].items():
        assert cells == next(found for other, found in judged_by_all.items() if other.startswith(name))


@pytest.mark.long
def test_a_run_that_the_clock_stops_keeps_its_checkpoint(bench: Bench, tmp_path: Path) -> None:
    """Time that is left because the judging was shorter than assumed does not make an incomplete run complete."""
    bench.plan["stages"] = [{"name": "screen", "epochs": 50, "variants": {"a": []}}]
    seconds = 1.5 * runner.FIRST_JUDGING_S + runner.FIRST_STARTUP_S + 9
    assert "not all stages are done" in bench.make("out", seconds / 60, status=75)
    row = bench.rows("out")["screen-a-0"]
    assert not row["complete"] and 0 < row["epochs"] < 50
    assert (tmp_path / "out" / "runs" / "screen-a-0" / "last.pt").exists()


@pytest.mark.long
def test_what_fails_does_not_keep_the_rest_from_being_made(bench: Bench, tmp_path: Path) -> None:
    bench.plan["stages"] = [
        {"name": "bad", "command": "-c 'print(1); exit(3)'", "minutes": 0.5},
        {"name": "screen", "epochs": 1, "variants": {"large": [], "huge": [], "empty": [], "none": NO_IMAGES}},
        {"name": "after", "epochs": 1, "base": "screen", "variants": {"x": []}},
        {"name": "control", "images_of": "screen/large", "variants": {"y": []}},
        {"name": "last", "epochs": 1, "variants": {"z": []}},
    ]
    train = Trial.train

    def failing(self: Trial, stop: Any, **options: Any) -> None:
        if "huge" in str(self.checkpoint):
            raise OutOfMemoryError("out of memory: 3 GiB was requested; take a smaller model")
        if "screen" in str(self.checkpoint):
            raise RuntimeError("out of memory\nand more" if "large" in str(self.checkpoint) else "")
        train(self, stop, **options)

    bench.patch.setattr(Trial, "train", failing)
    printed = bench.make("out", status=1)
    assert (
        "failed: screen-large-0, screen-huge-0, screen-empty-0, screen-none-0, after, control-y-0" in printed
        and "\nall stages are done" in printed
    )
    rows = bench.rows("out")
    assert rows["screen-huge-0"]["failed"].startswith("out of memory: 3 GiB")
    assert rows["screen-large-0"]["failed"] == "out of memory" and rows["screen-empty-0"]["failed"] == "RuntimeError"
    assert rows["screen-none-0"]["failed"].startswith("no folder nowhere")
    assert rows["last-z-0"]["complete"] and "- screen-large-0 failed: out of memory" in printed
    assert (tmp_path / "out" / "commands.txt").read_text().endswith("1\n== bad: status 3\n")

    bench.patch.setattr(Trial, "train", train)
    del bench.plan["stages"][1]["variants"]["none"]
    assert "failed:" not in bench.make("out"), "a new start must repeat what has failed"
    rows = bench.rows("out")
    del rows["screen-none-0"]  # no longer in the plan
    assert all(row["complete"] for row in rows.values()) and {"after-x-0", "control-y-0"} < set(rows)


def test_a_command_is_repeated_if_the_driver_had_to_end_it(bench: Bench, tmp_path: Path) -> None:
    """A command is done at its own end or at the time limit of its stage, but not at that of the driver."""
    bench.patch.setattr(runner, "FIRST_JUDGING_S", 0.0)
    first = (
        "import pathlib, time; p = pathlib.Path('{}'); p.exists() or (p.touch(), time.sleep(60)); print(6 * 7, end='')"
    )
    slow = {"name": "slow", "command": f'-c "{first.format(tmp_path / "slow")}"', "minutes": 2}
    bench.plan["stages"] = [slow]
    assert "not all stages are done" in bench.make("out", 6 / 60, status=75)
    said = tmp_path / "out" / "commands.txt"
    assert said.read_text().endswith("\n== slow: interrupted\n")
    limited = {"name": "limited", "command": "-c 'import time; time.sleep(60)'", "minutes": 0.02}
    bench.plan["stages"] = [slow, limited]
    for _ in range(2):
        assert "\nall stages are done" in bench.make("out")
        lines = said.read_text().splitlines()
        assert lines[2:4] == [lines[0], "42== slow: status 0"]
        assert lines[5:] == ["== limited: stopped after 1 s"]

    # A signal that ends the command, such as Ctrl-C, ends the driver as well. One that the command survives does not.
    handler = signal.signal(signal.SIGTERM, signals._note)
    try:
        for status, expected in ((3, "not all stages are done"), (0, "\nall stages are done")):
            bench.plan["stages"] = [
                {"name": "signalled", "command": f"-c 'import os, sys; os.kill(os.getppid(), 15); sys.exit({status})'"}
            ]
            bench.patch.setattr(signals, "_received", 0)
            assert expected in bench.make("out", status=75 if status else 0)
    finally:
        signal.signal(signal.SIGTERM, handler)
    bench.patch.setattr(signals, "_received", 0)


def test_a_failure_is_not_repeated_by_the_other_drivers_of_a_start(bench: Bench, tmp_path: Path) -> None:
    """A driver skips a run that another one has recorded as failed since it was started, and reports the failure."""
    bench.plan["stages"] = [{"name": "screen", "epochs": 1, "variants": {"a": [], "b": []}}]
    ran: list[str] = []
    finish = ablate.Driver._finish

    def failing_elsewhere(self: ablate.Driver, run: Any, folder: Path) -> bool:
        if run.variant == "a":
            self.ablation.record(run, {"complete": False, "failed": "out of memory"})
        return finish(self, run, folder)

    def train(self: Trial, stop: Any, **options: Any) -> None:
        ran.append(str(self.checkpoint))
        raise RuntimeError("a bug")

    bench.patch.setattr(Trial, "train", train)
    with bench.patch.context() as patch:
        patch.setattr(ablate.Driver, "_finish", failing_elsewhere)
        assert "failed: screen-a-0, screen-b-0\n" in bench.make("out", status=1)
    assert ran == [str(tmp_path / "out" / "runs" / "screen-b-0" / "last.pt")]
    bench.make("out", status=1)
    assert len(ran) == 3, "a new start must repeat both"


def test_checkpoints_and_encoders_of_another_plan_are_not_overwritten(bench: Bench, tmp_path: Path) -> None:
    """A run fails with one line if its files are of another config. Another run of the plan is trained."""
    bench.patch.setattr(runner, "FIRST_STARTUP_S", 1.0)
    stage = {"name": "screen", "epochs": 50, "keep": True, "variants": {"a": []}}
    bench.plan["stages"] = [stage]
    bench.make("out", (1.5 * runner.FIRST_JUDGING_S + 9) / 60, status=75)
    out = tmp_path / "out"
    checkpoint, encoder, results = out / "runs/screen-a-0/last.pt", out / "screen-a-0.pt.part0", out / "results.jsonl"
    before = [path.read_bytes() for path in (checkpoint, encoder, results)]

    for change in ({"epochs": 1, "keep": False}, {"epochs": 50, "control": "supervised"}):
        stage |= change
        bench.make("out", status=1)
        differs = "control" if "control" in change else "training.epochs"
        assert bench.rows("out")["screen-a-0"]["failed"] == (
            f"{checkpoint} is of another run, with another {differs}: move or delete it, or choose another --out"
        )
    checkpoint.rename(tmp_path / "moved.pt")
    stage |= {"epochs": 1, "control": None, "keep": True, "variants": {"a": [], "b": []}}
    bench.make("out", status=1)
    rows = bench.rows("out")
    assert "screen-a-0.yaml is of another run" in rows["screen-a-0"]["failed"] and rows["screen-b-0"]["complete"]
    assert [path.read_bytes() for path in (tmp_path / "moved.pt", encoder)] == before[:2]
    assert results.read_bytes().startswith(before[2])


def test_a_signal_saves_and_ends(bench: Bench, tmp_path: Path) -> None:
    bench.plan["stages"] = bench.plan["stages"][1:2]
    step, steps = trial.train_step, iter(range(10**6))
    bench.patch.setattr(signals, "_received", 0)  # monkeypatch restores it after the test
    handler = signal.signal(signal.SIGTERM, signals._note)

    def signalled(*args: Any) -> Any:
        if next(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    try:
        with bench.patch.context() as patch:
            patch.setattr(trial, "train_step", signalled)
            assert "not all stages are done" in bench.make("out", status=75)
    finally:
        signal.signal(signal.SIGTERM, handler)
    bench.patch.setattr(signals, "_received", 0)
    checkpoint = tmp_path / "out" / "runs" / "screen-a-0" / "last.pt"
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["step"] == 10, "the run must stop at the next check of the clock"
    whole = checkpoint.read_bytes()

    def unreadable(*args: Any, **options: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with bench.patch.context() as patch:
        patch.setattr(torch, "load", unreadable)
        assert "- screen-a-0 failed: cannot read" in bench.make("out", status=1)
    assert checkpoint.read_bytes() == whole, "the disk may work again, and then the run resumes"
    checkpoint.write_bytes(whole[:1000])
    assert "\nall stages are done" in bench.make("out"), "only the training in the damaged checkpoint may be lost"
    assert checkpoint.with_name("last.pt.damaged").read_bytes() == whole[:1000]


@pytest.mark.long
def test_a_driver_waits_for_what_a_later_stage_needs(bench: Bench, tmp_path: Path) -> None:
    """A driver waits for a run that another one holds only before a stage that needs it, and takes it over then."""
    bench.plan["stages"] = [
        {"name": "screen", "epochs": 1, "variants": {"a": [], "b": ["diffusion.schedule=linear"]}},
        {"name": "other", "epochs": 1, "variants": {"z": []}},
        {"name": "length", "images_of": "screen/b", "variants": {"y": []}},
        {"name": "then", "epochs": 1, "base": "screen", "variants": {"x": []}},
    ]
    held = tmp_path / "out" / "runs" / "screen-a-0"
    held.mkdir(parents=True)
    other = lock_file(held / ".lock")
    waits: list[list[str]] = []

    def sleep(seconds: float) -> None:
        waits.append(list(bench.rows("out")))
        if len(waits) == 2:
            other.close()

    bench.patch.setattr(ablate.time, "sleep", sleep)
    assert "\nall stages are done\n" in bench.make("out")
    before = ["screen-b-0", "other-z-0", "length-y-0"]
    assert waits == [before] * 2 and list(bench.rows("out")) == [*before, "screen-a-0", "then-x-0"]
    plan = read_plan(tmp_path / "plan.yaml", [])
    mine, others = (Ablation(plan, tmp_path / "out" / "results.jsonl") for _ in range(2))
    (run,) = mine.runs_of(mine.stage("then"))
    others.record(run, row_of(12, 34))
    mine.read_results()
    row = mine.row_of(run)
    assert row and accuracies(row) == (12, 34)


def test_a_driver_does_not_wait_for_what_nothing_needs(bench: Bench, tmp_path: Path) -> None:
    """A driver ends and names the process that holds a run. A run that has been left incomplete is taken over."""
    bench.plan["stages"] = [{"name": "screen", "epochs": 1, "variants": {"a": [], "b": []}}]
    locks = {}
    for name in ("screen-a-0", "screen-b-0"):
        folder = tmp_path / "out" / "runs" / name
        folder.mkdir(parents=True)
        locks[name] = lock_file(folder / ".lock")
    bench.patch.setattr(ablate.time, "sleep", lambda seconds: pytest.fail("waited"))
    take_over = ablate.Driver._take_over

    def left_incomplete(self: ablate.Driver) -> bool:
        locks["screen-a-0"].close()
        return take_over(self)

    bench.patch.setattr(ablate.Driver, "_take_over", left_incomplete)
    printed = bench.make("out")
    assert f"all stages are done, except runs of other drivers: screen-b-0 (process {os.getpid()} on" in printed
    assert list(bench.rows("out")) == ["screen-a-0"] and "screen-a-0 (" not in printed
    locks["screen-b-0"].close()


@pytest.mark.long
def test_two_drivers_make_the_results_of_one(bench: Bench, tmp_path: Path) -> None:
    """Two drivers, started as a user starts them, divide the runs. Their results are those of one driver.

    The plan has a command, a run that fails, a second look, and a stage that needs the best variant.
    """
    bench.plan["overrides"].append("training.batch_size=256")  # five steps
    bench.plan["stages"] = [
        bench.plan["stages"][0],
        {
            "name": "screen",
            "epochs": 1,
            "again": {"seeds": [1], "within": 100.0},
            "variants": {"a": [], "b": ["diffusion.schedule=linear"], "bad": ["encoder.latent_dim=4"]},
        },
        {"name": "then", "epochs": 1, "base": "screen", "variants": {"x": []}},
    ]
    experiment = experiment_of(tmp_path, "encoder.latent_dim=5", "training.batch_size=256")
    for out in ("one", "two"):
        contents = checkpoint_contents(experiment, initial_state(experiment))
        save_checkpoint(tmp_path / out / "runs" / "screen-bad-0" / "last.pt", contents)
    assert "\nfailed: screen-bad-0\nall stages are done\n" in bench.make("one", status=1)
    expected = [without_times(row) for row in bench.rows("one").values()]
    names = ["screen-a-0", "screen-b-0", "screen-bad-0", "screen-a-1", "screen-b-1", "then-x-0"]
    assert [row["run"] for row in expected] == names

    # The lock of the command keeps both drivers waiting until both have started.
    (tmp_path / "two" / "runs" / "hello").mkdir()
    lock = lock_file(tmp_path / "two" / "runs" / "hello" / ".lock")
    command = [sys.executable, "-m", "ablations.ablate", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "two")]
    printed, drivers = [tmp_path / "first.txt", tmp_path / "second.txt"], []
    try:
        for path in printed:
            with open(path, "w", encoding="utf-8") as file:
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                drivers.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))
        while not all("waiting for hello (process" in path.read_text() for path in printed):
            assert [driver.poll() for driver in drivers] == [None, None], [path.read_text() for path in printed]
            time.sleep(0.1)
        lock.close()
        assert [driver.wait(timeout=600) for driver in drivers] == [1, 1], [path.read_text() for path in printed]
    finally:
        for driver in drivers:
            driver.kill()
    lines = (tmp_path / "two" / "results.jsonl").read_text().splitlines()
    found = sorted((without_times(json.loads(line)) for line in lines), key=lambda row: names.index(row["run"]))
    for row in (*found, *expected):
        if "failed" in row:
            assert row.pop("failed").partition(" is of another run, with another ")[2].startswith("encoder.latent_dim")
    assert found == expected, "each run must be made once"
    assert (tmp_path / "two" / "commands.txt").read_text() == (tmp_path / "one" / "commands.txt").read_text()
    logs = [path.read_text() for path in printed]
    assert all("\nfailed: screen-bad-0\nall stages are done" in log for log in logs), logs
    assert sorted(log.count("(in another driver)") for log in logs) == [0, 1], "the failed run must be tried once"


@pytest.mark.long
def test_the_speed_is_that_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images per second count neither the first steps nor judging nor saving, also if a run is judged in between."""
    now = 0.0

    def taking(seconds: float, function: Any) -> Any:
        def timed(*args: Any) -> Any:
            nonlocal now
            now += seconds
            return function(*args)

        return timed

    monkeypatch.setattr(trial.time, "monotonic", lambda: now)
    monkeypatch.setattr(trial, "SAVE_EVERY_S", 30)
    steps = iter(range(100))
    step = trial.train_step
    monkeypatch.setattr(trial, "train_step", lambda *args: taking(100 if next(steps) < 30 else 2, step)(*args))
    monkeypatch.setattr(trial, "save_checkpoint", taking(1000, trial.save_checkpoint))
    monkeypatch.setattr(trial, "judge", taking(10_000, lambda *args: {}))
    config = experiment_of(tmp_path, "training.epochs=4").config
    run = Trial(config, tmp_path / "last.pt", judging="config")
    for end in (22, 44, 66, 88):
        run.train(lambda: False, end=end)
        result = run.judged()
    assert result["images_per_s"] == pytest.approx(32, rel=0.01), "64 images in 2 seconds"
