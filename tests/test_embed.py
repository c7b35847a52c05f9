"""Tests of features from embed.py, from Python, and from exported encoders, which run without this repository."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from sklearn.neighbors import NearestNeighbors

import embed as embed_program
import sample as sample_program
import test as judge_program
import train as train_program
from analysis.image_encoder import load_encoder
from analysis.programs import FORMATS
from config.keys import all_keys, flat
from config.reading import override, parse_config
from datasets.decoding import decode
from evaluation.knn import nearest_neighbours
from experiment.trained import open_trained, read_trained
from tests.conftest import digits_args, experiment_of, write_images


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a model trained on digits."""
    run = tmp_path_factory.mktemp("embed") / "runs" / "digits"
    assert train_program.main(digits_args(run, "sampling.num_images=0")) == 0
    return run


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> Path:
    """Last checkpoint of the run."""
    return run / "checkpoints" / "last.pt"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for another data set, which has fewer training images than a batch of the run."""
    place = tmp_path_factory.mktemp("few")
    write_images(place / "few", train_a=6, train_b=6, test_a=2, test_b=2)
    return ["data.name=folder", f"data.root={place / 'few'}", f"data.cache_dir={place / 'cache'}", "device=cpu"]


def as_evaluated(checkpoint: Path, pixels: torch.Tensor) -> dict[str, np.ndarray]:
    """Returns the features of images, computed by the evaluation's own code."""
    experiment, soda = open_trained(read_trained(None, checkpoint, ["device=cpu"]))
    with torch.no_grad():
        found = soda.encoder.features(experiment.views.evaluation(pixels))
    return {name: values.numpy() for name, values in found.items()}


