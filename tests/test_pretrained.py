"""The published encoder can be opened from a fresh checkout, and is better than raw pixels on other photographs."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import embed as embed_program
import sample as sample_program
import test as judge_program
from analysis.image_encoder import load_encoder
from analysis.pictures import Generate
from docs.rows import recorded
from evaluation.codec import Codec
from experiment.trained import open_trained, read_trained
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


def photographs(place: Path) -> list[str]:
    """Writes the squares as a training and a test split, and returns the config keys of this data set."""
    images, labels = squares_of_photographs()
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        file = place / "photos" / ("train", "test")[number % 2] / f"{label}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    return ["data.name=folder", f"data.root={place / 'photos'}", f"data.cache_dir={place}", "device=cpu"]


def test_its_neighbours_are_better_than_those_of_raw_pixels() -> None:
    pixels, labels = squares_of_photographs()
    features = load_encoder(FILE)(pixels)
    assert features["z"].shape == (120, 512) and features["pooled"].shape == (120, 256)
    assert share_found(features["z"], labels) >= share_found(pixels, labels) + 0.03


def test_the_commands_open_it(tmp_path: Path) -> None:
    """test.py judges it on other photographs, with scikit-learn's accuracy of k-NN.

    sample.py draws them, and embed.py saves the features that `load_encoder` gives.
    """
    images, labels = squares_of_photographs()
    common = ["--checkpoint", str(FILE), *photographs(tmp_path)]
    results = tmp_path / "results.json"
    judged = ["--protocols", "config", "--no_baselines", "--results", str(results)]
    assert judge_program.main([*common, *judged]) == 0
    found = json.loads(results.read_text())["table"]["k-NN k=20 uniform, unit z, bank: clean"]
    z = F.normalize(load_encoder(FILE)(images)["z"])
    expected = KNeighborsClassifier(20).fit(z[::2], labels[::2]).score(z[1::2], labels[1::2])
    assert list(found) == ["trained"] and found["trained"]["top1"] == pytest.approx(100 * expected, abs=1e-3)
    for picture in (["reconstruct", "--num_samples", "1"], ["interpolate"], ["nearest"], ["generate"]):
        drawn = tmp_path / f"{picture[0]}.png"
        count = ["--num_samples" if picture == ["generate"] else "--num_images", "2"]
        options = [*count, "sampling.num_sampling_steps=4", "--out", str(drawn)]
        assert sample_program.main([*picture, *common, *options]) == 0 and drawn.exists()
    assert embed_program.main([*common, "--split", "test", "--out", str(tmp_path / "z.npz")]) == 0
    saved = np.load(tmp_path / "z.npz")
    numbers = [int(Path(name).stem) for name in saved["names"]]
    assert sorted(numbers) == list(range(1, len(images), 2))
    np.testing.assert_allclose(saved["z"], load_encoder(FILE)(images[numbers])["z"].numpy(), atol=1e-4)


@pytest.mark.long
def test_z_decides_what_is_decoded(tmp_path: Path) -> None:
    """An image's own z decodes nearer to the image than another image's z does.

    From the image's own x_T this holds for at least 90 % of the images. From random noise it holds for at least 60 %,
    because random noise puts the content of an image in other places. New images are encoded nearer to the z that they
    were sampled from than to another z more often than by chance.
    """
    steps = "sampling.num_sampling_steps=20"
    codec = Codec(*open_trained(read_trained(None, FILE, [*photographs(tmp_path), steps])), seed=0)
    pixels = squares_of_photographs()[0][1::4]  # half of the test images
    z = codec.encode(pixels)
    sources = F.avg_pool2d(pixels.float() / 127.5 - 1, 2)

    def share_nearer(decode: Callable[[Tensor, Tensor], Tensor], x_T: Tensor, times: int) -> float:
        wanted, own, others = (some.repeat(times, *[1] * (some.ndim - 1)) for some in (sources, z, z.roll(1, 0)))
        near, far = ((decode(latents, x_T) - wanted).square().mean(dim=(1, 2, 3)) for latents in (own, others))
        return (near < far).float().mean().item()

    assert share_nearer(codec.decode, codec.invert(pixels, z), 1) >= 0.9
    assert share_nearer(codec.sample, codec.noise(2 * len(z), "anything"), 2) >= 0.6

    with mock.patch.object(codec, "sample", wraps=codec.sample) as sample:
        picture = Generate(num_components=3, num_samples=100).draw(codec, None)
    (drawn, _), _ = sample.call_args
    images = torch.stack([cell.image for row in picture.cells for cell in row if cell.image is not None])
    seen = codec.encode(F.interpolate(images.float(), scale_factor=2, mode="bilinear").round().byte())  # 32 px
    distances = torch.cdist(seen, drawn)
    nearer = (distances.diagonal()[:, None] < distances).sum(dim=1) / (len(drawn) - 1)  # fraction of z farther away
    # x_T has a large effect on the images of this model, so only a difference from chance is asserted.
    assert nearer.mean() - 3 * nearer.std() / len(nearer) ** 0.5 > 0.5


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
