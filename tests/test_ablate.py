"""Tests of ablations: plans, results that survive a crash, and tables."""

import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ablations import ablate, floors
from ablations.plan import Plan, SecondLook, Stage, read_plan
from ablations.runs import Ablation, accuracies
from ablations.tables import markdown_tables, pooled_deviation, verdict
from ablations.trial import write_encoder_parts
from config.errors import ConfigError
from tests.conftest import ROOT

PLANS = sorted((ROOT / "ablations" / "plans").glob("*.yaml"))
X1, Y2, Z3 = "decoder.dropout=0.25", "encoder.latent_dim=32", "training.ema_decay=0.5"


def row_of(knn: float, linear: float, complete: bool = True, **more: Any) -> dict[str, Any]:
    """Returns the result of a run with these accuracies under the reference's protocols."""
    table = {
        "k-NN k=20 uniform, unit z, bank: crop (the reference's)": {"trained": {"top1": knn, "top3": 99.0}},
        "linear 15 epochs (the reference's)": {"trained": {"top1": linear, "top3": 99.0}},
        "k-NN k=200 T=0.1, unit z, bank: clean": {"trained": {"top1": 1.0, "top3": 2.0}},
    }
    fixed = {
        "step_gflop": 1.205,
        "images": 1000,
        "epochs": 2.0,
        "seconds": 60.0,
        "images_per_s": 5.0,
        "evaluation_s": 1.0,
    }
    return {
        "table": table,
        "complete": complete,
        "machine": "a machine",
        "amp": "torch.float32",
        "data": "data",
        **fixed,
        **more,
    }


def two_stages(**changes: Any) -> Plan:
    """Returns a plan: a screen (with `changes`), and two later stages, each based on the stage before it."""
    screen = Stage(name="screen", epochs=1, seeds=[0, 1], variants={"a": [], "b": [X1], "c": [X1, Y2]})
    then = Stage(name="then", images_of="screen/a", base="screen", variants={"d": [Z3]})
    last = Stage(name="last", epochs=2, base="then", variants={"e": []})
    config = str(ROOT / "config" / "digits.yaml")
    return Plan(config=config, stages=[screen.model_copy(update=changes), then, last])


@pytest.fixture
def ablation(tmp_path: Path) -> Ablation:
    """Results of a complete screen: variant a scores 60 and 62, b scores 50 and 90, c scores 40 and 20."""
    ablation = Ablation(two_stages(), tmp_path / "results.jsonl")
    for run, knn in zip(ablation.runs_of(ablation.stage("screen")), (60, 50, 40, 62, 90, 20), strict=True):
        ablation.record(run, row_of(knn, knn))
    return ablation


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_the_plans_that_are_there_load(path: Path, tmp_path: Path) -> None:
    ablation = Ablation(read_plan(path, ["device=cpu"]), tmp_path / "results.jsonl")
    made: set[str] = set()
    for stage in ablation.plan.stages:
        for run in ablation.runs_of(stage):
            made.add(run.name)
            ablation.record(run, row_of(1, 1))
    assert len(made) == sum(len(stage.variants) * len(stage.seeds) for stage in ablation.plan.stages) > 4


