"""Tests of the measures of test.py --measures, against other libraries, closed forms and hand-made cases."""

import colorsys
import io
import json
import logging
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor

import test as judge_program
import train as train_program
from config.errors import UserError
from datasets.images import StoredImages
from evaluation import corruptions, dci, hypersphere, logistic_regression
from evaluation import shapes as shapes_module
from evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt, disk
from evaluation.factors import open_factors
from evaluation.features import random_subset
from evaluation.hypersphere import alignment, uniformity
from evaluation.knn import neighbour_distances
from evaluation.measures import MEASURES, anomalies, attributes, disentanglement, few_labels, prior, robustness
from evaluation.measures import subjects as subjects_module
from evaluation.measures.anomalies import Anomalies
from evaluation.measures.attributes import Attributes, probe
from evaluation.measures.base import Inputs, Measured
from evaluation.measures.disentanglement import Disentanglement
from evaluation.measures.few_labels import FewLabels
from evaluation.measures.robustness import Robustness, corruption_error, mean_accuracy
from evaluation.measures.subjects import Subjects, standardized
from evaluation.measures.uniformity import Uniformity
from evaluation.shapes import FACTORS, Shapes, draw_shapes
from experiment.batch import view_draw
from tests.conftest import digits_args, experiment_of, write_images
from utils.distributed.collectives import SharedError
from utils.files import FolderError
from utils.randomness import generator

# Parameters at severities 1 to 5, in make_cifar_c.py of github.com/hendrycks/robustness (ImageNet-C/create_c).
PUBLISHED: dict[str, list[Any]] = {
    "gaussian noise": [0.04, 0.06, 0.08, 0.09, 0.10],
    "shot noise": [500, 250, 100, 75, 50],
    "impulse noise": [0.01, 0.02, 0.03, 0.05, 0.07],
    "speckle noise": [0.06, 0.1, 0.12, 0.16, 0.2],
    "gaussian blur": [0.4, 0.6, 0.7, 0.8, 1],
    "defocus blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    "zoom blur": [np.arange(1, end, 0.01) for end in (1.06, 1.11, 1.16, 1.21, 1.26)],
    "contrast": [0.75, 0.5, 0.4, 0.3, 0.15],
    "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],
    "jpeg compression": [80, 65, 58, 50, 40],
    "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],
}
COLUMNS = {
    "disentanglement": ["trained", "untrained", "principal components"],
    "attributes": ["trained", "untrained", "raw pixels", "chance"],
    "prior": ["mixture", "real images"],
    "reconstruction": ["z and its x_T", "z and random x_T", "mean image"],
    "memorization": ["mixture", "z of test images", "test images"],
}
PIXELS = {"raw pixels": lambda views, _: {"z": views.flatten(1)}}


def random_images(count: int = 6, size: int = 32) -> Tensor:
    """Returns smooth random images (count, 3, size, size) uint8, with all levels."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, (size, size), mode="bilinear") * 1.4 - 0.2).clamp(0, 1).mul(255).byte()


def made_by(function: Any, pixels: Tensor) -> Tensor:
    """Returns function(image (H, W, 3) in [0, 1]) of each image, cut off to levels as in the benchmark."""
    images = [function(image.permute(1, 2, 0).double().numpy() / 255) for image in pixels]
    levels = [np.uint8(np.clip(image, 0, 1) * 255 + 1e-3) for image in images]
    return torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2)


def blurred_disk(image: np.ndarray, radius: float, sigma: float) -> np.ndarray:
    """Returns the benchmark's defocus blur: a disk of 17 x 17 pixels, smoothed by a Gaussian of 3 x 3."""
    line = np.arange(-8, 9)
    inside = (line[:, None] ** 2 + line**2 <= radius**2).astype(float)
    weights = np.exp(-(np.arange(-1, 2) ** 2) / (2 * sigma**2))
    kernel = scipy.ndimage.correlate(inside / inside.sum(), np.outer(weights, weights) / weights.sum() ** 2)
    return np.stack([scipy.ndimage.correlate(image[..., c], kernel, mode="mirror") for c in range(3)], axis=2)


