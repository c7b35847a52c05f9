"""Tests of the priors over z and of measures of reconstruction and generation, against other libraries and formulas."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import sample as sample_program
import test as judge_program
import train as train_program
from analysis import latent_diffusion
from analysis.latent_diffusion import Fit
from analysis.latent_space import draw_from_mixture, fit_mixture
from analysis.pictures import Directions
from config.errors import ConfigError
from evaluation.codec import Codec
from evaluation.distances import frechet_distance, kernel_distance, two_sample_accuracy
from evaluation.features import random_subset
from evaluation.measures import find_measures, generation
from evaluation.measures import prior as prior_measure
from evaluation.measures.base import Inputs
from evaluation.measures.generation import FID, FeatureDistance, Memorization
from evaluation.measures.prior import Prior
from evaluation.measures.reconstruction import LPIPS, Reconstruction
from evaluation.measures.subjects import Subjects
from evaluation.pretrained import load_inception, load_lpips
from experiment.trained import open_trained, read_trained
from tests.conftest import digits_args
from utils.randomness import derive_seed, generator

OWNER = {"digest": "a", "data": "b"}


def gaussian(count: int, seed: int, width: int = 4) -> Tensor:
    """Returns correlated latents (count, width) whose dimensions have means 0, 1, ... and different variances."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return noise @ mixing + torch.arange(width)


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # fewer samples than dimensions
def test_frechet_distance_against_scipy_and_in_closed_form() -> None:
    a, b = gaussian(300, 1), gaussian(200, 2) * 1.5 + 1
    covariances = [np.cov(x.double().numpy().T) for x in (a, b)]
    means = [x.double().numpy().mean(axis=0) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    # In one dimension, it is the squared difference of the means plus that of the standard deviations.
    x, y = a[:, :1], 3 * a[:, :1] + 2
    difference, std = (y.mean() - x.mean()).item(), x.std().item()
    assert frechet_distance(x, y) == pytest.approx(difference**2 + (2 * std) ** 2, rel=1e-5)
    # Fewer rows than dimensions: the covariances are singular.
    few, other = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)), torch.eye(20)[:6]
    root = scipy.linalg.sqrtm(np.cov(few.double().numpy().T) @ np.cov(other.double().numpy().T))
    traces = few.double().var(dim=0).sum() + other.double().var(dim=0).sum() - 2 * root.real.trace()
    expected = float((few.double().mean(0) - other.double().mean(0)).square().sum() + traces)
    assert frechet_distance(few, other) == pytest.approx(expected, abs=1e-3)


def test_kernel_distance_against_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.distances.CHUNK", 7)
    a, b = (x.double() for x in (gaussian(30, 1), gaussian(20, 2) + 0.5))
    kernels = [polynomial_kernel(x, y, degree=3, gamma=1 / 4, coef0=1) for x, y in ((a, a), (b, b), (a, b))]
    within = [(kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1)) for kernel in kernels[:2]]
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * kernels[2].mean(), rel=1e-9)
    on_device = (mock.Mock(double=mock.Mock(side_effect=TypeError("no float64")), cpu=lambda x=x: x) for x in (a, b))
    assert kernel_distance(*on_device) == kernel_distance(a, b), "some devices have no float64"
    same = [kernel_distance(gaussian(50, i), gaussian(50, 100 + i)) for i in range(40)]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(40), "without bias, also for few samples"