def test_the_screen_of_cifar10_is_balanced() -> None:
    """Among the variants with the same schedule, each of the other settings is on in exactly half."""
    screen = next(s for s in read_plan(ROOT / "ablations/plans/cifar10.yaml", []).stages if s.name == "screen")
    keys = ("decoder.scale_offset", "views.source.crop_scale", "views.target.crop_scale", "views.target.randaugment")
    by_schedule: dict[str, list[list[bool]]] = {}
    for overrides in screen.variants.values():
        schedule = next((o for o in overrides if o.startswith("diffusion.schedule")), "linear")
        row = [any(override.startswith(key) for override in overrides) for key in keys]
        assert row[1] == row[2]
        by_schedule.setdefault(schedule, []).append(row)
    assert sorted(map(len, by_schedule.values())) == [2, 2, 4]
    for rows in by_schedule.values():
        assert (np.mean(rows, axis=0) == 0.5).all()


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("{name: a, epochs: 1, variants: {x: [training.epoch=2]}}", "did you mean training.epochs"),
        ("{name: a, epochs: 1, variants: {x: [training.epochs=2]}}", "use seeds and epochs of a stage"),
        ("{name: a, epochs: 1, minutes: 2.0, variants: {x: []}}", "one of epochs, minutes and images_of"),
        ("{name: a, variants: {x: []}}", "one of epochs, minutes and images_of"),
        ("{name: a, epochs: 1, command: x}", "or a command"),
        ("{name: a, epochs: 1, seeds: [1, 1], variants: {x: []}}", "each seed only once"),
        ("{name: a, epochs: 1, variants: {x/y: []}}", "pattern"),
        ("{name: a, epochs: 1, variants: {x: []}, epochs: 2}", "given twice"),
        ("{name: a, epochs: 1, base: b, variants: {x: []}}", "builds on b"),
        ("{name: a, images_of: b/c, variants: {x: []}}", "trains as long as b/c"),
        ("{name: a, epochs: 1, varants: {x: []}}", "varants"),
        ("{name: a, epochs: 1, variants: {x: []}}\n  - {name: a, epochs: 1, variants: {x: []}}", "two stages"),
        ("{name: a, epochs: 1, seeds: [0], again: {seeds: [1, 0], within: 1}, variants: {x: []}}", "each seed only"),
        (
            "{name: a, epochs: 1, control: byol, variants: {x: []}}",
            "a/x: there is no control byol: choose one of simclr",
        ),
        ("{name: a", "not valid YAML"),
    ],
)
def test_mistakes_in_a_plan_are_explained(tmp_path: Path, stage: str, expected: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(f"config: {ROOT / 'config' / 'digits.yaml'}\nstages:\n  - {stage}\n")
    with pytest.raises(ConfigError, match=expected) as caught:
        read_plan(path, [])
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"none.yaml \(No such file or directory\): name a YAML file"):
        read_plan(tmp_path / "none.yaml", [])


def test_wrong_options_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(f"config: {ROOT / 'config/digits.yaml'}\nstages: [{{name: a, epochs: 1, variants: {{x: []}}}}]\n")
    ablation = [str(path), "--out", str(tmp_path / "out")]
    baselines = ["--config", str(ROOT / "config" / "digits.yaml")]
    for program, options, expected in (
        (ablate, [*ablation, "--minutes", "0"], "--minutes 0.0 leaves no time: give more than 0"),
        (ablate, [*ablation, "--minutes", "nan"], "--minutes nan leaves no time: give more than 0"),
        (ablate, [*ablation, "--table"], f"{tmp_path / 'out' / 'results.jsonl'} has no results of this plan"),
        (floors, [*baselines, "--components", "0"], "--components 0 is too small: give at least 1"),
        (floors, [*baselines, "--data", "digits"], "--data is for results.jsonl: add --out"),
        (floors, [*baselines, "--out", str(path)], f"cannot use {path} (Not a directory)"),
    ):
        with pytest.raises(SystemExit, match="2"):
            program.main(options)
        said = capsys.readouterr().err
        assert said.startswith(f"error: {expected}") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_stage_builds_on_the_best_of_another(ablation: Ablation) -> None:
    screen, then, last = ablation.plan.stages
    assert [run.name for run in ablation.runs_of(screen)] == [f"screen-{v}-{seed}" for seed in (0, 1) for v in "abc"]
    assert ablation.best_variant(screen) == "b", "a has a mean of 61, b has 70"
    (run,) = ablation.runs_of(then)
    assert run.overrides == [X1, Z3] and run.config.decoder.dropout == 0.25 and run.config.training.ema_decay == 0.5
    ablation.record(run, row_of(1, 1, complete=False))
    assert ablation.runs_of(last) == []
    ablation.record(run, row_of(1, 1))
    assert ablation.runs_of(last)[0].overrides == [X1, Z3]
    of_a = [each for each in ablation.runs_of(screen) if each.variant == "a"]
    for length, is_complete in ((4.0, False), (2.0, True)):  # `run` is as long as variant a, and was made with length 2
        for each in of_a:
            ablation.record(each, row_of(60, 60, epochs=length))
        ablation.record(run, {"complete": False, "failed": "its length was not known"})
        assert ablation.is_complete(run) == is_complete and ablation.epochs_of_reference_run(then) == length


