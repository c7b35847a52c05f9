"""The driver of ablations: plans, results that survive, ties, runs that stop and go on."""

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import ablate
from benchmarks.plan import Plan, Results, Run, Stage, read_plan, runs_of
from benchmarks.tables import pooled_deviation, tables, verdict
from benchmarks.trial import Trial, write_parts
from tests.conftest import ROOT, TINY_RUN
from utils.config import ConfigError

PLANS = sorted((ROOT / "benchmarks" / "plans").glob("*.yaml"))


def row_of(knn: float, linear: float, complete: bool = True, **more: Any) -> dict[str, Any]:
    table = {
        "k-NN k=20 uniform, unit z, bank: crop (the reference's)": {"trained": {"top1": knn, "top3": 99.0}},
        "linear 15 epochs (the reference's)": {"trained": {"top1": linear, "top3": 99.0}},
        "k-NN k=200 T=0.1, unit z, bank: clean": {"trained": {"top1": 1.0, "top3": 2.0}},
    }
    fixed = {"images": 1000, "epochs": 2.0, "seconds": 60.0, "images_per_s": 5.0, "evaluation_s": 1.0}
    return {"table": table, "complete": complete, "machine": "a machine", "amp": "None", **fixed, **more}


def two_stages() -> Plan:
    screen = Stage(name="screen", epochs=1, seeds=[0, 1], variants={"a": [], "b": ["x=1"], "c": ["x=1", "y=2"]})
    then = Stage(name="then", images_of="screen/a", base="screen", variants={"d": ["z=3"]})
    last = Stage(name="last", epochs=2, base="then", variants={"e": []})
    return Plan(config="config/digits.yaml", stages=[screen, then, last])


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_plans_that_are_there_load(path: Path) -> None:
    plan = read_plan(path, ["training.epochs=3"])
    assert any(stage.variants for stage in plan.stages)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("{name: a, epochs: 1, variants: {x: [training.epoch=2]}}", "did you mean training.epochs"),
        ("{name: a, epochs: 1, minutes: 2.0, variants: {x: []}}", "one of epochs, minutes and images_of"),
        ("{name: a, variants: {x: []}}", "one of epochs, minutes and images_of"),
        ("{name: a, epochs: 1, command: x}", "or a command"),
        ("{name: a, epochs: 1, base: b, variants: {x: []}}", "builds on b"),
        ("{name: a, images_of: b/c, variants: {x: []}}", "trains as long as b/c"),
        ("{name: a, epochs: 1, varants: {x: []}}", "varants"),
        ("{name: a, epochs: 1, variants: {x: []}}\n  - {name: a, epochs: 1, variants: {x: []}}", "two stages"),
        ("{name: a", "is no plan"),
    ],
)
def test_mistakes_in_a_plan_are_explained(tmp_path: Path, stage: str, expected: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(f"config: {ROOT / 'config' / 'digits.yaml'}\nstages:\n  - {stage}\n")
    with pytest.raises(ConfigError, match=expected) as caught:
        read_plan(path, [])
    assert "\n" not in str(caught.value)


def test_a_stage_builds_on_the_best_of_another(tmp_path: Path) -> None:
    plan, results = two_stages(), Results(tmp_path / "results.jsonl")
    screen, then, last = plan.stages
    runs = list(runs_of(screen, plan, results))
    assert [run.name for run in runs] == [f"screen-{v}-{seed}" for seed in (0, 1) for v in "abc"]
    assert list(runs_of(then, plan, results)) == [], "nothing is known yet"
    for run, knn in zip(runs, (60, 50, 40, 60, 90, 20), strict=True):
        results.add(run, row_of(knn, 50))
    assert results.best(screen) == "b", "60 is less than the mean of 50 and 90"
    (run,) = runs_of(then, plan, results)
    assert run.overrides == ["x=1", "z=3"]
    results.add(run, row_of(1, 1, complete=False))
    assert not results.finished(run) and list(runs_of(last, plan, results)) == []
    results.add(run, row_of(1, 1))
    assert results.finished(run) and not results.finished(Run(then, "d", 0, ["x=2", "z=3"]))
    assert next(runs_of(last, plan, results)).overrides == ["x=1", "z=3"]


def test_results_survive_a_line_that_was_cut_short(tmp_path: Path) -> None:
    plan, results = two_stages(), Results(tmp_path / "results.jsonl")
    first, second, third, *_ = runs_of(plan.stages[0], plan, results)
    results.add(first, row_of(1, 2))
    results.add(second, row_of(3, 4))
    content = results.path.read_bytes()
    results.path.write_bytes(content[:-30])
    again = Results(results.path)
    assert list(again.rows) == [first.name]
    again.add(third, row_of(5, 6))
    assert list(Results(results.path).rows) == [first.name, third.name]
    assert len(results.path.read_text().splitlines()) == 3


def test_ties_are_less_than_two_deviations_apart(tmp_path: Path) -> None:
    groups = [[1.0, 3.0], [10.0], [5.0, 5.0, 8.0]]
    expected = np.sqrt((np.var([1, 3], ddof=1) + 2 * np.var([5, 5, 8], ddof=1)) / 3)
    assert pooled_deviation(groups) == pytest.approx(expected) and pooled_deviation([[1.0], [2.0]]) is None
    assert (
        verdict(-1.9, 1.0) == "-1.9 (tie)" and verdict(2.1, 1.0) == "+2.1" and verdict(2.1, None) == "+2.1 (one seed)"
    )

    plan, results = two_stages(), Results(tmp_path / "results.jsonl")
    for run, knn in zip(runs_of(plan.stages[0], plan, results), (60, 61, 80, 62, 63, 84), strict=True):
        results.add(run, row_of(knn, knn))
    lines = tables(plan, results).splitlines()
    assert lines[0] == "**screen** (a machine, None)"
    cells = {line.split(" |")[0].strip("| "): line for line in lines[2:] if line.startswith("|")}
    deviation = statistics.stdev([60, 62])
    assert f"| 61.0 ± {deviation:.1f} |" in cells["a"] and "| 0, 1 | 1,000 | 1.0 | 5 ± 0 |" in cells["a"]
    assert "| +1.0 (tie) |" in cells["b: x=1"] and "| +21.0 |" in cells["c: x=1 y=2"]
    assert "- `x=1`" not in "".join(lines), "one variant without it is no average"


def test_parts_of_an_encoder_go_together_again(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2500, 2600), nn.BatchNorm1d(2600))
    write_parts(module, tmp_path / "encoder.pt")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"encoder.pt.part0", "encoder.pt.part1", "encoder.pt.sha256"} and max(sizes.values()) < 16e6
    command = "cat encoder.pt.part* > encoder.pt && sha256sum -c encoder.pt.sha256"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, capture_output=True)
    weights = torch.load(tmp_path / "encoder.pt", weights_only=True)
    for name, value in module.state_dict().items():
        expected = value.bfloat16() if value.is_floating_point() else value
        assert torch.equal(weights[name], expected), name