def zoomed(image: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Returns the benchmark's zoom blur, with scipy's zoom."""
    size, total = len(image), image.copy()
    for factor in factors:
        cut = math.ceil(size / factor)
        start = (size - cut) // 2
        middle = image[start : start + cut, start : start + cut]
        enlarged = scipy.ndimage.zoom(middle, (factor, factor, 1), order=1)
        start = (len(enlarged) - size) // 2
        total += enlarged[start : start + size, start : start + size]
    return total / (len(factors) + 1)


def brighter(image: np.ndarray, amount: float) -> np.ndarray:
    """Returns an image whose value V in HSV is higher, by Python's colorsys."""

    def change(rgb: np.ndarray) -> tuple[float, float, float]:
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb(hue, saturation, min(value + amount, 1))

    return np.apply_along_axis(change, 2, image)


def by_pillow(image: np.ndarray, kind: str, parameter: float) -> np.ndarray:
    """Returns an image that Pillow pixelates or compresses."""
    picture = Image.fromarray((image * 255).round().astype(np.uint8))
    if kind == "pixelate":
        small = picture.resize((int(32 * parameter), int(32 * parameter)), Image.Resampling.BOX)
        return np.asarray(small.resize((32, 32), Image.Resampling.BOX)) / 255
    stored = io.BytesIO()
    picture.save(stored, "JPEG", quality=int(parameter))
    return np.asarray(Image.open(stored)) / 255


@pytest.mark.parametrize("severity", SEVERITIES)
def test_corruptions_without_noise_against_other_libraries(severity: int) -> None:
    pixels = random_images()
    pixels[0, :, 3:6, 3:6] = 0  # black has no hue
    expected = {
        "gaussian blur": lambda x, sigma: scipy.ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest"),
        "defocus blur": lambda x, shape: blurred_disk(x, *shape),
        "zoom blur": zoomed,
        "brightness": brighter,
        "contrast": lambda x, factor: x.mean((0, 1)) + factor * (x - x.mean((0, 1))),
        "pixelate": lambda x, factor: by_pillow(x, "pixelate", factor),
        "jpeg compression": lambda x, quality: by_pillow(x, "jpeg", quality),
    }
    assert PUBLISHED.keys() == CORRUPTIONS.keys()
    for kind, function in expected.items():
        parameter = PUBLISHED[kind][severity - 1]
        reference = made_by(lambda image, f=function, p=parameter: f(image, p), pixels)
        found = corrupt(pixels, range(len(pixels)), kind, severity, 0)
        assert (found.int() - reference.int()).abs().max() <= 1, kind  # float32 may cut off to the next level
        assert not torch.equal(found, pixels), kind
    assert disk(1.5, 0.1).sum() == pytest.approx(1) and (disk(1.0, 0.1) > 0.1).sum() == 5


def test_noise_has_the_stated_distribution_and_belongs_to_the_image() -> None:
    grey = torch.full((64, 3, 32, 32), 102, dtype=torch.uint8)  # 0.4
    for severity in SEVERITIES:
        for kind, std in (
            ("gaussian noise", PUBLISHED["gaussian noise"][severity - 1]),
            ("speckle noise", 0.4 * PUBLISHED["speckle noise"][severity - 1]),
            ("shot noise", (0.4 / PUBLISHED["shot noise"][severity - 1]) ** 0.5),
        ):
            found = corrupt(grey, range(64), kind, severity, 0).float() / 255
            assert found.mean().item() == pytest.approx(0.4 - 0.5 / 255, abs=1e-3), kind  # fractions are cut off
            assert found.std().item() == pytest.approx(std, rel=0.02), kind
        found = corrupt(grey, range(64), "impulse noise", severity, 0)
        amount = PUBLISHED["impulse noise"][severity - 1]
        for level in (0, 255):
            assert (found == level).float().mean().item() == pytest.approx(amount / 2, rel=0.1)
    for kind in CORRUPTIONS:
        few = corrupt(grey[:4], range(10, 14), kind, 3, 0)
        assert torch.equal(few[2:], corrupt(grey[:2], range(12, 14), kind, 3, 0))
        assert "noise" not in kind or not torch.equal(few, corrupt(grey[:4], range(10, 14), kind, 3, 1))


def test_the_mean_corruption_error_by_hand() -> None:
    accuracies = {("blur", "z"): [90.0, 70.0], ("blur", "raw pixels"): [80.0, 40.0]}
    accuracies |= {("noise", "z"): [50.0, 30.0], ("noise", "raw pixels"): [60.0, 40.0]}
    assert corruption_error(accuracies, "z") == pytest.approx((100 * 40 / 80 + 100 * 120 / 100) / 2)
    assert corruption_error(accuracies, "raw pixels") == 100
    assert mean_accuracy(accuracies, "z") == 60
    accuracies["noise", "raw pixels"] = [100.0, 100.0]
    assert corruption_error(accuracies, "z") is None


def test_accuracy_on_corrupted_images_against_scikit_learn(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, kinds = experiment_of(tmp_path), ("brightness", "gaussian blur")
    monkeypatch.setattr(corruptions, "CORRUPTIONS", {name: CORRUPTIONS[name] for name in kinds})
    train, test, views = experiment.train, experiment.test, experiment.views
    rows = Robustness().measure(Subjects(experiment, PIXELS, "z")).rows
    chosen = random_subset(test, 50, experiment.config.seed, "corrupted images").indices

    def unit(pixels: torch.Tensor) -> np.ndarray:
        return F.normalize(views.evaluation(pixels).flatten(1), dim=1).double().numpy()

    theirs, accuracies = KNeighborsClassifier(20, algorithm="brute").fit(unit(train.pixels), train.labels), {}
    for name in kinds:
        for severity in range(1, 6):
            corrupted = corrupt(test.pixels[chosen], range(50), name, severity, experiment.config.seed)
            accuracies[severity] = 100 * theirs.score(unit(corrupted), test.labels[chosen])
        expected = np.mean(list(accuracies.values()))
        assert rows[f"k-NN, {name}"]["raw pixels"]["value"] == pytest.approx(expected, abs=0.01), name
    assert accuracies[5] < accuracies[1] - 10, "more blur must lower the accuracy, or this test sees nothing"
    assert rows["k-NN, mean corruption error"]["raw pixels"]["value"] == 100


def test_few_labels_against_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw is nested in larger ones, and each number is that of scikit-learn for the same labelled images."""
    monkeypatch.setattr(few_labels, "DRAWS", 2)
    monkeypatch.setattr(few_labels, "COUNTS", (1, 5, 1000))
    subjects = Subjects(experiment_of(tmp_path), PIXELS, "z")
    measured = FewLabels().measure(subjects)
    orders = few_labels._orders(subjects)
    train, test = subjects.train["raw pixels"], subjects.test["raw pixels"]
    labels, test_labels = subjects.train_labels, subjects.test_labels
    assert list(measured.rows) == [f"{kind}, {n} per class" for kind in ("k-NN", "logistic") for n in (1, 5)]
    for count in (1, 5):
        expected: dict[str, list[float]] = {"k-NN": [], "logistic": []}
        for order in orders:
            chosen = order[:, :count].flatten()
            assert labels[chosen].bincount().tolist() == [count] * 10
            bank, queries = F.normalize(train[chosen]), F.normalize(test)
            knn = KNeighborsClassifier(min(20, 10 * count), weights=lambda d: np.exp((1 - d**2 / 2) / 0.1))
            expected["k-NN"].append(100 * knn.fit(bank, labels[chosen]).score(queries, test_labels))
            scaled, scaled_test = standardized(train[chosen], train), standardized(test, train)
            logistic = LogisticRegression(max_iter=1000).fit(scaled, labels[chosen])
            expected["logistic"].append(100 * logistic.score(scaled_test, test_labels))
        for kind, values in expected.items():
            cell = measured.rows[f"{kind}, {count} per class"]["raw pixels"]
            assert cell["value"] == pytest.approx(np.mean(values), abs=0.3)
            assert cell["deviation"] == pytest.approx(np.std(values, ddof=1), abs=0.5)
    assert not torch.equal(orders[0], orders[1])


def test_scores_of_anomalies_against_scikit_learn() -> None:
    """The distances are those to the rest of the bank, also if a class has fewer entries than neighbours are needed."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(300, 8, generator=generator), torch.randn(50, 8, generator=generator)
    labels = torch.randint(4, (300,), generator=generator)
    labels[labels == 3] = 0
    labels[:2] = 3
    test_labels = torch.arange(50) % 4
    scores = anomalies.held_out_scores(bank, labels, queries)
    found = anomalies.held_out_aurocs(scores, test_labels)
    for label in range(4):
        rest = bank[labels != label]
        expected = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(rest).kneighbors(queries)[0][:, -1]
        np.testing.assert_allclose(scores[:, label], expected, rtol=1e-4)
        assert found[label] == pytest.approx(100 * roc_auc_score(test_labels == label, expected), abs=0.2)
    np.testing.assert_allclose(
        neighbour_distances(bank + 30, queries + 30, 7),
        NearestNeighbors(n_neighbors=7, algorithm="brute").fit(bank).kneighbors(queries)[0],
        rtol=1e-3,
    )


def test_the_auroc_by_hand() -> None:
    # Of the 6 pairs, 4 are in the right order, and 1 is a tie.
    assert anomalies.auroc(torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0, 2.0])) == pytest.approx(100 * 4.5 / 6)
    separated = torch.tensor([[5.0, 0.0], [1.0, 5.0], [1.0, 4.0]])
    assert anomalies.held_out_aurocs(separated, torch.tensor([0, 1, 1])) == {0: 100.0, 1: 100.0}


