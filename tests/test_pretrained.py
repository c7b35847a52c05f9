"""The published encoder can be opened from a fresh checkout, and is better than raw pixels on other photographs."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import sample as sample_program
import test as judge_program
from analysis.image_encoder import load_encoder
from docs.rows import recorded
from tests.conftest import ROOT

FILE = ROOT / "pretrained" / "cifar10_cpu.pt"


def squares_of_photographs() -> tuple[Tensor, Tensor]:
    """Returns squares of two photographs, (N, 3, 32, 32) uint8, and the number of each square's photograph (N,)."""
    found = []
    for photograph in load_sample_images().images:
        half = torch.from_numpy(photograph[::2, ::2].copy()).permute(2, 0, 1)
        found.append(half.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).flatten(0, 1))
    return torch.cat(found), torch.arange(2).repeat_interleave(len(found[0]))


def share_found(features: Tensor, labels: Tensor) -> float:
    """Returns the share of samples whose five nearest other samples are mostly of their own class."""
    unit = F.normalize(features.flatten(1).float(), dim=1)
    neighbours = (unit @ unit.T).fill_diagonal_(-2).topk(5).indices
    return ((labels[neighbours] == labels[:, None]).sum(dim=1) > 2).float().mean().item()


def test_its_neighbours_are_better_than_those_of_raw_pixels() -> None:
    pixels, labels = squares_of_photographs()
    features = load_encoder(FILE)(pixels)
    assert features["z"].shape == (120, 512) and features["pooled"].shape == (120, 256)
    assert share_found(features["z"], labels) >= share_found(pixels, labels) + 0.03


def test_the_commands_open_it(tmp_path: Path) -> None:
    """test.py judges it on other photographs, with scikit-learn's accuracy of k-NN, and sample.py draws them."""
    images, labels = squares_of_photographs()
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        file = tmp_path / "photos" / ("train", "test")[number % 2] / f"{label}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    common = ["--checkpoint", str(FILE), "data.name=folder", f"data.root={tmp_path / 'photos'}", "device=cpu"]
    common += [f"data.cache_dir={tmp_path}"]
    results, drawn = tmp_path / "results.json", tmp_path / "reconstruct.png"
    judged = ["--protocols", "config", "--no_baselines", "--results", str(results)]
    assert judge_program.main([*common, *judged]) == 0
    found = json.loads(results.read_text())["table"]["k-NN k=20 uniform, unit z, bank: clean"]
    z = F.normalize(load_encoder(FILE)(images)["z"])
    expected = KNeighborsClassifier(20).fit(z[::2], labels[::2]).score(z[1::2], labels[1::2])
    assert list(found) == ["trained"] and found["trained"]["top1"] == pytest.approx(100 * expected, abs=1e-3)
    options = ["--num_images", "2", "--num_samples", "1", "sampling.num_sampling_steps=4", "--out", str(drawn)]
    assert sample_program.main(["reconstruct", *common, *options]) == 0 and drawn.exists()


def test_the_readmes_lines_run_as_printed() -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shapes = "print(nearest.shape, features['z'].shape, features['pooled'].shape)"
    done = subprocess.run(
        [sys.executable, "-c", f"{lines}\n{shapes}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([100]) torch.Size([100, 512]) torch.Size([100, 256])\n"


def test_the_recorded_figures_are_those_of_the_file() -> None:
    digest = hashlib.sha256(FILE.read_bytes()).hexdigest()
    for name in ("cifar10_published", "cifar10_attributes", "cars3d_factors"):
        assert [row["checkpoint"] for row in recorded(name)] == [digest]
    from_file = [row for row in recorded("cifar10_few_labels") if row["start"] == "encoder"]
    assert {protocol.rsplit(" ", 1)[1] for row in from_file for protocol in row["table"]} == {digest[:8]}


def test_it_is_small_and_names_no_paths() -> None:
    contents = torch.load(FILE, weights_only=True)
    config = yaml.safe_load(contents["config"])
    assert FILE.stat().st_size < 10_000_000 and not contents["model"] and not contents["optimizer"]
    assert config["data"]["name"] == "cifar10" and config["data"]["root"] == "data" and config["output_dir"] == ""
    assert config["sampling"]["eta"] == 1.0 and config["evaluation"]["probe"]["solver"] == "lbfgs"
    weights = [each for name, each in contents["ema"]["model"].items() if name.endswith("weight")]
    assert all(each.dtype == torch.bfloat16 for each in weights)