@pytest.mark.parametrize("changes", [{"epochs": 2}, {"variants": {"a": [Z3]}}, {"seeds": [7]}])
def test_results_of_another_experiment_are_passed_over(ablation: Ablation, changes: dict[str, Any]) -> None:
    changed = Ablation(two_stages(**changes), ablation.path)
    assert changed.complete_rows(changed.stage("screen")) == {} and "screen" not in markdown_tables(changed)
    same = Ablation(two_stages(), ablation.path)
    assert len(same.complete_rows(same.stage("screen"))["a"]) == 2
    more = same.plan.model_copy(update={"overrides": ["optimizer.encoder_lr=0.5"]})
    assert Ablation(more, ablation.path).complete_rows(same.stage("screen")) == {}
    moved = same.plan.model_copy(update={"overrides": ["data.root=/elsewhere", "data.num_workers=3"]})
    assert len(Ablation(moved, ablation.path).complete_rows(same.stage("screen"))["a"]) == 2


def test_plans_that_share_a_file_keep_their_own_results(ablation: Ablation) -> None:
    """Results of another config for the same run do not hide earlier results of this plan."""
    changed = Ablation(two_stages(epochs=2), ablation.path)
    for run in changed.runs_of(changed.stage("screen")):
        changed.record(run, row_of(1, 1))
    ablation.read_results()
    assert [accuracies(row)[0] for row in ablation.complete_rows(ablation.stage("screen"))["b"]] == [50, 90]
    assert [accuracies(row)[0] for row in changed.complete_rows(changed.stage("screen"))["b"]] == [1, 1]


def test_results_on_other_images_are_known(tmp_path: Path) -> None:
    """A changed data set or held-out split is found, but not for runs whose keys ask for other images."""
    larger = Stage(name="larger", epochs=1, variants={"x": ["data.image_size=16"]})
    screen = two_stages().stages[0]
    ablation = Ablation(two_stages().model_copy(update={"stages": [screen, larger]}), tmp_path / "results.jsonl")
    first, second, *_, last = [*ablation.runs_of(screen), *ablation.runs_of(larger)]
    ablation.record(first, row_of(1, 1, data_digest="old"))
    ablation.record(second, row_of(1, 1))
    ablation.record(last, row_of(1, 1, data_digest="larger"))
    assert ablation.results_on_other_images(second, "new") == [first.name]
    assert ablation.results_on_other_images(second, "old") == []