def test_a_latent_that_is_the_factors_is_disentangled_and_a_rotation_is_not() -> None:
    factors = Shapes(4000, 8, 0).factors.numpy()
    scaled = (factors - factors.mean(0)) / factors.std(0)
    noise = np.random.default_rng(0).normal(size=(4000, 3))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]

    def scores(latent: np.ndarray) -> dict[str, float]:
        found = {"mig": dci.mutual_information_gap(latent, factors)}
        for kind, fit in dci.REGRESSORS.items():
            fits = [fit(latent, factor, 3000, 0) for factor in factors.T]
            importances = np.stack([each for each, *_ in fits], axis=1)
            found[f"{kind} d"] = dci.disentanglement(importances)
            found[f"{kind} c"] = dci.completeness(importances)
            found[f"{kind} i"] = float(np.mean([r2 for _, r2, _ in fits]))
        return found

    ideal, rotated = scores(np.concatenate([scaled, noise], axis=1)), scores(scaled @ rotation)
    assert min(ideal.values()) > 0.95
    assert all(rotated[name] < 0.5 for name in ("mig", "lasso d", "lasso c", "forest d", "forest c"))
    assert rotated["lasso i"] > 0.95  # a rotation keeps what the latent says
    # One feature for two factors: entropy log 2 of log K. One factor in two features: entropy log 2 of log D.
    by_hand = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert dci.disentanglement(by_hand) == pytest.approx((2 * (1 - math.log(2, 3)) + 1 + 1) / 4)
    assert dci.completeness(by_hand) == pytest.approx((1 + 1 + 1 - math.log(2, 4)) / 3)


