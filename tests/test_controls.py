"""Tests of the controls: the encoder trained by SimCLR or with labels, as variants of an ablation."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ablations import ablate, curves, runner
from ablations.controls import CONTROLS, SimCLR, attach_control, control_step
from ablations.plan import read_plan
from ablations.result_rows import append_row
from config.errors import ConfigError
from tests.conftest import ROOT, TINY_RUN, assert_equal_states, experiment_of
from tests.test_drivers import without_times
from training.state import initial_state
from training.step import training_pixels


def test_nt_xent_is_the_formula_of_the_paper() -> None:
    """The loss is the mean over all views of -log softmax of the similarity with the other view of the same image."""
    torch.manual_seed(0)
    control = SimCLR(6, 10)
    pooled = torch.randn(5, 2, 6)
    unit = F.normalize(control.projection(pooled), dim=2).flatten(0, 1)  # (10, 128)
    similarities = (unit @ unit.T / 0.5).fill_diagonal_(-torch.inf)
    other_view = torch.arange(10) ^ 1
    expected = F.cross_entropy(similarities, other_view)
    assert control.loss(pooled, torch.zeros(5)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_trains_the_encoder_alone(tmp_path: Path, name: str) -> None:
    experiment = experiment_of(tmp_path, "training.epochs=3")
    state = initial_state(experiment)
    control = attach_control(experiment, state, name)
    before = copy.deepcopy(state.soda.state_dict())
    pixels = training_pixels(experiment, 0)
    losses = [control_step(experiment, state, control, pixels).item() for _ in range(40)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5]) and state.step == 40
    for key, value in state.soda.state_dict().items():
        if key.startswith("decoder."):
            assert torch.equal(value, before[key]), key
    assert not torch.equal(state.soda.encoder.conv1.weight, before["encoder.conv1.weight"])
    assert not torch.equal(state.ema.ema_model.encoder.conv1.weight, before["encoder.conv1.weight"])


def test_a_control_skips_a_step_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments and BatchNorm statistics do not change, as in a step of SODA. The step is counted."""
    experiment = experiment_of(tmp_path)
    state = initial_state(experiment)
    control = attach_control(experiment, state, "supervised")
    pixels = training_pixels(experiment, 0)
    control_step(experiment, state, control, pixels)
    before = copy.deepcopy((state.soda.state_dict(), state.optimizer.state_dict()["state"]))
    monkeypatch.setattr(control, "loss", lambda pooled, labels: (pooled * math.nan).sum())
    control_step(experiment, state, control, pixels)
    assert_equal_states((state.soda.state_dict(), state.optimizer.state_dict()["state"]), before)
    assert state.step == 2


IGNORED = [
    ([], ["decoder.dropout=0.5"], "decoder.dropout"),
    ([], ["diffusion.schedule=cosine"], "diffusion.schedule"),
    ([], ["views.num_sources=2"], "views.num_sources"),
    ([], ["training.micro_batch_size=32", "training.compile=true"], "training.micro_batch_size, training.compile"),
    (["training.terms.reconstruction=0.1"], [], "training.terms.reconstruction"),
    (["training.compile=true"], [], "training.compile"),
    ([], ["encoder.frozen=true"], "encoder.frozen"),
    (["decoder.dropout=0.5", "diffusion.schedule=cosine", "training.compile=false"], ["encoder.width=8"], None),
]


@pytest.mark.parametrize(("common", "own", "ignored"), IGNORED)
def test_a_control_refuses_what_it_would_ignore(
    tmp_path: Path, common: list[str], own: list[str], ignored: str | None
) -> None:
    """A plan may set keys of the decoder for its other stages."""
    stage = {"name": "control", "epochs": 1, "control": "supervised", "variants": {"labels": own}}
    path = tmp_path / "plan.yaml"
    path.write_text(
        json.dumps({"config": str(ROOT / "config" / "digits.yaml"), "overrides": common, "stages": [stage]})
    )
    if ignored is None:
        assert read_plan(path, []).stages[0].control == "supervised"
        return
    with pytest.raises(ConfigError) as caught:
        read_plan(path, [])
    assert str(caught.value) == f"{path}, control/labels: the control supervised ignores {ignored}: do not set it"