def test_a_second_look_trains_the_best_variants_again(tmp_path: Path) -> None:
    """Variants within the given distance of the best get further seeds, when all variants have a result."""
    plan = two_stages(again=SecondLook(seeds=[5, 6], within=10))
    ablation = Ablation(plan, tmp_path / "results.jsonl")
    screen = ablation.stage("screen")
    first = ablation.first_runs_of(screen)
    assert [(run.seed, run.variant) for run in first] == [(seed, variant) for seed in (0, 1) for variant in "abc"]
    for run, knn in zip(first, (60, 69, 50, 62, 73, 50), strict=True):
        assert ablation.runs_of(screen) == first
        ablation.record(run, row_of(knn, knn))
    further = ablation.runs_of(screen)[6:]
    assert [(run.seed, run.variant) for run in further] == [(5, "a"), (5, "b"), (6, "a"), (6, "b")], "61, 71 and 50"
    for run in further:
        ablation.record(run, row_of(80 if run.variant == "a" else 10, 50))
    assert ablation.runs_of(screen)[6:] == further and ablation.best_variant(screen) == "a"
    for run in further:
        ablation.record(run, row_of(0, 0))
    assert ablation.best_variant(screen) == "b", "c has a higher mean, but had no second look"
    table = markdown_tables(ablation)
    assert "| 0, 1, 5, 6 |" in table and "| 0, 1 |" in table
    # Over the seeds that both have, b is 10 above a (and 0 against 0 in the second look), c 11 below a.
    assert "| +5.0 (tie) |" in table and "| -11.0" in table, table
    plain = Ablation(two_stages(), ablation.path)
    assert len(plain.complete_rows(plain.stage("screen"))) == 3, "results without a second look stay valid"
    ablation.record(first[1], {"complete": False, "failed": "out of memory"})
    ablation.record(first[4], {"complete": False, "failed": "out of memory"})
    assert [run.variant for run in ablation.runs_of(screen)[6:]] == ["a", "a"], "a variant that failed has no score"


def test_results_stay_valid_when_the_schema_gets_a_key(tmp_path: Path) -> None:
    """A result whose config lacks a key counts if the run has the key's default. Another value makes it invalid."""
    ablation = Ablation(two_stages(), tmp_path / "results.jsonl")
    screen = ablation.stage("screen")
    run = ablation.runs_of(screen)[0]
    for lacking, expected in ((", latent_dim: 64", False), ("stem: small, ", True)):
        text = run.config.to_yaml()
        assert text.count(lacking) == 1
        ablation.record(run, row_of(1, 2, config=text.replace(lacking, "")) | {"digest": "of an older version"})
        assert (ablation.row_of(run) is not None) == expected


def test_a_variant_that_does_not_go_with_the_best_is_a_stage_that_fails(tmp_path: Path) -> None:
    """If a variant cannot be combined with the best variant of the base stage, its stage fails and has no table."""
    deep = Stage(name="deep", epochs=1, variants={"a": ["decoder.channel_mult=[1,2,2]"]})
    odd = Stage(name="odd", epochs=1, base="deep", variants={"b": ["data.image_size=10"]})
    plan = Plan(config=str(ROOT / "config" / "digits.yaml"), stages=[deep, odd])
    ablation = Ablation(plan, tmp_path / "results.jsonl")
    ablation.record(ablation.runs_of(deep)[0], row_of(1, 1))
    with pytest.raises(ConfigError, match="cannot be halved 2 times"):
        ablation.runs_of(odd)
    assert "**deep**" in markdown_tables(ablation) and "odd" not in markdown_tables(ablation)
    driver = ablate.Driver(plan, tmp_path, float("inf"), None)
    assert driver.run_stages() and driver.failed == ["odd"]


def test_results_survive_damage(ablation: Ablation) -> None:
    content = ablation.path.read_bytes()
    ablation.path.write_bytes(content[:-30])
    again = Ablation(two_stages(), ablation.path)
    runs = again.runs_of(again.stage("screen"))
    assert [run.name for run in runs if again.row_of(run)] == [run.name for run in runs[:5]]
    again.record(runs[5], row_of(5, 6))
    with open(ablation.path, "ab") as file:
        file.write(b'{"run": "screen-a-0"}\n\xff\xfe\n[]\n3\n')
    last = Ablation(two_stages(), ablation.path)
    assert all(last.row_of(run) for run in runs) and len(ablation.path.read_bytes().split(b"\n")) == 12


