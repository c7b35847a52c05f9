"""Tests of train.py and test.py, called in this process: files of a run, resuming, and refused commands."""

import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import Conv2d
from torch.nn.modules.module import register_module_forward_hook

import test as judge_program
import train as train_program
from ablations.trial import Trial
from config.keys import result_digest
from config.reading import load_config
from datasets import cache
from datasets.decoding import AHEAD
from datasets.folder_layouts import list_folder
from datasets.images import DatasetError
from evaluation.codec import Codec
from experiment.trained import open_trained, read_trained
from tests.conftest import (
    ROOT,
    TWO_PROCESSES,
    assert_equal_states,
    digits_args,
    experiment_of,
    last,
    wait_for,
    write_images,
)
from training import loop
from utils.cli import read_config
from utils.run_folder import folder as folder_module
from utils.run_folder.results import STARTING_FILES, is_of_experiment, read_results, write_results
from utils.run_folder.run_log import RunLog

STEPS_PER_EPOCH = 1437 // 64


def reports(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Returns the reports of one kind, in order."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


TWO_EPOCHS = ("training.epochs=2", "evaluation.every=1", "training.keep_every=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run: two epochs on digits, evaluated after each epoch."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train_program.main(digits_args(folder, *TWO_EPOCHS)) == 0
    return folder


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    names = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file() and "tensorboard" not in str(p)}
    assert names == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "results.json",
        "logs/rank_0.log",
        "checkpoints/SHA256SUMS",
        "checkpoints/last.pt",
        "checkpoints/previous.pt",
        "checkpoints/epoch_0001.pt",
        "checkpoints/epoch_0002.pt",
        "samples/epoch_0001.png",
        "samples/epoch_0002.png",
    }
    assert load_config(finished / "config.yaml").training.epochs == 2
    steps = [report["step"] for report in reports(finished, "train")]
    assert steps == [*range(5, 2 * STEPS_PER_EPOCH + 1, 5), 2 * STEPS_PER_EPOCH]
    for report in reports(finished, "train"):
        assert report["loss"] > 0 and report["images_per_s"] > 0 and report["grad_norm"] > 0
        assert report["lr/encoder"] == report["lr/decoder"] == 2e-3
    assert [report["epoch"] for report in reports(finished, "evaluation")] == [1, 2]
    assert reports(finished, "evaluation")[0]["knn"] == "k-NN k=20 uniform, unit z, bank: clean"
    results = json.loads((finished / "results.json").read_text())["table"]
    assert [name.split()[0] for name in results] == ["k-NN", "linear"]
    for cells in results.values():
        assert list(cells) == ["trained", "untrained", "raw pixels"]
        assert all(0 <= cell["top1"] <= cell["top3"] <= 100 for cell in cells.values())
    assert next(iter(results.values()))["raw pixels"]["top1"] > 95


def test_each_evaluation_reports_the_spectrum_of_the_latents(finished: Path) -> None:
    """Rank and spectrum are those of numpy, for the test latents of the kept checkpoint of each evaluation."""
    events = EventAccumulator(str(finished / "tensorboard"), {"histograms": 0})
    events.Reload()
    shown = events.Scalars("at_a_glance/effective_rank")
    histograms = events.Histograms("evaluation/log10_spectrum")
    evaluations = reports(finished, "evaluation")
    assert (
        [event.step for event in shown]
        == [event.step for event in histograms]
        == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    )
    for epoch, report, scalar, histogram in zip((1, 2), evaluations, shown, histograms, strict=True):
        trained = read_trained(None, finished / "checkpoints" / f"epoch_{epoch:04d}.pt", ["device=cpu"])
        z = Codec(*open_trained(trained), seed=0).test_z.double().numpy()
        assert z.shape == (360, 8)
        np.testing.assert_allclose(report["spectrum"], np.linalg.eigvalsh(np.cov(z.T, bias=True))[::-1], rtol=1e-6)
        sigma = np.linalg.svd(z, compute_uv=False)
        assert report["effective_rank"] == pytest.approx(np.exp(entropy(sigma)), rel=1e-5)
        assert scalar.value == pytest.approx(report["effective_rank"])
        assert histogram.histogram_value.num == 8
        assert histogram.histogram_value.max == pytest.approx(np.log10(report["spectrum"][0]))
    assert evaluations[0]["spectrum"] != evaluations[1]["spectrum"]