def test_the_two_sample_test_knows_chance_and_differences_of_shape() -> None:
    a, b = gaussian(400, 1), gaussian(400, 2)
    assert two_sample_accuracy(a, b, 0) == pytest.approx(50, abs=6)
    assert two_sample_accuracy(a, b + 20, 0) == 100
    # The same mean and variances, but no correlations: a linear classifier cannot tell these apart.
    source = torch.Generator().manual_seed(0)
    shuffled = torch.stack([column[torch.randperm(400, generator=source)] for column in b.T], dim=1)
    assert two_sample_accuracy(a, shuffled, 0) > 60


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the diffusion prior small."""
    for name, value in {"WIDTH": 64, "NUM_LAYERS": 2, "NUM_SAMPLING_STEPS": 100, "LEARNING_RATE": 3e-3}.items():
        monkeypatch.setattr(latent_diffusion, name, value)


def test_both_priors_draw_from_a_gaussian(small_network: None) -> None:
    """Draws of both priors are as close to other samples of the Gaussian as these are to each other, about."""
    latents, others = gaussian(2000, 1), gaussian(2000, 2)
    fit = Fit(OWNER, 0, torch.device("cpu"))
    fit.run(latents, 100)
    drawn = fit.draw(2000, 0)
    independent = latents.mean(0) + latents.std(0) * torch.randn(2000, 4, generator=torch.Generator().manual_seed(3))
    assert frechet_distance(drawn, others) < 0.1 * frechet_distance(independent, others)
    torch.testing.assert_close(drawn.mean(0), latents.mean(0), atol=0.15, rtol=0)
    assert not torch.equal(drawn, fit.draw(2000, 1)) and torch.equal(drawn, fit.draw(2000, 0))
    mixture = torch.tensor(draw_from_mixture(fit_mixture(latents, 2, 0), 2000, 0))
    assert frechet_distance(mixture, others) < 0.1 * frechet_distance(independent, others)
    # Constant columns, and columns that almost depend on others, keep their values and correlations.
    flat = torch.cat([latents, torch.full((2000, 1), 7.0), 1e-3 * latents[:, :1] + 1e-4 * others[:, :1]], dim=1)
    fit = Fit(OWNER, 0, torch.device("cpu"))
    fit.run(flat, 5)
    drawn = fit.draw(2000, 0)
    torch.testing.assert_close(drawn[:, 4], flat[:, 4], atol=1e-3, rtol=0)
    assert np.corrcoef(drawn[:, 5], drawn[:, 0])[0, 1] > 0.95


@pytest.mark.parametrize(("count", "width"), [(5, 64), (50, 1), (3, 2)])
def test_few_or_constant_latents_are_drawn(small_network: None, count: int, width: int) -> None:
    source = torch.Generator().manual_seed(0)
    for latents in (torch.randn(count, width, generator=source) + 100, torch.full((count, width), 3.0)):
        fit = Fit(OWNER, 0, torch.device("cpu"))
        fit.run(latents, 2)
        drawn = fit.draw(1000, 0)
        torch.testing.assert_close(drawn.mean(0), latents.mean(0), atol=0.2, rtol=0)
        torch.testing.assert_close(drawn.std(0), latents.std(0, correction=0), atol=0.2, rtol=0)


def test_a_diffusion_prior_learns_more_than_a_gaussian(small_network: None) -> None:
    """Half of the latents have a scale of .3, the others of 1.4. All their directions are equally frequent."""

    def of_two_scales(seed: int) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        return torch.randn(2000, 8, generator=source) * torch.tensor([0.3, 1.4]).repeat(1000)[:, None]

    latents, others, fit = of_two_scales(1), of_two_scales(2), Fit(OWNER, 0, torch.device("cpu"))
    fit.run(latents, 1)
    gaussian_draw = fit.draw(2000, 0)  # the network begins with the v of a Gaussian
    torch.testing.assert_close(torch.cov(gaussian_draw.T), torch.cov(latents.T), atol=0.15, rtol=0)
    fit.run(latents, 600)
    found = [two_sample_accuracy(drawn, others, 0) for drawn in (gaussian_draw, fit.draw(2000, 0), latents)]
    assert found[0] > 70 > 60 > found[1] and abs(found[2] - 50) < 5


def test_an_interrupted_fit_resumes_bit_for_bit(small_network: None, tmp_path: Path) -> None:
    latents, path = gaussian(100, 1), tmp_path / "last.prior"
    whole, first, second = (Fit(OWNER, 0, torch.device("cpu")) for _ in range(3))
    whole.run(latents, 8)
    first.run(latents, 5, path)
    second.load(torch.load(path, weights_only=True))
    assert second.step == 5
    second.run(latents, 8)
    assert torch.equal(whole.draw(10, 0), second.draw(10, 0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of one epoch on digits."""
    folder = tmp_path_factory.mktemp("priors") / "run"
    assert train_program.main(digits_args(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def codec(run: Path) -> Codec:
    """The codec of this run."""
    checkpoint = run / "checkpoints" / "last.pt"
    return Codec(*open_trained(read_trained(None, checkpoint, ["device=cpu", "sampling.num_sampling_steps=2"])), seed=0)


def test_fit_prior_prints_its_table_resumes_and_generates(
    run: Path,
    small_network: None,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(prior_measure, "MAX_LATENTS", 100)
    args, path = digits_args(run), run / "checkpoints" / "last.prior"
    missing = ["generate", *args, "--prior", "diffusion"]
    with pytest.raises(SystemExit, match="2"):
        sample_program.main(missing)
    assert capsys.readouterr().err == f"error: there is no diffusion prior {path}: fit one by sample.py fit_prior\n"
    for steps in (5, 8):
        assert sample_program.main(["fit_prior", *args, "--steps", str(steps)]) == 0
        printed = capsys.readouterr().out
        assert f"prior        {path}, {steps} steps" in printed
    with monkeypatch.context() as patched:
        patched.setattr(prior_measure, "MIN_LATENTS", 361)
        assert sample_program.main(["fit_prior", *args, "--steps", "8"]) == 0
        assert "the prior is not measured: it needs 361 images of each split" in caplog.text
        assert str(path) in capsys.readouterr().out
    heading, _, *rows = printed.splitlines()[2:-2]
    assert heading.split() == ["mixture", "diffusion", "real", "images"]
    assert [row.split("  ")[0] for row in rows] == [
        *(f"{name} to {split} latents" for name in ("Fréchet distance", "two-sample accuracy (%)") for split in SPLITS),
        "median distance to the nearest training latent",
    ]
    recorded = json.loads((run / "results.json").read_text())["measures"]["prior"]["rows"]
    assert recorded["Fréchet distance to test latents"].keys() == {"mixture", "diffusion", "real images"}
    drawn = ["generate", *args, "--prior", "diffusion", "--num_components", "2", "--num_samples", "3"]
    assert sample_program.main(drawn) == 0

    # A prior of another checkpoint, and a damaged file, are refused and not touched.
    state, whole = torch.load(path, weights_only=True), path.read_bytes()
    for content, expected in (
        (
            state | {"digest": "0"},
            f"{path} was fitted to another checkpoint than {path.with_suffix('.pt')} (step 22): ",
        ),
        (state | {"data": "0"}, f"{path} was fitted to other training images: "),
        (
            {"step": 3},
            f"{path} is damaged, or no prior of this version (KeyError): remove it and run sample.py fit_prior",
        ),
        (
            state | {"mean": torch.zeros(3)},
            f"{path} is damaged, or no prior of this version (ValueError): remove it and ",
        ),
        (state | {"mean": state["mean"] / 0}, f"{path} is damaged, or no prior of this version (ValueError): "),
        (whole[:5000], f"{path} is damaged, or no prior of this version (ValueError): remove it and "),
        (whole[: len(whole) // 2], f"{path} is damaged, or no prior of this version ("),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        before = path.read_bytes()
        for command in (missing, ["fit_prior", *args]):
            capsys.readouterr()
            with pytest.raises(SystemExit, match="2"):
                sample_program.main(command)
            said = capsys.readouterr().err
            assert said.startswith(f"error: {expected}") and said.count("\n") == 1
        assert path.read_bytes() == before
    # Such a prior is left out of other measures, but not of the measure of priors.
    capsys.readouterr()
    assert judge_program.main([*args, "--measures", "uniformity"]) == 0
    with pytest.raises(SystemExit, match="2"):
        judge_program.main([*args, "--measures", "prior,uniformity"])
    assert f"{path} is damaged, or no prior" in capsys.readouterr().err
    path.unlink()
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="2"):
        patched.setattr("analysis.measuring.all_equal", lambda step: False)
        judge_program.main([*args, "--measures", "uniformity"])
    assert f"error: the machines hold different files {path}: " in capsys.readouterr().err


SPLITS = ("training", "test")


def test_draws_of_a_prior_are_compared_with_all_training_latents(codec: Codec) -> None:
    """A prior that repeats training latents is found by the distance to the nearest one."""
    train, test = codec.train_z, codec.test_z
    priors = {
        "far": lambda count, _: train[:count] + 100,
        "copies": lambda count, seed: train[torch.randperm(len(train), generator=generator(seed, "c"))[:count]],
    }
    rows = Prior().measure(Subjects(codec.experiment, {}, "z", codec=codec, priors=priors)).rows
    draws = [priors["copies"](360, derive_seed(codec.seed, "draws of latents", i)) for i in range(5)]
    found = [frechet_distance(draw, train) for draw in draws]
    cells = rows["Fréchet distance to training latents"]
    assert cells["copies"] == pytest.approx({"value": np.mean(found), "deviation": np.std(found, ddof=1)})
    assert cells["real images"] == pytest.approx({"value": frechet_distance(test, train)})
    nearest = rows["median distance to the nearest training latent"]
    assert nearest["copies"]["value"] < 1e-2 < nearest["real images"]["value"]
    tested = rows["two-sample accuracy (%) to training latents"]["copies"]
    assert tested["value"] < 60 < 99 < rows["two-sample accuracy (%) to test latents"]["far"]["value"]
    of_real = [rows[f"two-sample accuracy (%) to {split} latents"]["real images"] for split in SPLITS]
    assert of_real[0] == of_real[1] and of_real[0]["deviation"] > 0
    untested = Subjects(replace(codec.experiment, test=None), {}, "z", codec=codec, priors=priors)
    rows = Prior().measure(untested).rows
    assert len(rows) == 3 and all(cells.keys() == {"far", "copies"} for cells in rows.values())


def test_reconstructions_by_formulas(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.measures.subjects.NUM_RECONSTRUCTED", 6)
    subjects = Subjects(codec.experiment, {}, "z", Inputs(lpips=lambda a, b: (a - b).abs().mean((1, 2, 3))), codec)
    sources, images = subjects.reconstructed
    found, perceptual = Reconstruction().measure(subjects).rows, LPIPS().measure(subjects).rows["LPIPS"]
    for name, each in images.items():
        errors = ((each - sources) / 2).square().mean(dim=(1, 2, 3))
        assert found["squared error x 1000"][name]["value"] == pytest.approx(1000 * errors.mean().item(), rel=1e-4)
        assert found["PSNR (dB)"][name]["value"] == pytest.approx((-10 * errors.log10()).mean().item(), rel=1e-4)
        assert perceptual[name]["value"] == pytest.approx((each - sources).abs().mean().item(), rel=1e-4)
    assert (images["mean image"] - images["mean image"][0]).abs().max() < 1e-6


def test_no_more_images_are_generated_than_there_are_to_compare(codec: Codec, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert Subjects(codec.experiment, {}, "z", Inputs(num_samples=360), codec).num_samples == 360 and not caplog.text
    assert Subjects(codec.experiment, {}, "z", Inputs(num_samples=361), codec).num_samples == 360
    assert "360 generated images per prior, not 361" in caplog.text


def test_copies_of_training_images_are_memorized_and_other_images_are_not(codec: Codec) -> None:
    """Generated images are replaced by training images, and by test images. These are as near as test images are."""
    subjects = Subjects(codec.experiment, {}, "z", Inputs(num_samples=200), codec)
    assert subjects.real is not None
    copies, others = (next(each.batches([range(200)])) for each in (codec.experiment.train, subjects.real))
    subjects.__dict__["generated"] = {"copies": copies, "others": others}
    rows = Memorization().measure(subjects).rows
    close = rows["within the 1st percentile of test images (%)"]
    assert [close[name]["value"] for name in ("copies", "others", "test images")] == pytest.approx([100, 1, 1])
    assert rows["smallest distance x 100"]["copies"]["value"] < 1e-2
    bank = next(codec.experiment.train.batches([range(1437)])).flatten(1).double() / 255
    nearest = torch.cdist(others.flatten(1).double() / 255, bank).min(dim=1).values / bank.shape[1] ** 0.5
    expected = 100 * nearest.quantile(0.5).item()
    assert rows["median distance x 100"]["test images"]["value"] == pytest.approx(expected, rel=1e-3)


def test_feature_distances_are_those_of_the_features(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MAX_REFERENCE", 300)

    def encode(pixels: Tensor) -> Tensor:
        return pixels.float().mean(dim=1)[:, 2::4, 2::4].flatten(1) / 255

    priors = {"noise": lambda count, seed: torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))}
    subjects = Subjects(
        codec.experiment, {}, "z", Inputs(other_encoder=("means", encode), num_samples=40), codec, priors
    )
    rows = FeatureDistance().measure(subjects).rows
    assert list(rows["Fréchet distance"]) == ["noise", "z of test images", "test images"]
    chosen = random_subset(codec.experiment.train, 300, codec.experiment.config.seed, "reference images")
    reference = encode(next(chosen.batches([range(300)])))
    scaler = StandardScaler().fit(reference)
    assert subjects.real is not None
    real = next(subjects.real.batches([range(40)]))
    for name, pixels in {**subjects.generated, "test images": real}.items():
        pair = [torch.from_numpy(scaler.transform(features)) for features in (encode(pixels), reference)]
        expected = {
            "Fréchet distance": frechet_distance(*pair),
            "kernel distance x 1000": 1000 * kernel_distance(*pair),
        }
        for row, value in expected.items():
            assert rows[row][name]["value"] == pytest.approx(value, rel=1e-3, abs=1e-3)


def test_lpips_by_its_formula(tmp_path: Path) -> None:
    """AlexNet with random weights, by torchvision, and the learned weights of the layers, by hand."""
    import torchmetrics

    torch.manual_seed(0)
    alexnet = torchvision.models.alexnet(weights=None).eval()
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    learned = torch.load(
        Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "alex.pth", map_location="cpu"
    )
    images, sources = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in (1, 2))
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    x, y, expected, layer = (images - shift) / scale, (sources - shift) / scale, torch.zeros(2), 0
    with torch.no_grad():
        for module in alexnet.features:
            x, y = module(x), module(y)
            if isinstance(module, torch.nn.ReLU):
                squared = (F.normalize(x) - F.normalize(y)).square()
                expected += (squared * learned[f"lin{layer}.model.1.weight"]).sum(dim=1).mean(dim=(1, 2))
                layer += 1
    lpips = load_lpips(tmp_path / "alexnet.pth", torch.device("cpu"))
    torch.testing.assert_close(lpips(images, sources), expected, rtol=1e-3, atol=1e-6)
    assert lpips(images[:, :, :8, :8], images[:, :, :8, :8]).tolist() == [0, 0]


@pytest.mark.long
def test_fid_against_torchmetrics(codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Inception network has random weights."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = inception.FeatureExtractorInceptionV3
    with monkeypatch.context() as patched:
        patched.setattr(network, "load_state_dict", lambda self, state: None)
        torch.save({}, tmp_path / "none.pth")
        torch.manual_seed(0)
        weights = network("random", ["2048"], feature_extractor_weights_path=tmp_path / "none.pth").state_dict()
    torch.save(weights, tmp_path / "inception.pth")
    images = [torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8) // (1 + i) for i in (0, 1)]
    fid = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(tmp_path / "inception.pth"))
    for index, each in enumerate(images):
        fid.update(each, real=index == 0)
    encode = load_inception(tmp_path / "inception.pth", torch.device("cpu"))
    found = frechet_distance(*(encode(each) for each in images))
    assert found == pytest.approx(fid.compute().item(), rel=1e-2)


def test_a_named_measure_that_needs_more_is_left_out_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other measures are printed. If there are no others, or a file cannot be used, nothing is computed."""
    monkeypatch.setattr("evaluation.measures.subjects.NUM_RECONSTRUCTED", 4)
    (tmp_path / "wrong.pth").write_bytes(b"no weights")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    needs = "the measure lpips was not computed: it needs torchvision's AlexNet weights, which are not downloaded: "
    for words, printed, expected in (
        (["lpips"], False, needs),
        (["lpips,reconstruction"], True, f"{needs}add --lpips FILE; the other measures were printed"),
        (["reconstruction", "--measures", "lpips"], True, f"{needs}add --lpips FILE; the other measures were printed"),
        (["lpips", "--lpips", "none.pth"], False, "--lpips: there is no file none.pth: name a file with torchvision's"),
        (["lpips", "--lpips", str(tmp_path / "wrong.pth")], False, f"--lpips: {tmp_path / 'wrong.pth'} cannot be read"),
        (
            ["lpips", "--lpips", str(tmp_path / "other.pth")],
            False,
            "other.pth does not hold torchvision's AlexNet weig",
        ),
        (["feature_distance"], False, "it needs another encoder: add --features_of CHECKPOINT"),
        (["lpips", "--num_samples", "20"], False, "--num_samples 20 is for the measures feature_distance, fid, memor"),
        (["memorization", "--num_samples", "2"], False, "2 is not a number of images: use an integer of at least 10"),
    ):
        with pytest.raises(SystemExit, match="2"):
            judge_program.main([*digits_args(run), "--measures", *words])
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and expected in shown.err, shown.err
        assert ("reconstruction: " in shown.out) == printed


def test_a_measure_without_its_package_names_it(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.measures.base.find_spec", lambda name: None)
    inputs: Any = Inputs(inception=lambda pixels: pixels)
    found, left_out = find_measures(["reconstruction", "fid", "memorization"], codec.experiment, inputs)
    assert [measure.name for measure in found] == ["memorization"] and FID.name in left_out
    assert left_out["reconstruction"] == "it needs torchmetrics: run pip install -r requirements-extra.txt"


def test_directions_along_a_column_stay_in_the_range_of_the_latents(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents with the attribute lie further along the direction, and the ends are at the latents' own extremes."""
    train = codec.experiment.train
    assert train.labels is not None
    monkeypatch.setattr(train, "attributes", torch.stack([train.labels > 4, train.labels < 0], dim=1).byte())
    monkeypatch.setattr(train, "attribute_names", ["large", "never"])
    picture = Directions(column="large", reach=9.0, num_images=2, num_steps=5, random=True)
    moved: list[Tensor] = []

    def sample(z: Tensor, x_T: Tensor, noise_of: list[int]) -> Tensor:
        moved.append(z)
        return x_T

    monkeypatch.setattr(codec, "sample", sample)
    grid = picture.draw(codec, picture.find(codec.experiment))
    assert [row.split("\n")[0] for row in grid.rows] == ["towards large = 1"] * 2 and [
        len(row) for row in grid.cells
    ] == [6, 6]
    z = moved[0].view(2, 5, -1).double()
    direction = F.normalize(z[0, 4] - z[0, 0], dim=0)
    positions = codec.train_z.double() @ direction
    ends = torch.stack([positions.min(), positions.max()])
    torch.testing.assert_close((z @ direction)[:, [0, 4]], ends.expand(2, 2), rtol=1e-3, atol=1e-3)
    assert positions[train.labels > 4].mean() > positions[train.labels <= 4].mean()
    for wrong, expected in (
        ("huge", "no column huge: the columns are large, never"),
        ("never", "column never has the"),
    ):
        with pytest.raises(ConfigError, match=expected):
            Directions(column=wrong).find(codec.experiment)
    with pytest.raises(ConfigError, match="--class and --column are both given"):
        Directions(column="large", class_name="3")
    monkeypatch.setattr(train, "attributes", None)
    with pytest.raises(ConfigError, match="the images have no attributes"):
        picture.find(codec.experiment)