def test_ties_are_at_most_two_deviations_apart() -> None:
    groups = [[1.0, 3.0], [10.0], [5.0, 5.0, 8.0]]
    expected = np.sqrt((np.var([1, 3], ddof=1) + 2 * np.var([5, 5, 8], ddof=1)) / 3)
    assert pooled_deviation(groups) == pytest.approx(expected) and pooled_deviation([[1.0], [2.0]]) is None
    assert verdict(-1.9, 1.0) == "-1.9 (tie)" and verdict(2.1, 1.0) == "+2.1" and verdict(0.0, 0.0) == "+0.0 (tie)"
    assert verdict(2.1, None) == "+2.1 (one seed)"


def test_the_table_says_what_the_results_say(tmp_path: Path) -> None:
    ablation = Ablation(two_stages(), tmp_path / "results.jsonl")
    for run, knn in zip(ablation.runs_of(ablation.stage("screen")), (60, 61, 80, 62, 63, 84), strict=True):
        ablation.record(run, row_of(knn, knn - 1))
    (then,) = ablation.runs_of(ablation.stage("then"))
    ablation.record(then, row_of(30, 20, complete=False))
    lines = markdown_tables(ablation).splitlines()
    assert lines[0] == "**screen** (data; a machine, torch.float32)"
    cells = {line.split(" |")[0].strip("| "): line for line in lines[2:] if line.startswith("|")}
    deviation = statistics.stdev([60, 62])
    assert f"| 61.0 ± {deviation:.1f} | 60.0 ± {deviation:.1f} | 60.5 ± {deviation:.1f} |" in cells["a"]
    assert "| 0, 1 | 1,000 | 1.21 | 1.0 | 5 ± 0 |" in cells["a"]
    assert "| +1.0 (tie) |" in cells[f"b: {X1}"] and "| +21.0 |" in cells[f"c: {X1} {Y2}"]
    assert not any(line.startswith("- `") for line in lines), (
        "one variant with or without a setting is not enough for a line"
    )
    assert "- then-d-0 has seen 1,000 images so far: 30.0 / 20.0" in lines
    ablation.record(then, {"complete": False, "failed": "out of memory"})
    assert "- then-d-0 failed: out of memory" in markdown_tables(ablation)
    # The stage `then` has only one seed, so its table uses the standard deviation of the screen: 2 for a single run, so
    # that the difference of two single runs has 2.8.
    ablation.record(then, row_of(30, 20))
    two = ablation.stage("then").model_copy(update={"variants": {"d": [Z3], "f": []}})
    plan = ablation.plan.model_copy(update={"stages": [ablation.stage("screen"), two]})
    ablation = Ablation(plan, ablation.path)
    for gain, expected in ((5, "| +5.0 (tie) |"), (6, "| +6.0 |")):
        ablation.record(ablation.runs_of(two)[1], row_of(30 + gain, 20 + gain))
        assert expected in markdown_tables(ablation)


def test_effects_compare_a_setting_with_the_default(tmp_path: Path) -> None:
    """Known effects are found: the three schedules score 50, 60 and 70, and the crop, a setting of two keys, adds 4."""
    both = ["views.source.crop_scale=[0.2, 1.0]", "views.target.crop_scale=[0.2, 1.0]"]
    schedules = {"linear": 50, "linear_alphas_cumprod": 60, "inverted_cosine": 70}
    variants, truth = {}, {}
    for schedule, level in schedules.items():
        for crop in (False, True):
            name = f"{schedule}_{crop}"
            variants[name] = [f"diffusion.schedule={schedule}"] * (schedule != "linear") + both * crop
            truth[name] = level + 4 * crop
    stage = Stage(name="screen", epochs=1, seeds=[0, 1], variants=variants)
    ablation = Ablation(Plan(config="config/cifar10.yaml", stages=[stage]), tmp_path / "results.jsonl")
    for run in ablation.runs_of(stage):
        noise = 3 * run.seed - 1.5
        ablation.record(run, row_of(truth[run.variant] + noise, truth[run.variant] + noise))
    effects = [line for line in markdown_tables(ablation).splitlines() if line.startswith("- ")]
    assert effects == [
        f"- `{' '.join(both)}`: +4.0, 3 variants against 3 without",
        "- `diffusion.schedule=linear_alphas_cumprod`: +10.0, 2 variants against 2 without",
        "- `diffusion.schedule=inverted_cosine`: +20.0, 2 variants against 2 without",
    ], (
        "no effect may be a tie: the standard deviation is 2.1 for single runs; for a difference of means, 1.2 (six "
        "runs each) or 1.5 (four each)"
    )