def test_a_plan_stops_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clock runs out within the second run and during the stage of minutes; nothing is done twice."""
    overrides = [*TINY_RUN, "training.batch_size=64", "evaluation.knn.k=5"]
    plan: dict[str, Any] = {
        "config": str(ROOT / "config" / "digits.yaml"),
        "overrides": overrides,
        "stages": [
            {"name": "hello", "command": "-c 'print(6 * 7)'"},
            {"name": "bad", "command": "-c 'exit(3)'", "minutes": 0.5},
            {"name": "endless", "command": "-c 'print(1); import time; time.sleep(99)'", "minutes": 0.005},
            {"name": "screen", "epochs": 1, "variants": {"a": [], "b": ["diffusion.schedule=linear"]}},
            {"name": "long", "minutes": 0.02, "base": "screen", "keep": True, "variants": {"best": []}},
            {"name": "control", "images_of": "long/best", "variants": {"a": []}},
        ],
    }
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(plan))  # JSON is YAML

    def make(out: str, looks: int = 10**9) -> str:
        """Until the driver has looked at the clock so many times."""
        left = iter(range(looks))
        with monkeypatch.context() as patch:
            patch.setattr(ablate.Driver, "out_of_time", lambda driver: next(left, None) is None)
            assert ablate.main([str(path), "--out", str(tmp_path / out)]) == 0
        return capsys.readouterr().out

    assert "the time is over" in make("broken", 5)
    rows = Results(tmp_path / "broken" / "results.jsonl").rows
    assert [(name, row["complete"]) for name, row in rows.items()] == [("screen-a-0", True), ("screen-b-0", False)]
    assert 0 < rows["screen-b-0"]["images"] < 22 * 64
    assert "all is done" in make("broken")
    assert (tmp_path / "broken" / "hello.txt").read_text() == "42\n"
    rows = Results(tmp_path / "broken" / "results.jsonl").rows
    assert [(name, row["complete"]) for name, row in rows.items()] == [
        (name, True) for name in ("screen-a-0", "screen-b-0", "long-best-0", "control-a-0")
    ]
    assert len((tmp_path / "broken" / "results.jsonl").read_text().splitlines()) == 5
    assert rows["long-best-0"]["images"] == rows["control-a-0"]["images"]
    assert not list(tmp_path.rglob("last.pt")) and len(list((tmp_path / "broken").glob("long-best-0.pt.*"))) == 2
    table = (tmp_path / "broken" / "table.md").read_text()
    assert table.count("**") == 6 and table in make("broken"), "nothing is left to do"

    assert (tmp_path / "broken" / "bad.partial").exists() and not (tmp_path / "broken" / "bad.txt").exists()
    assert (tmp_path / "broken" / "endless.partial").exists()

    # One that fails does not keep the others from being made.
    plan["stages"] = [stage for stage in plan["stages"] if stage["name"] == "screen"]
    del plan["stages"][0]["variants"]["a"]
    path.write_text(json.dumps({**plan, "stages": [{**plan["stages"][0], "variants": {"large": [], "b": []}}]}))
    train = Trial.train

    def failing(trial: Trial, stop: Any) -> None:
        if "large" in str(trial.checkpoint):
            raise RuntimeError("out of memory\nand more")
        train(trial, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Trial, "train", failing)
        assert "all is done" in make("failing")
    rows = Results(tmp_path / "failing" / "results.jsonl").rows
    assert rows["screen-large-0"]["failed"] == "out of memory" and rows["screen-b-0"]["complete"]
    plan["stages"][0]["variants"] = {"a": [], "b": ["diffusion.schedule=linear"]}
    rows = Results(tmp_path / "broken" / "results.jsonl").rows
    path.write_text(json.dumps(plan))
    make("whole")
    whole = Results(tmp_path / "whole" / "results.jsonl").rows
    for name in ("screen-a-0", "screen-b-0"):
        assert whole[name]["table"] == rows[name]["table"], "as if it had not been stopped"
        assert len(whole[name]["table"]) >= 8 and whole[name]["config_digest"] == rows[name]["config_digest"]