def test_features_of_a_split_are_those_of_the_evaluation(
    run: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = experiment_of(tmp_path)
    assert experiment.test is not None
    for out in (None, tmp_path / "test.safetensors"):
        options = [] if out is None else ["--out", str(out)]
        assert embed_program.main(["--checkpoint", str(checkpoint), "--split", "test", "device=cpu", *options]) == 0
        assert capsys.readouterr().out == f"{out or run / 'features' / 'test.npz'}\n"
    expected = as_evaluated(checkpoint, experiment.test.pixels)
    with np.load(run / "features" / "test.npz") as stored, safe_open(tmp_path / "test.safetensors", "np") as tensors:
        notes = tensors.metadata()
        for name in ("z", "pooled"):
            np.testing.assert_allclose(stored[name], expected[name], atol=1e-5)
            np.testing.assert_array_equal(tensors.get_tensor(name), stored[name])
        labels = experiment.test.labels.numpy()
        np.testing.assert_array_equal(stored["labels"], labels)
        np.testing.assert_array_equal(tensors.get_tensor("labels"), labels)
        names = [f"test:{i}" for i in range(360)]
        assert stored["names"].tolist() == json.loads(notes["names"]) == names
        assert stored["classes"].tolist() == json.loads(notes["classes"]) == list("0123456789")
        digest = sha256(checkpoint.read_bytes()).hexdigest()
        assert str(stored["checkpoint"]) == notes["checkpoint"] == digest


def test_features_of_a_folder_and_of_files(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Images are decoded as in the data sets. Sub-folders are classes, also beside a few images."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / "photos" / name for name in ("b/2.png", "b/deep/1.png", "a/9.png")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    pixels = torch.stack([torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) for path in paths])
    expected = as_evaluated(checkpoint, pixels)["z"]

    def embedded(*options: str) -> dict[str, Any]:
        out = tmp_path / "out.npz"
        arguments = ["--checkpoint", str(checkpoint), "device=cpu", "--out", str(out), *options]
        caplog.set_level("INFO")
        assert embed_program.main(arguments) == 0
        return dict(np.load(out))

    found = embedded("--folder", str(tmp_path / "photos"))
    assert found["names"].tolist() == ["a/9.png", "b/2.png", "b/deep/1.png"]
    assert found["labels"].tolist() == [0, 1, 1] and found["classes"].tolist() == ["a", "b"]
    np.testing.assert_allclose(found["z"], expected[[2, 0, 1]], atol=1e-5)

    shutil.copy(paths[0], tmp_path / "photos" / "cover.png")
    found = embedded("--folder", str(tmp_path / "photos"))
    assert found["names"].tolist() == ["a/9.png", "b/2.png", "b/deep/1.png"] and found["labels"].tolist() == [0, 1, 1]
    for name in ("2.png", "3.png"):
        shutil.copy(paths[0], tmp_path / "photos" / name)
    found = embedded("--folder", str(tmp_path / "photos"))
    directly = ["2.png", "3.png", "cover.png"]
    assert (
        found["names"].tolist() == sorted([*directly, "a/9.png", "b/2.png", "b/deep/1.png"]) and "labels" not in found
    )

    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(map(str, paths)))
    found = embedded("--files", f"@{listed}")
    assert found["names"].tolist() == [str(path) for path in paths] and "labels" not in found
    np.testing.assert_allclose(found["z"], expected, atol=1e-5)

    before = (tmp_path / "out.npz").read_bytes()
    paths[1].write_bytes(b"no image")
    paths[2].write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        embedded("--folder", str(tmp_path / "photos"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: cannot read 2 images: {paths[2]} (cannot identify image file")
    assert line.endswith("repair or remove them, or set data.unreadable=skip") and str(paths[1]) in line
    assert (tmp_path / "out.npz").read_bytes() == before

    for name in ("2.png", "3.png"):
        (tmp_path / "photos" / name).unlink()
    found = embedded("--folder", str(tmp_path / "photos"), "data.unreadable=skip")
    assert found["names"].tolist() == ["b/2.png"] and found["labels"].tolist() == [1]
    np.testing.assert_allclose(found["z"], expected[:1], atol=1e-5)
    assert "skipping 2 of the 3 images of the given folder or list" in caplog.text

    deep = tmp_path / "deep.png"
    Image.fromarray(np.asarray(Image.open(paths[0]).convert("L")).astype(np.uint16) * 4).save(deep)  # 10 bits
    Image.open(paths[0]).convert("L").save(tmp_path / "grey.png")
    found = embedded("--files", str(deep), str(tmp_path / "grey.png"))
    np.testing.assert_allclose(found["z"][0], found["z"][1], atol=1e-5)
    assert "read as 10 bits" in caplog.text


def test_an_exported_model_is_a_small_checkpoint(
    run: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds the EMA weights, rounded to bf16, and gives their features. Training cannot resume from it."""
    path = tmp_path / "published" / "model.pt"
    assert embed_program.main(["--checkpoint", str(checkpoint), "--export", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n" and list(path.parent.iterdir()) == [path]
    assert path.stat().st_size < checkpoint.stat().st_size / 4

    saved = torch.load(checkpoint, weights_only=True)
    exported = torch.load(path, weights_only=True)["ema"]["model"]
    assert exported.keys() == saved["ema"]["model"].keys()
    for name, weight in saved["ema"]["model"].items():  # bf16 has 8 significant bits
        torch.testing.assert_close(exported[name].to(weight.dtype), weight, rtol=2**-8, atol=0)
    saved["ema"]["model"] = {name: exported[name].to(value.dtype) for name, value in saved["ema"]["model"].items()}
    torch.save(saved, tmp_path / "rounded.pt")
    pixels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found, rounded, expected = (as_evaluated(each, pixels) for each in (path, tmp_path / "rounded.pt", checkpoint))
    for name in ("z", "pooled"):
        np.testing.assert_array_equal(found[name], rounded[name])
        assert 0 < np.abs(found[name] - expected[name]).max() < 2**-5 * np.abs(expected[name]).max()

    kept = checkpoint.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        embed_program.main(["--checkpoint", str(checkpoint), "--export", str(checkpoint)])
    assert "export to another file" in capsys.readouterr().err and checkpoint.read_bytes() == kept

    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    path.rename(folder / "last.pt")
    with pytest.raises(SystemExit, match="2"):
        train_program.main(digits_args(tmp_path / "run"))
    assert "holds only the EMA model" in capsys.readouterr().err


def test_an_exported_model_keeps_the_experiment_and_nothing_of_the_machine(
    checkpoint: Path, few: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file names no paths, and keeps how the model is sampled and judged. Every command opens it."""
    saved = torch.load(checkpoint, weights_only=True)
    private = [f"{name}={tmp_path}/private" for name in ("output_dir", "data.root", "data.cache_dir", "data.labels")]
    more = ["data.name=folder", "data.num_workers=3", "training.use_amp=true", "diffusion.num_timesteps=50"]
    before = override(parse_config(saved["config"], "the run"), [*private, *more], "the run")
    torch.save(saved | {"config": before.to_yaml()}, tmp_path / "full.pt")
    path = tmp_path / "published" / "model.pt"
    words = ["--checkpoint", str(tmp_path / "full.pt"), "data.num_workers=2", "training.use_amp=false", "device=cpu"]
    words += ["data.name=digits", "data.labels=", "sampling.eta=0.5"]
    assert embed_program.main([*words, "--export", str(path)]) == 0
    text = torch.load(path, weights_only=True)["config"]
    found = flat(parse_config(text, "the export"))
    assert str(tmp_path) not in text and found["training.use_amp"] and found["data.name"] == "digits"
    kept = ("sampling.", "evaluation.", "views.probe.")
    reset = {name: field.default for name, field, run in all_keys() if run and not name.startswith(kept)}
    assert found == flat(before) | reset | {"data.name": "digits", "sampling.eta": 0.5}

    words = ["--checkpoint", str(path), *few]
    assert judge_program.main([*words, "evaluation.knn.k=5"]) == 0
    assert capsys.readouterr().out.count("k-NN k=5") == 1
    assert sample_program.main(["reconstruct", *words, "--num_images", "1"]) == 0
    assert embed_program.main([*words, "--split", "test"]) == 0
    written = [path.parent / "pictures" / "reconstruct.png", path.parent / "features" / "test.npz"]
    assert capsys.readouterr().out == "".join(f"{each}\n" for each in written) and all(map(Path.exists, written))


def test_other_and_fewer_images_than_those_of_the_training(
    checkpoint: Path,
    few: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Fewer images than a batch of the training can be encoded, judged and drawn. No epoch of the run is stated."""
    caplog.set_level("INFO")
    words, root = ["--checkpoint", str(checkpoint), *few], few[1].removeprefix("data.root=")
    assert embed_program.main([*words, "--split", "train", "--out", str(tmp_path / "few.npz")]) == 0
    assert np.load(tmp_path / "few.npz")["z"].shape == (12, 8)
    assert sample_program.main(["nearest", *words, "--num_neighbours", "12", "--out", str(tmp_path / "a.png")]) == 0
    photo = Path(root, "train", "a", "new.png")
    with pytest.raises(SystemExit, match="2"):
        sample_program.main(["nearest", *words, "--num_neighbours", "12", "--out", str(photo)])
    line = f"error: {photo} is in data.root {root}, whose images are trained on: choose another --out\n"
    assert capsys.readouterr().err == line and not photo.exists()
    assert f"the training images in {root} are not the images that the checkpoint was trained on" in caplog.text

    with pytest.raises(SystemExit, match="2"):
        judge_program.main(words)
    line = "error: evaluation.knn.k 20 is more than the 12 training images: lower evaluation.knn.k\n"
    assert capsys.readouterr().err == line
    assert judge_program.main([*words, "evaluation.knn.k=5"]) == 0
    assert "k-NN k=12" in capsys.readouterr().out
    assert f"evaluating the EMA encoder of {Path(*checkpoint.parts[-3:])}, step 22" in caplog.messages
    trained = read_trained(None, checkpoint, ["device=cpu"])
    assert trained.describe(open_trained(trained)[0]).endswith("/last.pt, epoch 1, step 22")


def test_attributes_are_saved_with_the_features(checkpoint: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", flat=4)
    names = sorted(path.name for path in (tmp_path / "photos").iterdir())
    values = [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]
    rows = [f"{name},{','.join(map(str, row))}" for name, row in zip(names, values, strict=True)]
    (tmp_path / "photos" / "list.csv").write_text("\n".join(["name,round,dark,flat", *rows]))
    words = ["--checkpoint", str(checkpoint), "data.name=folder", f"data.root={tmp_path / 'photos'}"]
    words += ["data.labels=list.csv", f"data.cache_dir={tmp_path / 'cache'}", "device=cpu", "--split", "train"]
    for ending in ("npz", "safetensors"):
        assert embed_program.main([*words, "--out", str(tmp_path / f"z.{ending}")]) == 0
    with np.load(tmp_path / "z.npz") as stored, safe_open(tmp_path / "z.safetensors", "np") as tensors:
        assert stored["names"].tolist() == names and "labels" not in stored and "classes" not in stored
        assert stored["attributes"].dtype == np.uint8 and stored["attributes"].tolist() == values
        assert tensors.get_tensor("attributes").tolist() == values
        listed = json.loads(tensors.metadata()["attribute_names"])
        assert stored["attribute_names"].tolist() == listed == ["round", "dark", "flat"]


def test_other_images_are_normalised_as_in_training(checkpoint: Path, tmp_path: Path) -> None:
    """On another data set, the evaluation's features are those of `load_encoder`, which knows only the checkpoint."""
    for name in ("train/a/0", "train/b/0", "test/a/0", "test/b/0"):
        for index in range(40):
            path = tmp_path / "bright" / f"{name}{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (200 + index, 250, 255)).save(path)
    data = ["data.name=folder", f"data.root={tmp_path / 'bright'}", f"data.cache_dir={tmp_path}", "device=cpu"]
    experiment, soda = open_trained(read_trained(None, checkpoint, data))
    (pixels,) = experiment.train.batches([range(5)])
    with torch.no_grad():
        found = soda.encoder.features(experiment.views.evaluation(pixels))["z"]
        expected = load_encoder(checkpoint)(pixels)["z"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


USE = {
    "encoder.pt2": "z, pooled = torch.export.load('encoder.pt2').module()(torch.from_numpy(pixels))",
    "encoder.onnx": "z, pooled = onnxruntime.InferenceSession('encoder.onnx').run(['z', 'pooled'], {'pixels': pixels})",
}


@pytest.mark.parametrize("file", [pytest.param("encoder.pt2", marks=pytest.mark.long), "encoder.onnx"])
def test_an_exported_encoder_needs_nothing_of_this_repository(
    run: Path, checkpoint: Path, tmp_path: Path, file: str
) -> None:
    folder = run / "export"
    if not folder.exists():
        assert embed_program.main(["--checkpoint", str(checkpoint), "--export", str(folder)]) == 0
        names = ["README.md", "encoder.onnx", "encoder.pt2", "model.safetensors"]
        assert sorted(path.name for path in folder.iterdir()) == names
    pixels = torch.randint(0, 256, (33, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = as_evaluated(checkpoint, pixels)
    shutil.copy(folder / file, tmp_path)
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    script = f"""
import importlib.util, sys, numpy as np
assert not any(map(importlib.util.find_spec, ("analysis", "training", "model"))), sys.path
import {"torch" if file == "encoder.pt2" else "onnxruntime"}
for count in (33, 1):
    pixels = np.load("pixels.npy")[:count]
    {USE[file]}
    np.savez(f"features_{{count}}.npz", z=np.asarray(z), pooled=np.asarray(pooled))
"""
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True, timeout=300)
    for count in (33, 1):
        with np.load(tmp_path / f"features_{count}.npz") as found:
            for name in ("z", "pooled"):
                np.testing.assert_allclose(found[name], expected[name][:count], atol=1e-4)


def test_weights_are_exported_with_a_card_whose_lines_run(
    run: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The card's code gives the z of the evaluation. It has the accuracies of the run, and no paths."""
    weights, card = tmp_path / "out" / "mine.safetensors", tmp_path / "out" / "README.md"
    for _ in range(2):  # an earlier card is replaced
        assert embed_program.main(["--checkpoint", str(checkpoint), "--export", str(weights)]) == 0
        assert capsys.readouterr().out == f"{weights}\n{card}\n"
    text = card.read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(card.parent)
    found: dict[str, Any] = {}
    exec(lines, found)
    experiment, soda = open_trained(read_trained(None, checkpoint, ["device=cpu"]))
    mean, std = (torch.tensor(values)[:, None, None] for values in (experiment.info.mean, experiment.info.std))
    torch.testing.assert_close(found["z"], soda.encoder((found["images"] - mean) / std), rtol=1e-4, atol=1e-4)
    table = json.loads((run / "results.json").read_text())["table"]
    for protocol, cells in table.items():
        assert f"| {protocol} | {cells['trained']['top1']:.1f} / {cells['trained']['top3']:.1f} |" in text
    assert sha256(checkpoint.read_bytes()).hexdigest() in text and str(run.parent) not in text
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "soda"

    copied = tmp_path / "elsewhere" / "last.pt"
    copied.parent.mkdir()
    shutil.copy(checkpoint, copied)
    card.write_text("my notes")
    with pytest.raises(SystemExit, match="2"):
        embed_program.main(["--checkpoint", str(copied), "--export", str(weights)])
    error = f"error: {card} is not a model card of this program: export to another folder\n"
    assert capsys.readouterr().err == error and card.read_text() == "my notes"
    card.unlink()
    assert embed_program.main(["--checkpoint", str(copied), "--export", str(weights)]) == 0
    assert "accuracy" not in card.read_text(), "the run is not known"


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_one_file_is_exported_with_the_packages_that_it_needs(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
) -> None:
    """A .pt2 export needs no ONNX packages. A path that ends in neither .pt2 nor .onnx is a folder for both files."""
    installed = importlib.util.find_spec
    if ending == ".pt2":
        missing = ("onnx", "onnxscript", "onnxruntime")
        monkeypatch.setattr("utils.cli.find_spec", lambda name: None if name in missing else installed(name))
        for name in missing:
            monkeypatch.setitem(sys.modules, name, None)  # its import raises an error
    path = tmp_path / "deep" / f"mine{ending}"
    assert embed_program.main(["--checkpoint", str(checkpoint), "--export", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}  (its features differ from the model's by at most ")
    assert list(path.parent.iterdir()) == [path]
    if ending == ".pt2":
        found = torch.export.load(path).module()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
        assert [tuple(values.shape) for values in found] == [(2, 8), (2, 32)]
        with pytest.raises(SystemExit, match="2"):
            embed_program.main(["--checkpoint", str(checkpoint), "--export", str(tmp_path / "folder")])
        assert capsys.readouterr().err.startswith("error: onnx, onnxscript, onnxruntime are not installed: ")
        assert not (tmp_path / "folder").exists()


def test_an_export_that_differs_from_the_module_is_not_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = FORMATS[".pt2"]

    def load(path: Path) -> Any:
        return lambda pixels: [values + 1 for values in good.load(path)(pixels)]

    monkeypatch.setitem(FORMATS, ".pt2", replace(good, load=load))
    with pytest.raises(SystemExit, match="2"):
        embed_program.main(["--checkpoint", str(checkpoint), "--export", str(tmp_path / "encoder.pt2")])
    error = capsys.readouterr().err
    assert error.startswith("error: the exported encoder's features differ from the model's by 1; nothing was written")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "floats in [0, 1]": (torch.rand(2, 3, 8, 8), TypeError, "not torch.float32: convert pixels x in"),
    "an array": (np.zeros((2, 3, 8, 8), np.uint8), TypeError, "not ndarray"),
    "another size": (torch.zeros(2, 3, 9, 8).byte(), ValueError, "not .2, 3, 9, 8.: resize them, or call load_encoder"),
    "no batch": (
        torch.zeros(3, 8, 8).byte(),
        ValueError,
        "takes pixels .N, 3, 8, 8., not .3, 8, 8.: change their shape",
    ),
    "channels last": (torch.zeros(2, 8, 8, 3).byte(), ValueError, "not .2, 8, 8, 3.: change their shape"),
}


@pytest.mark.parametrize(("pixels", "error", "line"), WRONG.values(), ids=WRONG)
def test_a_loaded_encoder_takes_only_what_the_exports_take(
    checkpoint: Path, pixels: Any, error: type[Exception], line: str
) -> None:
    with pytest.raises(error, match=line):
        load_encoder(checkpoint)(pixels)
    if "resize" not in line:
        with pytest.raises(error, match=line):
            load_encoder(checkpoint, resize=True)(pixels)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (20, 33), (5, 4)])
def test_an_encoder_that_resizes_gives_the_features_of_the_file(
    checkpoint: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    """Images of another size are cropped and resized as embed.py decodes files."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    squares = []
    for image in pixels:
        Image.fromarray(image).save(tmp_path / "a.png")
        squares.append(torch.from_numpy(decode(tmp_path / "a.png", 8).copy()).permute(2, 0, 1))
    expected = as_evaluated(checkpoint, torch.stack(squares))
    features = load_encoder(checkpoint, resize=True)(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    for name in ("z", "pooled"):
        np.testing.assert_allclose(features[name], expected[name], atol=1e-5)


def test_nearest_neighbours_against_scikit_learn() -> None:
    bank = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    bank[300] = bank[20]  # a copy; of two equal neighbours, the lower index comes first
    queries = torch.cat([bank[[20, 300, 7]], torch.randn(40, 16, generator=torch.Generator().manual_seed(1))])
    distances, indices = nearest_neighbours(bank, queries, 5)
    expected, order = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(bank.double()).kneighbors(queries.double())
    np.testing.assert_allclose(distances, expected, atol=1e-6)
    assert indices[:2, :2].tolist() == [[20, 300], [20, 300]] and indices[2, 0] == 7
    np.testing.assert_array_equal(indices[2:], order[2:])


@pytest.mark.parametrize(
    ("program", "options", "module"),
    [
        (sample_program, ["reconstruct"], "torchmetrics"),
        (judge_program, ["--report"], "matplotlib"),
        (embed_program, ["--export", "out"], "onnxscript"),
        (embed_program, ["--split", "test", "--out", "z.safetensors"], "safetensors"),
    ],
)
def test_an_extra_that_is_missing_is_named_before_any_work(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    program: Any,
    options: list[str],
    module: str,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("utils.cli.find_spec", lambda name: None if name == module else found(name))
    with pytest.raises(SystemExit, match="2"):
        program.main([*options, "--checkpoint", str(checkpoint)])
    assert capsys.readouterr().err == f"error: {module} is not installed: run pip install -r requirements-extra.txt\n"