def test_parts_of_an_encoder_go_together_again(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2500, 2600), nn.BatchNorm1d(2600))
    write_encoder_parts(module, tmp_path / "run", "seed: 3\n")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"run.pt.part0", "run.pt.part1", "run.yaml"} and max(sizes.values()) < 16e6
    join, checksum, config = (tmp_path / "run.yaml").read_text().splitlines()
    joined = subprocess.run(["sh", "-c", join[2:]], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert joined.stdout == f"{checksum[2:]}  run.pt\n" and config == "seed: 3"
    weights = torch.load(tmp_path / "run.pt", weights_only=True)
    parameters = dict(module.named_parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(weights[name], value.bfloat16() if name in parameters else value), name


def test_the_bundle_checks_the_other_machine_before_the_ablation(tmp_path: Path) -> None:
    """run.sh names what is missing, with status 2, before it starts an ablation. Stand-ins replace the packages."""
    bundle, modules, tools = (tmp_path / name for name in ("bundle", "modules", "tools"))
    for folder in (bundle / "wheels", modules, tools, tmp_path / "code" / "ablations", tmp_path / "data"):
        folder.mkdir(parents=True)
    (tools / "python3").symlink_to(sys.executable)
    (tmp_path / "code" / "ablations" / "ablate.py").write_text("import sys; print(sys.argv[1:])")
    (bundle / "name.txt").write_text("photographs\n")
    shutil.copy(ROOT / "ablations" / "run_bundle.sh", bundle / "run.sh")
    for name in ("code", "data"):
        subprocess.run(["tar", "-czf", bundle / f"{name}.tar.gz", "-C", tmp_path / name, "."], check=True)
    with zipfile.ZipFile(bundle / "wheels" / "packages.whl", "w") as wheel:
        for name in ("pydantic", "ema_pytorch", "tqdm", "filelock"):
            wheel.writestr(f"{name}.py", "")
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(modules)}

    def run(**files: str) -> subprocess.CompletedProcess[str]:
        for name in ("torch", "torchvision", "numpy", "yaml", "scipy"):
            (modules / f"{name}.py").write_text(files.get(name, ""))
        command = ["bash", str(bundle / "run.sh"), "30", str(tmp_path / "out"), "seed=3"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    for name in ("torch", "scipy"):
        missing = run(**{name: "raise ImportError"})
        assert missing.returncode == 2 and "or scipy is missing on this machine" in missing.stderr
    words = run().stdout
    assert "'--minutes', '30'" in words and "'--data', 'photographs'" in words and words.endswith("'seed=3']\n")
    (bundle / "packages" / "filelock.py").write_text("raise ImportError")
    assert "the packages of this bundle do not work with Python" in run().stderr
    made = subprocess.run(["make", "-n", "bundle", "DATA=x"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pydantic filelock" in made.stdout and "--no-deps ema-pytorch tqdm" in made.stdout


def test_variants_are_ranked_by_the_protocols_that_judged_them() -> None:
    row = row_of(10, 20)
    assert accuracies(row) == (10, 20)
    cells = {"k-NN k=20 uniform, unit z, bank: clean": 50.0, "linear L-BFGS, unit z, views: clean": 60.0}
    row["table"] = {name: {"trained": {"top1": top1}} for name, top1 in cells.items()}
    assert accuracies(row) == (50, 60)