def test_a_table_gives_factors_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images whose brightness is one factor: R^2 of raw pixels is high for it, and low for random numbers."""
    source = np.random.default_rng(0)
    lines = ["file,brightness,azimuth_degrees,noise"]
    for i in range(80):
        Image.new("RGB", (8, 8), (3 * i,) * 3).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{i},{source.integers(360)},{source.normal()}")
    table = tmp_path / "factors.csv"
    table.write_text("\n".join(lines))
    experiment = experiment_of(tmp_path)
    known = open_factors(table, 100, experiment)
    assert known.names == ["brightness", "cos of azimuth", "sin of azimuth", "noise"] and known.values.shape == (80, 4)
    assert known.values[:, 1:3].norm(dim=1).numpy() == pytest.approx(1)
    drawn = open_factors(table, 50, experiment)
    (pixels,) = drawn.images.batches([range(50)])
    assert torch.equal(pixels[:, 0, 0, 0].double(), 3 * drawn.values[:, 0]) and len(drawn.values.unique(dim=0)) == 50
    assert drawn.title == "50 of the 80 images of factors.csv"
    monkeypatch.setattr(dci, "TREES", 5)
    subjects = Subjects(experiment, {"raw pixels": lambda x, _: {"z": x.flatten(1)}}, "z", Inputs(factors=known))
    rows = Disentanglement().measure(subjects).rows
    (column,) = rows["lasso, R² of brightness"]
    assert rows["lasso, R² of brightness"][column]["value"] > 0.99 > 0.5 > rows["lasso, R² of noise"][column]["value"]
    few = Inputs(factors=open_factors(table, 30, experiment))
    assert (
        Disentanglement().obstacle(experiment, few) == "it needs 40 images that can be read in the table of --factors"
    )
    only = Inputs(factors=replace(known, names=known.names[:1], values=known.values[:, :1]))
    assert Disentanglement().obstacle(experiment, only) == "it needs two factors that vary in the table of --factors"

    # Constant factors are left out, also a cosine or a sine that differs from a constant by rounding errors.
    for angles, expected_names in (((90, -90), ["sin of a"]), ((0, 180), ["cos of a"]), ((0, 360), [])):
        table.write_text("\n".join(["file,a_degrees,b,c", *(f"{i}.png,{a},{i},7" for i, a in enumerate(angles))]))
        assert open_factors(table, 100, experiment).names == [*expected_names, "b"]
    (tmp_path / "0.png").write_bytes(b"damaged")
    table.write_text("file,a\n0.png,1\n1.png,2\n2.png,3")
    skipping = experiment_of(tmp_path, "data.unreadable=skip")
    assert open_factors(table, 100, skipping).values.sort(dim=0).values.tolist() == [[2], [3]]
    table.write_text("file,a\n0.png,1\n1.png,2\n2.png,2")
    with pytest.raises(UserError, match="each factor has only one value"):  # the damaged image had another one
        open_factors(table, 100, skipping)
    for text, expected in (
        ("file,a\n\n0.png,1\n1.png,x", "line 4 of {table} is not a path and 1 number: correct it"),
        ("file,a\n0.png,1,2", "line 2 of {table} is not a path and 1 number: correct it"),
        ("file,a\n1.png,1\n2.png,1", "{table}, each factor has only one value"),
        ("file,a,a\n0.png,1,2", "{table} has two columns of one name: rename one"),
        (
            "0.png,1\n1.png,2",
            "the first line of {table} has only numbers after its first cell: add a heading, or rename the columns",
        ),
        ("file\n0.png", "{table} has no factors: give it a heading, a column of files, and columns of numbers"),
        ("file,a\n0.png,1\nnone.png,2", "none.png"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=re.escape(expected.format(table=table))):
            open_factors(table, 100, experiment)
    with pytest.raises(UserError, match="cannot read"):
        open_factors(tmp_path / "none.csv", 100, experiment)


def test_the_mutual_information_gap_in_closed_form() -> None:
    """A feature that is the factor shares its entropy log 4 with it; one that knows only its half shares log 2."""
    factor = np.arange(400)[:, None] % 4 * 1.0
    half = np.floor(factor / 2)
    unrelated = (np.arange(400)[:, None] // 4 % 10) * 1.0
    assert dci.mutual_information_gap(np.hstack([factor, unrelated]), factor) == pytest.approx(1)
    assert dci.mutual_information_gap(np.hstack([factor, half]), factor) == pytest.approx(0.5)
    assert dci.mutual_information_gap(half, factor) == pytest.approx(0.5)
    assert dci.mutual_information_gap(np.zeros((400, 2)), factor) == 0


def test_shapes_have_the_factors_that_they_state() -> None:
    shapes = Shapes(60, 64, 3)
    (pixels,) = shapes.batches([range(60)])
    assert torch.equal(pixels[7:9], next(shapes.batches([torch.tensor([7, 8])])))
    for image, factors in zip(pixels, shapes.factors, strict=True):
        size, horizontal, vertical, hue, _ = factors.tolist()
        distance = (image.float() - 127.5).abs().sum(0)
        mask = (distance > 40).double()
        rows, columns = torch.where(mask > 0)
        assert rows.min() > 0 and columns.min() > 0 and rows.max() < 63 and columns.max() < 63
        centre = [(columns.double().mean() + 0.5) / 64, (rows.double().mean() + 0.5) / 64]
        assert centre == pytest.approx([horizontal, vertical], abs=size / 2)  # a triangle's centre is lower
        inner = image[:, rows, columns].float()[:, distance[rows, columns] > distance.max() - 3].mean(1) / 255
        assert colorsys.rgb_to_hsv(*inner.tolist())[0] == pytest.approx(hue, abs=0.02)
    low, high = torch.tensor(list(FACTORS.values())).T
    assert (shapes.factors >= low).all() and (shapes.factors <= high).all()
    # A rectangle has an area of 2 size^2, an ellipse pi/2 size^2, a triangle size^2.
    middle = torch.tensor([[0.25, 0.5, 0.5, 0.0, angle] for angle in (0.0, 30.0, -45.0)]).repeat_interleave(3, dim=0)
    drawn = draw_shapes(middle, torch.tensor([0, 1, 2] * 3), 64)
    with mock.patch.object(shapes_module, "MAX_POINTS", 2 * 256**2):  # two at a time
        assert torch.equal(draw_shapes(middle, torch.tensor([0, 1, 2] * 3), 64), drawn)
    areas = (drawn[:, 0].float() - 128).div(127).mean(dim=(1, 2))  # red: the first channel is 255 inside
    assert areas.tolist() == pytest.approx([2 / 16, math.pi / 32, 1 / 16] * 3, abs=2e-3)


def test_alignment_and_uniformity_in_closed_form() -> None:
    x = torch.eye(4)
    assert alignment(x, 3 * x) == pytest.approx(0, abs=1e-6) and alignment(x, -x) == pytest.approx(4)
    assert alignment(x, x.roll(1, 0)) == pytest.approx(2)
    assert uniformity(5 * x) == pytest.approx(-4) and uniformity(torch.ones(7, 3)) == pytest.approx(0, abs=1e-6)
    # Among x, -x and an orthogonal vector, the squared distances are 4, 2 and 2.
    mixed = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert uniformity(mixed) == pytest.approx(math.log((math.exp(-8) + 2 * math.exp(-4)) / 3))


def test_alignment_and_uniformity_of_views_drawn_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two source views of each chosen image, by its position. Uniformity is that of the first views."""
    monkeypatch.setattr(hypersphere, "MAX_IMAGES", 30)
    experiment = experiment_of(tmp_path, "evaluation.batch_size=8")
    seed, test = experiment.config.seed, experiment.test
    assert test is not None
    indices = torch.randperm(len(test), generator=generator(seed, "alignment images"))[:30].sort().values
    (pixels,) = test.batches([indices])
    views = [
        experiment.views.augmented(
            pixels, view_draw(seed, range(30), "alignment view", number), experiment.config.views.source
        )
        for number in (0, 1)
    ]
    assert not torch.equal(*views)
    first, second = (F.normalize(each.flatten(1).double()) for each in views)
    squares = torch.cdist(first, first).square()[tuple(torch.triu_indices(30, 30, 1))]
    expected = ((first - second).square().sum(dim=1).mean().item(), squares.mul(-2).exp().mean().log().item())
    encoders = {"pixels": lambda views, _: {"z": 3 * views.flatten(1)}}
    found = hypersphere.alignment_and_uniformity(experiment, encoders, "z")
    assert found == {"pixels": pytest.approx(expected, rel=1e-4)}