def test_a_control_of_untrained_features_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program ends with status 2 and one line, and makes no folder."""
    stage = {"name": "control", "epochs": 1, "control": "supervised", "variants": {"labels": []}}
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps({"config": str(ROOT / "config" / "digits.yaml"), "stages": [stage]}))
    with pytest.raises(SystemExit, match="2"):
        ablate.main([str(path), "--out", str(tmp_path / "out"), "evaluation.features=decoder.up.0@20"])
    expected = "the control supervised trains no decoder: set evaluation.features to z or pooled"
    assert capsys.readouterr().err == f"error: {path}, control/labels: {expected}\n"
    assert not (tmp_path / "out").exists()
    experiment = experiment_of(tmp_path, "views.num_sources=2")
    with pytest.raises(ConfigError, match=r"ignores views\.num_sources"):
        attach_control(experiment, initial_state(experiment), "supervised")


@pytest.mark.long
def test_a_plan_with_controls_judges_at_epochs_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Controls are judged each `judge_every` epochs. A run that is stopped has the rows of an uninterrupted one."""
    stage = {"name": "control", "epochs": 3, "judge_every": 1, "control": "supervised", "variants": {"labels": []}}
    plan = {
        "config": str(ROOT / "config" / "digits.yaml"),
        "overrides": [*(o for o in TINY_RUN if not o.startswith("training.epochs")), "evaluation.features=pooled"],
        "judging": "config",
        "stages": [stage],
    }
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(plan))

    def rows(out: str) -> list[dict[str, Any]]:
        lines = (tmp_path / out / "results.jsonl").read_text().splitlines()
        return [without_times(json.loads(line)) for line in lines]

    assert ablate.main([str(path), "--out", str(tmp_path / "whole")]) == 0
    found = rows("whole")
    assert [(row["complete"], row["images"]) for row in found] == [(False, 1408), (False, 2816), (True, 4224)]
    encoder_flops = "0.00"  # 0.6 MFLOP
    assert f"| labels | 0 | 4,224 | {encoder_flops} |" in capsys.readouterr().out

    stop = iter([False] * 7 + [True] * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.Runner, "must_stop", lambda self: next(stop, False))
        patch.setattr(runner.Runner, "has_time_to_start", lambda self: True)
        assert ablate.main([str(path), "--out", str(tmp_path / "broken")]) == 75
    assert "not all stages are done" in capsys.readouterr().out
    assert ablate.main([str(path), "--out", str(tmp_path / "broken")]) == 0
    assert rows("broken")[-1] == found[-1]


def test_curves_and_the_gain_of_a_doubling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Curves are means over seeds. The gain of a curve that is a line in log2(images) is the slope of this line."""
    path = tmp_path / "results.jsonl"
    for seed in (0, 1):
        judged_before = {"k-NN k=3": {"trained": {"top1": 9.0}}, "linear": {"trained": {"top1": 9.0}}}
        identity = {"run": f"run-a-{seed}", "stage": "run", "variant": "a", "seed": seed, "digest": "x"}
        append_row(path, {**identity, "images": 225, "table": judged_before})
        for images in (100, 150, 300, 450):
            knn = 40 + 3 * math.log2(images / 100) + seed
            table = {"k-NN": {"trained": {"top1": knn}}, "linear": {"trained": {"top1": 2 * knn}}}
            append_row(path, {**identity, "images": images, "table": table})
    other = {"run": "run-b-0", "stage": "run", "variant": "b", "seed": 0}
    append_row(path, {**other, "digest": "earlier config", "images": 4, "table": table})
    append_row(path, {**other, "digest": "x", "images": 9, "table": table})
    append_row(path, {**other, "digest": "x", "images": 18, "table": {"classifier": {"EMA": {"top1": 1.0}}}})
    untrained = {name: {"untrained": {"top1": 9.0}} for name in table}
    append_row(path, {"run": "floors-8-0", "digest": "", "images": 0, "table": untrained})
    assert curves.main([str(path), "--out", str(tmp_path / "curves.svg")]) == 0
    assert f"| run, a | 450 | {40.5 + 3 * math.log2(4.5):.1f} | {81 + 6 * math.log2(4.5):.1f} | +3.0 / +6.0 |" in (
        capsys.readouterr().out
    )
    assert "run, b" not in (tmp_path / "curves.svg").read_text()
    assert curves.gain_of_last_doubling({100: (1.0, 1.0), 150: (2.0, 2.0)}) is None
    with pytest.raises(SystemExit, match="2"):
        curves.main([str(tmp_path / "none"), "--out", str(tmp_path / "curves.svg")])
    assert "there is no file" in capsys.readouterr().err