def test_the_sample_grid_shows_three_rows(finished: Path) -> None:
    grid = np.asarray(Image.open(finished / "samples" / "epoch_0002.png")).astype(int)
    assert grid.shape == (3 * 66 + 2, 4 * 66 + 2, 3)  # 4 images of 8 px, enlarged 8 times, 2 px apart
    source, sample, target = (grid[2 + 66 * row : 66 * (row + 1), 2:] for row in range(3))
    before = np.asarray(Image.open(finished / "samples" / "epoch_0001.png")).astype(int)
    assert (before[:66] == grid[:66]).all() and (before[134:] == grid[134:]).all(), "the views differ between grids"
    assert (before[68:134] != grid[68:134]).any() and (sample != target).any() and (source != target).any()


def test_tensorboard_shows_what_metrics_jsonl_says(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    expected = {"at_a_glance/loss", "at_a_glance/lr_encoder", "at_a_glance/images_per_s", "at_a_glance/hours_left"}
    expected |= {"train/grad_norm", "train/ema_decay", "seconds/views", "evaluation/knn_top1", "evaluation/probe_top3"}
    assert (
        expected <= set(tags["scalars"])
        and tags["images"] == ["at_a_glance/samples"]
        and "config/text_summary" in tags["tensors"]
    )
    shown = [(event.step, event.value) for event in events.Scalars("at_a_glance/loss")]
    assert shown == [(r["step"], pytest.approx(r["loss"])) for r in reports(finished, "train")]


def test_a_finished_run_says_so(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = (finished / "metrics.jsonl").read_text()
    caplog.set_level("INFO")
    assert train_program.main(digits_args(finished, *TWO_EPOCHS)) == 0
    assert "finished: all 2 epochs are done, and images are not compared again" in caplog.text
    assert "to train longer, raise training.epochs" in caplog.text
    printed = capsys.readouterr().out
    assert "raw pixels" in printed and "checkpoints/last.pt" in printed and "nearly solve digits" in printed
    assert (finished / "metrics.jsonl").read_text() == before
    run, cooling = tmp_path / "cooled", [*TWO_EPOCHS, "optimizer.cooldown_epochs=1"]
    for _ in range(2):
        assert train_program.main(digits_args(run, *cooling)) == 0
    assert "choose another output_dir: optimizer.cooldown_epochs=1 fixes the last epoch" in caplog.text


def test_another_experiment_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit, match="2"):
        train_program.main(digits_args(finished, "training.epochs=2", "encoder.width=8", "seed=1"))
    message = capsys.readouterr().err
    assert "encoder.width was 4 and is 8" in message and "seed was 0 and is 1" in message
    with pytest.raises(SystemExit, match="2"):
        train_program.main(digits_args(finished, "training.epochs=1"))
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_a_checkpoint_is_judged_by_all_protocols_beside_the_baselines(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge_program.main(digits_args(finished, "--checkpoint", str(finished / "checkpoints" / "last.pt"))) == 0
    lines = capsys.readouterr().out.splitlines()
    reference = [line for line in lines if "(the reference's)" in line]
    assert len(reference) == 2 and all(
        ": crop 0.08-1 ratio 0.75-1.33333 flip 0.5 (p=0.65)" in line for line in reference
    )
    assert any("views: affine 10 deg 0.1 x0.9-1.1 shear 5 (p=1)" in line for line in lines), (
        "the config's own probe is missing"
    )
    ours = next(line for line in lines if line.startswith("k-NN k=20 uniform, unit z, bank: clean"))
    results = json.loads((finished / "results.json").read_text())["table"]
    cells = results["k-NN k=20 uniform, unit z, bank: clean"]
    for name in ("trained", "untrained", "raw pixels"):
        assert f"{cells[name]['top1']:.1f} / {cells[name]['top3']:.1f}" in ours

    with pytest.raises(SystemExit, match="2"):
        judge_program.main(digits_args(finished, "encoder.width=8"))
    assert "add encoder.width=4" in capsys.readouterr().err


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = digits_args(tmp_path / "run", "training.epochs=2", "evaluation.every=1", "training.checkpoint_every=4 steps")
    step = loop.train_step

    for stop_at in (9, 30):

        def interrupted(experiment: Any, state: Any, *rest: Any, stop_at: int = stop_at) -> Any:
            if state.step == stop_at:
                raise KeyboardInterrupt
            return step(experiment, state, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train_program.main(args)
        assert last(tmp_path / "run")["step"] == stop_at // 4 * 4
    assert train_program.main(args) == 0

    resumed, whole = last(tmp_path / "run"), last(finished)
    for part in ("model", "ema", "optimizer", "step"):
        assert_equal_states(resumed[part], whole[part], part)
    for kind in ("train", "evaluation"):
        steps = [report["step"] for report in reports(tmp_path / "run", kind)]
        assert steps == [report["step"] for report in reports(finished, kind)], "no report may be missing or repeated"
    assert reports(tmp_path / "run", "evaluation") == reports(finished, "evaluation")
    tables = [json.loads((run / "results.json").read_text())["table"] for run in (tmp_path / "run", finished)]
    assert tables[0] == tables[1]


def test_epochs_may_change_until_the_cool_down(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Until then, the run is that of the new number of epochs, bit for bit."""
    caplog.set_level("INFO")
    cooling = ("optimizer.cooldown_epochs=0.5", "training.checkpoint_every=4 steps", "sampling.num_images=0")
    shortened, whole = tmp_path / "shortened", tmp_path / "whole"
    step = loop.train_step

    def interrupted(experiment: Any, state: Any, *rest: Any) -> Any:
        if state.step == 30:
            raise KeyboardInterrupt
        return step(experiment, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_program.main(digits_args(shortened, *cooling, "training.epochs=9"))
    assert train_program.main(digits_args(shortened, *cooling, "training.epochs=2")) == 0  # from step 28; cools from 33
    assert "training.epochs was 9 and is now 2" in caplog.text
    assert train_program.main(digits_args(whole, *cooling, "training.epochs=2")) == 0
    for part in ("model", "ema", "optimizer", "step"):
        assert_equal_states(last(shortened)[part], last(whole)[part], part)
    for epochs in (1, 3):
        with pytest.raises(SystemExit, match="2"):
            train_program.main(digits_args(whole, *cooling, f"training.epochs={epochs}"))
        told = f"changed to {epochs} only in its first {min(epochs, 2) - 0.5:g} epochs, before the cool-down: restore"
        assert told in capsys.readouterr().err
    assert load_config(whole / "config.yaml").training.epochs == 2


def test_more_epochs_go_on_and_a_killed_evaluation_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An interrupted evaluation runs again when the run resumes. More epochs continue a finished run."""
    caplog.set_level("INFO")

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.evaluating.judge", killed)
        with pytest.raises(KeyboardInterrupt):
            train_program.main(digits_args(tmp_path))
    assert last(tmp_path)["step"] == STEPS_PER_EPOCH and not (tmp_path / "results.json").exists()
    assert train_program.main(digits_args(tmp_path)) == 0
    assert len(reports(tmp_path, "evaluation")) == 1 and (tmp_path / "results.json").exists()

    caplog.clear()
    assert train_program.main(digits_args(tmp_path, "training.epochs=2", "training.log_every=11")) == 0
    assert "training.log_every was 5 and is now 11" in caplog.text
    assert last(tmp_path)["step"] == 2 * STEPS_PER_EPOCH
    assert [report["epoch"] for report in reports(tmp_path, "evaluation")] == [1, 2]


def test_the_table_is_made_again_where_it_is_missing(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "results.json").unlink()
    assert train_program.main(digits_args(folder, *TWO_EPOCHS)) == 0
    assert (folder / "results.json").read_text() == (finished / "results.json").read_text()
    assert reports(folder, "evaluation") == reports(finished, "evaluation")


def test_damaged_reports_are_passed_over(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "results.json").write_text('{"epochs": ')
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines[:3], '{"kind": "train", "st\n', "7\n", *lines[3:], '{"ki']))
    assert train_program.main(digits_args(folder, *TWO_EPOCHS)) == 0
    assert (folder / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
    assert (folder / "results.json").read_text() == (finished / "results.json").read_text()


def test_a_finished_run_is_judged_anew_where_the_protocol_changed(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    measure = digits_args(folder, *TWO_EPOCHS, "--measures")
    assert judge_program.main([*measure, "uniformity"]) == 0
    assert train_program.main(digits_args(folder, *TWO_EPOCHS, "evaluation.knn.k=3")) == 0
    found = json.loads((folder / "results.json").read_text())
    assert "k-NN k=3 uniform, unit z, bank: clean" in found["table"] and list(found["measures"]) == ["uniformity"]
    assert last(folder)["step"] == 2 * STEPS_PER_EPOCH

    # The measures are of the same model, so they are kept, and others are added. Those of other images are not kept.
    assert judge_program.main([*measure, "few_labels"]) == 0
    again = json.loads((folder / "results.json").read_text())
    assert again == found | {"measures": again["measures"]} and list(again["measures"]) == ["uniformity", "few_labels"]
    _, path, *overrides = digits_args(folder, *TWO_EPOCHS)
    config = load_config(path, overrides)
    for images, kept in ((found["images"], True), ([found["images"][0], "other test images"], False)):
        write_results(folder, config, 2 * STEPS_PER_EPOCH, images, table={})
        assert ("measures" in read_results(folder)) == kept
    without = {key: value for key, value in again.items() if key not in ("experiment_digest", "images")}
    assert is_of_experiment(
        without | {"config_digest": result_digest(config, without=STARTING_FILES)}, config, 2 * STEPS_PER_EPOCH
    )


def test_a_trial_of_an_ablation_trains_and_judges_as_train_does(finished: Path) -> None:
    _, path, *overrides = digits_args(finished, *TWO_EPOCHS)
    trial = Trial(load_config(path, overrides), None, judging="config")
    trial.train(lambda: False)
    table = json.loads((finished / "results.json").read_text())["table"]
    found = trial.judged()["table"]
    assert found == {protocol: {"trained": cells["trained"]} for protocol, cells in table.items()}


def test_seed_diffusion_and_views_are_those_of_the_checkpoint(finished: Path) -> None:
    changes = ["seed=9", "diffusion.schedule=cosine", "views.source.noise_std=0.9", "evaluation.knn.k=7"]
    trained = read_trained(None, finished / "checkpoints" / "last.pt", changes)
    for name in ("seed", "diffusion", "views"):
        assert getattr(trained.config, name) == getattr(trained.trained_with, name)
    assert trained.config.seed == 0 and trained.config.evaluation.knn.k == 7


def test_what_does_not_matter_to_the_table_leaves_a_finished_run_finished(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A finished run is not evaluated again if only keys change that do not affect the table of accuracies."""
    caplog.set_level("INFO")
    before = (finished / "results.json").read_bytes()
    assert train_program.main(digits_args(finished, *TWO_EPOCHS, "training.log_every=7", "data.cache_dir=else")) == 0
    assert "finished: all 2 epochs are done" in caplog.text and (finished / "results.json").read_bytes() == before


def test_a_folder_of_another_run_is_refused_even_without_a_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(folder / "checkpoints")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("services: {web: {image: nginx}}")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.yaml").write_text("- nginx")
    for run, args, expected in (
        (folder, (*TWO_EPOCHS, "seed=5"), "seed was 0 and is 5"),
        (tmp_path / "other", TWO_EPOCHS, "was not written by this program"),
        (tmp_path / "list", TWO_EPOCHS, "was not written by this program"),
    ):
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        with pytest.raises(SystemExit, match="2"):
            train_program.main(digits_args(run, *args))
        assert expected in capsys.readouterr().err
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["tensorboard", "checkpoints", "samples", "metrics.jsonl", "results.json"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).mkdir() if "." in name else (tmp_path / name).write_text("")
    with pytest.raises(SystemExit, match="2"):
        train_program.main(digits_args(tmp_path))
    assert "output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "checkpoints", "samples"])
def test_a_folder_inside_that_cannot_be_written_is_noticed_before_training(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    config = (folder / "config.yaml").read_bytes()
    make = folder_module.TemporaryFile

    def refuse(dir: Path) -> Any:  # simulated, because root may write in spite of permissions
        if dir == folder / name:
            raise PermissionError(13, "Permission denied", str(dir))
        return make(dir=dir)

    monkeypatch.setattr(folder_module, "TemporaryFile", refuse)
    with pytest.raises(SystemExit, match="2"):
        train_program.main(digits_args(folder, *TWO_EPOCHS[1:], "training.epochs=3"))
    assert "cannot write to output_dir" in capsys.readouterr().err
    assert (folder / "config.yaml").read_bytes() == config


def test_images_without_labels_have_a_spectrum(tmp_path: Path) -> None:
    """Without labels, each evaluation reports the spectrum of the training latents."""
    images = [
        "data.name=folder",
        f"data.root={write_images(tmp_path / 'images', 0, flat=70)}",
        f"data.cache_dir={tmp_path}",
    ]
    assert train_program.main(digits_args(tmp_path / "run", *images, *TWO_EPOCHS)) == 0
    evaluations = reports(tmp_path / "run", "evaluation")
    assert [report["step"] for report in evaluations] == [1, 2]
    for report in evaluations:
        assert report.keys() == {"kind", "step", "epoch", "effective_rank", "alignment", "uniformity", "spectrum"}
        assert 1 <= report["effective_rank"] <= 8 and len(report["spectrum"]) == 8 and min(report["spectrum"]) >= 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"histograms": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("at_a_glance/effective_rank")] == [1, 2]
    assert [event.step for event in events.Histograms("evaluation/log10_spectrum")] == [1, 2]


def test_other_images_are_not_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["data.name=folder", f"data.cache_dir={tmp_path / 'cache'}"]
    first, second = write_images(tmp_path / "first", 0, flat=70), write_images(tmp_path / "second", 1, flat=70)
    assert train_program.main(digits_args(tmp_path / "run", *folder, f"data.root={first}")) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for epochs in (1, 2):
        with pytest.raises(SystemExit, match="2"):
            train_program.main(
                digits_args(tmp_path / "run", *folder, f"data.root={second}", f"training.epochs={epochs}")
            )
        assert "holds other images than" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    first.rename(tmp_path / "moved")
    moved = f"data.root={tmp_path / 'moved'}"
    assert train_program.main(digits_args(tmp_path / "run", *folder, moved, "training.epochs=2")) == 0


def test_a_checkpoint_that_does_not_fit_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "results.json").unlink()
    state = last(folder)
    del state["model"]["encoder.fc.weight"]
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    torch.save(state, folder / "checkpoints" / "last.pt")
    for program in (train_program, judge_program):
        with pytest.raises(SystemExit, match="2"):
            program.main(digits_args(folder, *TWO_EPOCHS))
        message = capsys.readouterr().err
        assert "encoder.fc.weight" in message and "error: the checkpoint does not fit" in message.splitlines()[-1]


def test_reports_are_json_whatever_the_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Values that are not finite are None in the JSON line. A histogram of such values is left out, without error."""
    with RunLog(tmp_path, 0) as log:
        log.histogram("spectrum", 1, torch.tensor([1.0, float("nan")]))
        log.report("train", 1, {"loss": float("nan"), "lr": 0.5}, spectrum=[1.0, float("inf")])
    assert not caplog.text
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail) == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "lr": 0.5,
        "spectrum": [1.0, None],
    }


def test_a_kept_checkpoint_is_also_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.evaluating.judge", killed)
    with pytest.raises(KeyboardInterrupt):
        train_program.main(digits_args(tmp_path, *TWO_EPOCHS))
    assert last(tmp_path)["step"] == STEPS_PER_EPOCH


def test_mixed_precision_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.device._cpu_computes_bf16", lambda: True)  # a CPU that does not compute bf16 emulates it
    dtypes: set[tuple[bool, torch.dtype]] = set()
    hook = register_module_forward_hook(
        lambda module, args, out: dtypes.add((module.training, out.dtype)) if isinstance(module, Conv2d) else None
    )
    # Emulated bf16 is slow, so there are few images, and the probe trains for one epoch, on clean images.
    write_images(tmp_path / "images", train_a=64, train_b=64, test_a=8, test_b=8)
    data = ("data.name=folder", f"data.root={tmp_path / 'images'}", f"data.cache_dir={tmp_path / 'cache'}")
    probe = ("evaluation.probe.epochs=1", "evaluation.probe.transform=clean", "evaluation.probe.batch_size=64")
    args = digits_args(tmp_path / "run", "--use_amp", "training.epochs=8", "evaluation.every=8", *data, *probe)
    with hook:
        assert train_program.main(args) == 0
    # Training and evaluation use bf16. Only the passes that settle the untrained encoder's statistics use float32.
    assert {(True, torch.bfloat16), (False, torch.bfloat16)} <= dtypes and (False, torch.float32) not in dtypes
    assert reports(tmp_path / "run", "train")[-1]["loss"] < 0.97
    assert train_program.main([*args, "training.epochs=9"]) == 0
    assert last(tmp_path / "run")["step"] == 18
    assert all(value.dtype != torch.bfloat16 for value in last(tmp_path / "run")["model"].values())


def test_unlabelled_images_train_without_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = [
        f"data.root={write_images(tmp_path / 'flat', 0, flat=70)}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.name=folder",
    ]
    caplog.set_level("INFO")
    assert train_program.main(digits_args(tmp_path / "run", *folder)) == 0
    assert "k-NN and linear probe are skipped" in caplog.text
    grid = tmp_path / "run/samples/epoch_0001.png"
    assert f"sample grid  {grid}\n" in capsys.readouterr().out and grid.exists()
    # The last grid is that of an epoch, also beside those of early steps.
    (tmp_path / "run/samples/step_000100.png").touch()
    assert train_program.main(digits_args(tmp_path / "run", *folder)) == 0
    assert f"sample grid  {grid}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        judge_program.main(digits_args(tmp_path / "run", *folder))
    assert "has no test images with labels: set data.root to" in capsys.readouterr().err


def test_use_amp_is_an_override(tmp_path: Path) -> None:
    import argparse

    args = argparse.Namespace(config=digits_args(tmp_path)[1], use_amp=True, overrides=["training.epochs=3"])
    config = read_config(args)
    assert config.training.use_amp and config.training.epochs == 3


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Folder with 200 training and 50 test images of two classes.

    The images of both classes are noisy vertical brightness ramps. Those of the second class are upside down.
    """
    generator = np.random.default_rng(0)
    for split, count in (("train", 100), ("test", 25)):
        for name, slope in (("up", 1), ("down", -1)):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for index in range(count):
                ramp = np.linspace(60, 180, 8)[::slope, None, None] + generator.normal(0, 30, (8, 8, 3))
                path = tmp_path / "pictures" / split / name / f"{index}.png"
                Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.mark.long
def test_a_run_on_streamed_images_is_the_one_on_stored_images(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training on streamed images ends with the same state as training on stored images.

    During the streamed run all training files are damaged, and the run ends with an error. Once the files are restored,
    the run resumes.
    """

    def args(name: str, stream: str) -> list[str]:
        data = ["data.name=folder", f"data.root={pictures}", f"data.cache_dir={tmp_path / name}", "data.num_workers=2"]
        settings = ["training.epochs=8", "training.micro_batch_size=32", "training.checkpoint_every=4 steps"]
        return digits_args(tmp_path / "runs" / name, *data, *settings, f"data.stream={stream}")

    assert train_program.main(args("stored", "false")) == 0

    step, good, bad_at = loop.train_step, {path: path.read_bytes() for path in pictures.glob("train/*/*")}, 9
    fingerprint = {name: cache._fingerprint(list_folder(pictures)[name == "test"]) for name in ("train", "test")}  # type: ignore[arg-type]

    def sabotaged(experiment: Any, state: Any, *rest: Any) -> Any:
        if state.step == bad_at:
            for path in good:
                path.write_bytes(good[path][:50])
        return step(experiment, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", sabotaged)
        with pytest.raises(DatasetError) as failure:
            train_program.main(args("streamed", "true"))
    error = str(failure.value)
    assert error.startswith("cannot read the image")
    assert error.endswith("restore the original file and run the command again")
    stopped_at = last(tmp_path / "runs" / "streamed")["step"]
    assert bad_at <= stopped_at <= bad_at + AHEAD + 1, "steps whose images had been read must be done and saved"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    with monkeypatch.context() as patch, pytest.raises(DatasetError, match="cannot read the image"):
        # The evaluation finds the damaged files as well. The old fingerprints keep the cache from finding them first.
        patch.setattr(cache, "_fingerprint", lambda listing: fingerprint[listing.root.name])
        judge_program.main(args("streamed", "true"))

    for path, content in good.items():
        path.write_bytes(content)
    assert train_program.main(args("streamed", "true")) == 0
    stored, streamed = (last(tmp_path / "runs" / name) for name in ("stored", "streamed"))
    for part in ("model", "ema", "optimizer", "step", "data"):
        assert_equal_states(streamed[part], stored[part], part)
    assert reports(tmp_path / "runs" / "streamed", "evaluation") == reports(tmp_path / "runs" / "stored", "evaluation")
    assert not list((tmp_path / "streamed").glob("*.npy")) and len(list((tmp_path / "stored").glob("*.npy"))) == 2


@pytest.mark.long
def test_two_processes_end_at_once_when_one_cannot_read_an_image(pictures: Path, tmp_path: Path) -> None:
    """Both ranks end immediately if one cannot read an image, even if the other is waiting in a collective."""
    data = ["data.name=folder", f"data.root={pictures}", f"data.cache_dir={tmp_path / 'cache'}", "data.stream=true"]
    args = digits_args(tmp_path / "run", *data, "training.epochs=10000", "training.log_every=1")
    command = [sys.executable, *TWO_PROCESSES, "train.py", *args]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        try:
            metrics = tmp_path / "run" / "metrics.jsonl"
            wait_for(lambda: metrics.exists() and len(reports(tmp_path / "run", "train")) > 5)
            for path in pictures.glob("train/*/*"):
                path.unlink()
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 1, "torchrun itself exits with status 1"
    assert re.search(r"^error: cannot read the image .* restore the original file", said, re.MULTILINE)


def test_a_channel_that_is_constant_in_all_images_is_normalised_to_zero(tmp_path: Path) -> None:
    """Microscopes store images as RGB with an empty blue channel. Its standard deviation is 0."""
    root = write_images(tmp_path / "images", train_a=40, train_b=40, test_a=4, test_b=4)
    for path in root.rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) * np.array([1, 1, 0], dtype=np.uint8)).save(path)
    experiment = experiment_of(tmp_path, "data.name=folder", f"data.root={root}", f"data.cache_dir={tmp_path}")
    views = experiment.views.evaluation(experiment.train.pixels)
    assert views.isfinite().all() and views[:, 2].abs().max() < 1e-6
    assert views[:, :2].std() == pytest.approx(1, abs=1e-3)