def test_probes_of_attributes_against_scikit_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A feature that is the attribute is perfect. Scores are computed on images that are not fitted."""
    experiment = experiment_of(tmp_path)
    images = experiment.train
    assert isinstance(images, StoredImages) and images.labels is not None
    images.attributes = torch.stack([images.labels > 6, images.labels % 2 == 0, images.labels < 0], dim=1).byte()
    images.attribute_names = ["large", "even", "never"]
    measured = Attributes().measure(Subjects(experiment, PIXELS, "z"))
    plan = attributes._Plan.of(experiment)
    assert (len(plan.values), plan.num_train, plan.columns) == (1437, 1150, [0, 1])
    views = experiment.views.evaluation(images.pixels[plan.chosen]).flatten(1)
    scaled, values = standardized(views, views[:1150]).numpy(), images.attributes[plan.chosen].numpy()
    model = LogisticRegression(class_weight="balanced", max_iter=1000).fit(scaled[:1150], values[:1150, 1])
    scores, truth = model.decision_function(scaled[1150:]), values[1150:, 1]
    expected = 100 * average_precision_score(truth, scores), 100 * balanced_accuracy_score(truth, scores > 0)
    found = tuple(
        measured.rows[f"{row}, even"]["raw pixels"]["value"] for row in ("average precision", "balanced accuracy")
    )
    assert found == pytest.approx(expected, abs=0.1)
    assert measured.rows["average precision, large"]["chance"]["value"] == pytest.approx(100 * values[1150:, 0].mean())
    values = np.arange(100) % 3 == 0
    assert probe(values[:, None] * 2.0 - 1, values, 50) == (100, 100, True)
    monkeypatch.setattr(attributes, "MAX_ITERATIONS", 2)
    with caplog.at_level("INFO"):
        Attributes().measure(Subjects(experiment, PIXELS, "z"))
    (line,) = caplog.messages[-1:]
    assert line.startswith("attributes: 2 of 2 fits of logistic regression stopped after 2 iterations")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the measures fast: fewer draws, images, corruptions, strengths and trees."""
    monkeypatch.setattr(few_labels, "DRAWS", 2)
    monkeypatch.setattr(few_labels, "COUNTS", (1, 5))
    monkeypatch.setattr(anomalies, "MAX_OTHERS", 50)
    monkeypatch.setattr(robustness, "MAX_IMAGES", 50)
    monkeypatch.setattr(logistic_regression, "STRENGTHS", (1e-2,))
    monkeypatch.setattr(corruptions, "CORRUPTIONS", {name: CORRUPTIONS[name] for name in ("contrast", "shot noise")})
    monkeypatch.setattr(disentanglement, "NUM_TRAIN", 60)
    monkeypatch.setattr(disentanglement, "NUM_TEST", 20)
    monkeypatch.setattr(dci, "TREES", 2)
    monkeypatch.setattr(prior, "MAX_LATENTS", 50)
    monkeypatch.setattr(subjects_module, "NUM_RECONSTRUCTED", 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of one epoch on digits."""
    folder = tmp_path_factory.mktemp("measures") / "run"
    assert train_program.main(digits_args(folder)) == 0
    return folder


def stored(folder: Path) -> dict[str, Any]:
    """Returns the contents of results.json."""
    return json.loads((folder / "results.json").read_text())


def test_all_measures_are_printed_and_kept_with_the_results(
    run: Path, small: None, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    args, table = digits_args(run), stored(run)["table"]
    capsys.readouterr()
    assert judge_program.main([*args, "--measures", "all", "--num_samples", "20"]) == 0
    printed = capsys.readouterr().out.strip().split("\n\n")
    assert "skipping the measure attributes: it needs attributes" in caplog.text
    assert "generated images per prior, not" not in caplog.text
    assert "skipping the measure lpips: it needs torchvision's AlexNet weights, which are not downloaded" in caplog.text
    measures = stored(run)["measures"]
    not_applied = {"attributes", "lpips", "fid", "feature_distance"}
    assert list(measures) == [name for name in MEASURES if name not in not_applied] and stored(run)["table"] == table
    for text, (name, found) in zip(printed, measures.items(), strict=True):
        title, heading, _, *lines = text.splitlines()
        assert title == f"{name}: {found['protocol']}"
        columns = COLUMNS.get(name, ["trained", "untrained", "raw pixels"])
        assert re.split("  +", heading.strip()) == columns and len(lines) == len(found["rows"])
        for row, cells in found["rows"].items():
            assert list(cells) == columns and all(math.isfinite(cell["value"]) for cell in cells.values()), row

    # A single measure replaces its own entry, here an old one. The evaluation that train.py repeats keeps all measures.
    old = {"protocol": "old", "rows": {}, "decimals": 1}
    (run / "results.json").write_text(json.dumps(stored(run) | {"measures": measures | {"uniformity": old}}))
    assert judge_program.main([*args, "--measures", "uniformity", "data.image_size=8"]) == 0
    assert "the measure uniformity in results.json replaced one with another protocol: old" in caplog.text
    assert train_program.main(args) == 0
    assert stored(run)["measures"] == measures
    # A checkpoint without the results of its step leaves no results.
    copied = Path(shutil.copy(run / "checkpoints" / "last.pt", tmp_path))
    assert judge_program.main(["--checkpoint", str(copied), "device=cpu", "--measures", "uniformity"]) == 0
    assert f"{tmp_path / 'results.json'} is not that of step 22 of this run" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_measures_and_accuracies_of_any_images_are_written_to_a_file(
    run: Path, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "other", train_a=20, train_b=20, test_a=1, test_b=1)
    files = [f"data.root={tmp_path / 'other'}", f"data.cache_dir={tmp_path / 'cache'}"]
    checkpoint = ["--checkpoint", str(run / "checkpoints" / "last.pt"), "device=cpu"]
    others, file = [*checkpoint, "data.name=folder", *files], tmp_path / "new" / "others.json"
    uniformity, accuracies = ["--measures", "uniformity"], ["--protocols", "config"]
    before = stored(run)

    def contents() -> dict[str, Any]:
        return dict(json.loads(file.read_text()))

    # Accuracies and measures are merged by name.
    assert judge_program.main([*others, *accuracies, "--results", str(file)]) == 0
    table = contents()["table"]
    assert len(table) == 2 and "measures" not in contents()
    file.write_text(json.dumps(contents() | {"table": table | {"another protocol": {}}}))
    assert judge_program.main([*others, *uniformity, "--results", str(file)]) == 0
    assert judge_program.main([*others, *accuracies, "--results", str(file)]) == 0
    assert contents()["table"] == table | {"another protocol": {}} and contents()["measures"].keys() == {"uniformity"}
    assert stored(run) == before

    # A file of other images, other test images or another checkpoint is left as it is, and so is any other file.
    kept = file.read_text()
    copied = tmp_path / "copied.pt"
    torch.save({**torch.load(checkpoint[1], weights_only=True), "tally": {}}, copied)
    shutil.copytree(tmp_path / "other", tmp_path / "fewer")
    (tmp_path / "fewer" / "test" / "a" / "0.png").rename(tmp_path / "fewer" / "test" / "b" / "1.png")
    of_fewer = [f"data.root={tmp_path / 'fewer'}" if word.startswith("data.root=") else word for word in others]
    of_copied = [str(copied) if word == checkpoint[1] else word for word in others]
    for words, path in (
        *((words, file) for words in (checkpoint, of_fewer, of_copied)),
        (others, run / "results.json"),
        (others, run / "config.yaml"),
    ):
        with pytest.raises(SystemExit, match="2"):
            judge_program.main([*words, *accuracies, "--results", str(path)])
        known = "has no results of this checkpoint and these images" if path == file else "is not a file of --results"
        expected = f"error: {path} {known}: set --results to another file\n"
        assert capsys.readouterr().err.endswith(expected), words
    assert file.read_text() == kept and stored(run) == before

    # So is a file that another program has changed meanwhile.
    def change(self: Uniformity, subjects: Any) -> Measured:
        file.write_text("another program's")
        return Measured("changed", {})

    with monkeypatch.context() as patched:
        patched.setattr(Uniformity, "measure", change)
        with pytest.raises(SystemExit, match="2"):
            judge_program.main([*others, *uniformity, "--results", str(file)])
    assert "others.json was changed by another program: set --results" in capsys.readouterr().err
    assert file.read_text() == "another program's"
    file.write_text(kept)

    # The accuracies are printed if they cannot be written.
    with monkeypatch.context() as patched:
        patched.setattr("evaluation.measures.recording.write_text", mock.Mock(side_effect=OSError(28, "no space left")))
        with pytest.raises(SystemExit, match="2"):
            judge_program.main([*others, *accuracies, "--results", str(file)])
    shown = capsys.readouterr()
    assert "k-NN k=" in shown.out and f"error: cannot write to {file.parent} (no space left)" in shown.err
    assert file.read_text() == kept


def test_results_of_a_run_that_disappear_are_not_created_again(
    run: Path, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    moved = []

    def move(self: Uniformity, subjects: Any) -> Measured:
        moved.append(copied.rename(tmp_path / "moved"))
        return Measured("moved", {})

    monkeypatch.setattr(Uniformity, "measure", move)
    with pytest.raises(SystemExit, match="2"):
        judge_program.main(["--checkpoint", str(copied / "checkpoints" / "last.pt"), "--measures", "uniformity"])
    assert "results.json was changed or removed: restore it and start again" in capsys.readouterr().err
    assert moved and not copied.exists()


def test_results_that_cannot_be_written_do_not_stop_the_measures(
    run: Path,
    small: None,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)

    def refuse(*args: Any, **contents: Any) -> None:
        raise FolderError("cannot write")

    monkeypatch.setattr("evaluation.measures.recording.write_measures", refuse)
    with pytest.raises(SystemExit, match="2"):
        judge_program.main([*digits_args(run), "--measures", "uniformity,reconstruction"])
    shown = capsys.readouterr()
    assert "\nuniformity: " in shown.out and "\nreconstruction: " in shown.out
    assert shown.err == "error: cannot write\n"
    # It is logged at the start that the folder of another user cannot be written.
    denied = mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr("evaluation.measures.recording.check_writable", denied)
    assert judge_program.main([*digits_args(run), "--measures", "uniformity"]) == 0
    assert "results.json cannot be written (Permission denied); test.py --results FILE writes them" in caplog.text


def test_another_data_set_is_a_folder_of_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "noise", train_a=20)
    args = [*digits_args(run), f"data.cache_dir={tmp_path / 'cache'}", "--measures", "anomalies", "--others"]
    assert judge_program.main([*args, str(tmp_path / "noise")]) == 0
    printed = capsys.readouterr().out
    assert "last row: 20 images of another data set" in printed
    assert float(printed.splitlines()[-1].split()[-1]) > 95, "raw pixels of noise are far from all digits"


def test_mistakes_in_the_choice_of_measures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, expected in (
        (["--measures", "few,all"], "there is no measure 'few': choose from all, few_labels, robustness, "),
        (
            ["--measures", "attributes"],
            "the measure attributes was not computed: it needs attributes (0/1 columns of data.labels)",
        ),
        (
            ["--measures", "uniformity", "--others", "x"],
            "--others x is for the measure anomalies: add anomalies to --measures",
        ),
        (["--measures", "all", "--others", "x"], "no folder x: set --others to a folder with images"),
        (["--measures", "all", "--out", "x"], "--out x is for the report: add --report"),
    ):
        with pytest.raises(SystemExit, match="2"):
            judge_program.main([*digits_args(run), *words])
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and expected in said
    experiment = experiment_of(tmp_path)
    subjects = Subjects(experiment, {"raw pixels": lambda views, _: {"z": views.flatten(1) / 0}}, "z")
    with pytest.raises(SharedError, match="z of the encoder 'raw pixels' is not finite, so it cannot be measured"):
        FewLabels().measure(subjects)
    assert experiment.test is not None
    monkeypatch.setattr(experiment.train, "labels", torch.zeros(1437, dtype=torch.int64))
    few = "it needs 5 training images that are not of the largest class, and there are only 0"
    assert Anomalies().obstacle(experiment, Inputs()) == few
    assert FewLabels().obstacle(experiment, Inputs()) == "it needs a training image of each class"


def test_images_with_attributes_and_without_labels_are_measured(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "images", 0, flat=70)
    lines = [f"{index}.png {index % 2} {index // 2 % 2}" for index in range(70)]
    (folder / "list.txt").write_text("\n".join(["Even Second", *lines]))
    images = ("data.name=folder", f"data.root={folder}", f"data.cache_dir={tmp_path}", "data.labels=list.txt")
    args = digits_args(tmp_path / "run", *images, "sampling.num_images=0")
    assert train_program.main(args) == 0
    capsys.readouterr()
    assert judge_program.main([*args, "--measures", "all"]) == 0
    measured = [text.split(":")[0] for text in capsys.readouterr().out.strip().split("\n\n")]
    assert measured == ["disentanglement", "attributes", "uniformity", "prior", "reconstruction"]
    rows = stored(tmp_path / "run")["measures"]["attributes"]["rows"]
    names = ["average precision, Even", "average precision, Second", "mean of the attributes, average precision"]
    assert list(rows)[:3] == names
    assert list(rows["average precision, Even"]) == COLUMNS["attributes"]
    for words, expected in (
        (
            ["--measures", "few_labels"],
            "the measure few_labels was not computed: it needs labels of training and test images",
        ),
        ([], "has no test images with labels: set data.root to images with labels"),
    ):
        with pytest.raises(SystemExit, match="2"):
            judge_program.main([*args, *words])
        assert expected in capsys.readouterr().err
