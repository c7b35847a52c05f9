"""Tests of classifiers that are trained with few labels: finetune.py and its rooms."""

import csv
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.sparse import csr_matrix
from sklearn.datasets import make_blobs
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import NearestNeighbors
from sklearn.semi_supervised import LabelSpreading
from torch import nn

import finetune as finetune_program
import train as train_program
from analysis import predictions
from analysis.feature_file import encode_images
from analysis.predictions import open_prediction
from config.errors import ConfigError
from config.finetune_schema import FinetuneConfig
from config.keys import differences
from config.reading import load, load_config, parse
from datasets.images import JoinedImages, StoredImages
from evaluation.measures.subjects import open_others
from experiment.trained import open_trained, read_trained
from model.encoder import Encoder
from model.resnets import ResNetEncoder
from tests.conftest import (
    ROOT,
    assert_equal_states,
    digits_args,
    experiment_of,
    launch_two,
    undocumented_tags,
    write_images,
)
from training.saving import checkpoint_contents
from training.state import initial_state as initial_train_state
from transfer import loop
from transfer.classifier import build_classifier, read_starting_weights
from transfer.draws import Draws
from transfer.graph import align, neighbour_graph, normalized, propagate
from transfer.labelled import choose_labelled, draw_evenly
from transfer.methods import METHODS
from transfer.mixing import draw_pairs, mixed_cross_entropy
from transfer.opening import Task, open_task
from transfer.state import FinetuneState, initial_state
from transfer.step import learning_rates, pairs_of, step_pixels, train_step
from utils import files as files_module
from utils.logging import PhaseTimer

DIGITS = ROOT / "config" / "finetune_digits.yaml"
TINY = [
    *("encoder.weights=", "encoder.width=4", "encoder.latent_dim=8", "device=cpu", "num_labels=20"),
    *("training.batch_size=16", "training.epochs=2", "training.log_every=1", "evaluation.every=2"),
    *("laplacenet.labelled_batch_size=8", "laplacenet.supervised_epochs=1"),
]
# LaplaceNet whose second epoch is the first one with pseudo-labels and mixup.
LAPLACENET = [
    *("method=laplacenet", "laplacenet.num_views=2", "laplacenet.k=10"),
    "laplacenet.mixup_alpha=1",
]


def args_of(folder: Path, *overrides: str) -> list[str]:
    """Returns arguments of finetune.py for a tiny run on digits in `folder`. Later overrides win."""
    return ["--config", str(DIGITS), *TINY, f"output_dir={folder}", *overrides]


def task_of(*overrides: str) -> Task:
    """Returns the opened task of a tiny run on digits."""
    return open_task(load(FinetuneConfig, DIGITS, [*TINY, *overrides]))


def reports_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Returns the reports of a kind in metrics.jsonl."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


# The graph


def test_a_graph_of_eight_points_made_by_hand() -> None:
    """Two squares that one edge joins: a label in each square spreads over its own square.

    Inside a square, each point has two neighbours with weight 1, and the edge between the squares has weight 1 as well.
    """
    edges = [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (3, 4)]
    weights = np.zeros((8, 8))
    for a, b in edges:
        weights[a, b] = weights[b, a] = 1
    graph = normalized(csr_matrix(weights))
    expected = np.zeros((8, 8))
    for a, b in edges:
        expected[a, b] = expected[b, a] = 1 / np.sqrt((3 if a in (3, 4) else 2) * (3 if b in (3, 4) else 2))
    np.testing.assert_allclose(graph.toarray(), expected)
    labels = torch.tensor([0, -1, -1, -1, -1, -1, 1, -1])
    shares = propagate(graph, labels, 2, alpha=0.9, tolerance=1e-12, max_iterations=100)
    solved = np.linalg.solve(np.eye(8) - 0.9 * expected, np.eye(8)[:, [0, 6]])
    solved /= solved.sum(axis=1, keepdims=True)
    solved[[0, 6]] = np.eye(2)
    np.testing.assert_allclose(shares, solved, atol=1e-10)
    assert shares.argmax(dim=1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_labels_spread_as_in_scikit_learn() -> None:
    """The graph is that of scikit-learn's neighbours, and propagation is its LabelSpreading on the same graph."""
    points, classes = make_blobs(120, 6, centers=3, cluster_std=4.0, random_state=0)
    features, k = torch.from_numpy(points).float(), 7
    graph = neighbour_graph(features, k)
    unit = F.normalize(features.double(), dim=1).numpy()
    cosines = unit @ unit.T
    directed = np.where(NearestNeighbors(n_neighbors=k).fit(unit).kneighbors_graph().toarray(), cosines.clip(0), 0)
    weights = np.maximum(directed, directed.T)
    scale = weights.sum(axis=1) ** -0.5
    np.testing.assert_allclose(graph.toarray(), scale[:, None] * weights * scale, atol=1e-6)

    labels = torch.full((120,), -1)
    labels[::10] = torch.from_numpy(classes)[::10].long()
    spreading = LabelSpreading(kernel=lambda a, b: weights, alpha=0.99, max_iter=100_000, tol=1e-10)
    spreading.fit(points, labels.numpy())
    shares = propagate(graph, labels, 3, alpha=0.99, tolerance=1e-10, max_iterations=1000)
    others = labels < 0
    theirs = spreading.label_distributions_ / spreading.label_distributions_.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares[others], theirs[others], atol=1e-4)
    assert torch.equal(shares[~others], F.one_hot(labels[~others], 3).double())


def test_copies_and_points_without_neighbours() -> None:
    """A point with many copies is not its own neighbour, and a point that no label reaches has no class."""
    features = torch.tensor([[1.0, 0.0]] * 5 + [[-1.0, 0.0]])
    graph = neighbour_graph(features, 2)
    assert graph.diagonal().tolist() == [0] * 6 and graph[5].nnz == graph[:, 5].nnz == 0
    labels = torch.tensor([0, -1, -1, -1, -1, -1])
    shares = propagate(graph, labels, 1, alpha=0.99, tolerance=1e-3, max_iterations=30)
    assert shares[:, 0].tolist() == [1, 1, 1, 1, 1, 0]


def test_pseudo_labels_of_three_groups_of_points(caplog: pytest.LogCaptureFixture) -> None:
    """Two groups have a label. No label reaches the third group, whose similarity to the others is negative."""
    caplog.set_level(logging.INFO)
    features = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3 + [[-1.0, -1.0]] * 2)
    given = torch.tensor([0, -1, -1, -1, 1, -1, -1, -1])
    task: Any = SimpleNamespace(
        given_labels=given, labelled=torch.tensor([0, 4]), info=SimpleNamespace(classes=["0", "1"])
    )
    method = METHODS["laplacenet"](load(FinetuneConfig, DIGITS, ["method=laplacenet", "laplacenet.k=50"]))
    assert method.pseudo_labels(task, features).tolist() == [0, 0, 0, 1, 1, 1, -1, -1]
    assert "laplacenet.k=50 is lowered to 7, because there are 8 training images" in caplog.text


def test_alignment_moves_the_classes_towards_the_given_frequencies() -> None:
    shares = torch.tensor([[0.6, 0.4], [0.9, 0.1]], dtype=torch.float64)
    wanted = torch.tensor([0.5, 0.5], dtype=torch.float64)
    once = torch.tensor([[0.6 * 0.99, 0.4 * 1.01], [0.9 * 0.99, 0.1 * 1.01]], dtype=torch.float64)
    torch.testing.assert_close(align(shares, wanted, 1), once / once.sum(dim=1, keepdim=True))
    found = align(torch.rand(500, 4, dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3, 0.4]), 300)
    torch.testing.assert_close(found.mean(dim=0), torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), atol=1e-3, rtol=0)
    assert torch.equal(align(shares, wanted, 0), shares)


# Mixup


def test_mixup_is_cross_entropy_with_mixed_labels() -> None:
    """Images and labels are mixed with the same weight. The loss is torch's with probabilities as labels."""
    torch.manual_seed(0)
    pairs = draw_pairs(12, range(12), 0.7, seed=3, step=5)
    x, labels = torch.randn(12, 3, 4, 4), torch.randint(4, (12,))
    torch.testing.assert_close(pairs.mix(x), pairs.weight * x + (1 - pairs.weight) * x[pairs.partner])
    logits, one_hot = torch.randn(12, 4), F.one_hot(labels, 4).float()
    expected = F.cross_entropy(logits, pairs.weight * one_hot + (1 - pairs.weight) * one_hot[pairs.partner])
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, labels[pairs.partner], pairs.weight), expected)
    assert sorted(pairs.partner.tolist()) == list(range(12))

    plain = draw_pairs(12, range(12), 0.0, seed=3, step=5)
    assert plain.mix(x).equal(x)
    labels[:3] = -1
    found = mixed_cross_entropy(logits, labels, labels, 1.0)
    torch.testing.assert_close(found, F.cross_entropy(logits[3:], labels[3:]) * 9 / 12)


def test_pairs_do_not_depend_on_the_division_of_the_batch() -> None:
    x = torch.arange(16.0)[:, None, None, None]
    whole = draw_pairs(16, range(16), 1.0, seed=0, step=2)
    halves = [draw_pairs(16, share, 1.0, seed=0, step=2) for share in (range(8), range(8, 16))]
    torch.testing.assert_close(whole.mix(x), torch.cat([half.mix(x[half.rows]) for half in halves]))
    weights = [draw_pairs(4, range(4), 2.0, seed=0, step=step).weight for step in range(2000)]
    assert np.mean(weights) == pytest.approx(0.5, abs=0.02)
    assert np.var(weights) == pytest.approx(1 / 20, abs=0.005), "the variance of Beta(2, 2)"


# Labelled images and batches


def test_labelled_images_are_drawn_evenly_and_nested() -> None:
    labels, classes = torch.arange(300) % 3, ["a", "b", "c"]
    small, large = (draw_evenly(labels, classes, count, split=4) for count in (7, 30))
    assert sorted(labels[small].bincount().tolist()) == [2, 2, 3] and labels[large].bincount().tolist() == [10, 10, 10]
    assert set(draw_evenly(labels, classes, 6, split=4).tolist()) <= set(large.tolist())
    assert not torch.equal(large, draw_evenly(labels, classes, 30, split=5))
    for other in ("seed=7", "method=probe", "method=laplacenet"):
        assert torch.equal(task_of(other).labelled, task_of().labelled)


def test_labelled_images_that_are_named_in_a_file(tmp_path: Path) -> None:
    images = StoredImages(torch.zeros(6, 3, 2, 2, dtype=torch.uint8), torch.arange(6) % 2, ["big cat", "dog"])
    images.names = ["a/1.png", "b/2 of 2.png", "a/3.png", "b/4.png", "a/5.png", "b/6,1.png"]
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    path = tmp_path / "labelled.txt"

    def chosen(text: str) -> list[int]:
        path.write_text(text)
        return choose_labelled(load(FinetuneConfig, DIGITS, [f"labelled={path}", "num_labels=null"]), images).tolist()

    assert chosen("b/4.png\na/1.png\n") == [0, 3]
    assert chosen("a/5.png,big cat\nb/2 of 2.png\tdog\nb/4.png dog\n") == [1, 3, 4]
    assert chosen(f"./a/5.png\n{Path('data').absolute()}/train/b/4.png\n") == [3, 4]
    assert chosen("train/a/5.png\ntrain/b/2 of 2.png\ntrain/b/6,1.png\ntrain/b/4.png dog\n") == [1, 3, 4, 5]
    images.names[2], images.classes[1] = f"a/{composed}.png", f"h{decomposed}risson"
    assert chosen(f"a/{decomposed}.png\nb/4.png;h{composed}risson\n") == [2, 3]
    images.names[2], images.classes[1] = "a/3.png", "dog"
    for text, expected in [
        (
            "a/1.png\nc/9.png\n",
            "there is no training image c/9.png: write the path of one relative to .*, such as a/1.png",
        ),
        ("a/1.png;bird\n", "bird of a/1.png is no class: choose from big cat, dog"),
        ("a/1.png;dog\n", "a/1.png is of class big cat in the data set, not dog"),
        ("a/1.png\na/3.png\n", "names no labelled images of the classes dog: add some of each class"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            chosen(text)
    images.names = None
    assert chosen("0\n3 dog\n") == [0, 3]
    with pytest.raises(ConfigError, match="there is no training image 6: write the index of one, such as 0"):
        chosen("0\n6\n")


def test_images_without_labels_from_a_second_folder() -> None:
    first = StoredImages(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 1, 1), torch.arange(5), ["c"])
    second = StoredImages(first.pixels[:3] + 100, torch.zeros(3, dtype=torch.int64), ["other"])
    joined = JoinedImages(first, second)
    wanted: list[range | torch.Tensor] = [torch.tensor([7, 0, 5, 4]), range(3, 6), torch.tensor([1]), torch.tensor([6])]
    found = [batch[:, 0, 0, 0].tolist() for batch in joined.batches(wanted)]
    assert found == [[102, 0, 100, 4], [3, 4, 100], [1], [101]]
    assert joined.labels is not None and joined.labels.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert joined.digest() != first.digest() and len(joined) == 8


def test_each_image_is_used_equally_often() -> None:
    config = load(FinetuneConfig, DIGITS, [*TINY, *LAPLACENET, "training.epochs=4"])
    labelled, unlabelled = torch.arange(0, 20), torch.arange(20, 84)
    draws = Draws(config, METHODS["laplacenet"](config), labelled, unlabelled)
    assert draws.steps_per_epoch == 84 // 16
    first = torch.stack([draws.indices(step) for step in range(5)])  # supervised: 4 rounds of 20 images
    assert first.flatten().bincount(minlength=84).tolist() == [4] * 20 + [0] * 64
    later = torch.stack([draws.indices(step) for step in range(5, 13)])  # one round of 64 images
    assert later[:, 8:].flatten().bincount(minlength=84).tolist() == [0] * 20 + [1] * 64
    assert later[:, :8].flatten().bincount(minlength=20).sort().values.tolist() == [3] * 16 + [4] * 4
    again = Draws(config, METHODS["laplacenet"](config), labelled, unlabelled)
    assert torch.equal(again.indices(10), later[5]), "a run that resumes draws the same"
    few = Draws(config, METHODS["finetune"](config), labelled[:3], unlabelled[:3])
    assert few.steps_per_epoch == 1 and few.indices(0).bincount().tolist() in ([5, 5, 6], [5, 6, 5], [6, 5, 5])


def test_a_folder_with_labels_and_one_without(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images of the second folder get pseudo-labels. Its sub-folders are neither classes nor splits."""
    caplog.set_level(logging.INFO)
    write_images(tmp_path / "labelled", train_a=10, train_b=10, test_a=4, test_b=4)
    write_images(tmp_path / "rest", seed=1, flat=1, train_b=30, test_c=14)
    args = ["--config", str(ROOT / "config" / "finetune_folder.yaml"), *TINY, *LAPLACENET]
    root = tmp_path / "labelled"
    paths = sorted(root.glob("train/*/*"))[1:]  # the folder `train` may be named or not
    named = [path.relative_to(root / "train" if index % 2 else root) for index, path in enumerate(paths)]
    (tmp_path / "list.txt").write_text("\n".join(map(str, named)))
    args += [f"data.root={tmp_path / 'labelled'}", f"unlabelled={tmp_path / 'rest'}", "num_labels=null"]
    args += [f"labelled={tmp_path / 'list.txt'}"]
    args += [f"data.cache_dir={tmp_path / 'cache'}", "data.image_size=8", f"output_dir={tmp_path / 'run'}"]
    assert finetune_program.main(args) == 0
    assert "19 labelled and 46 other training images" in caplog.text
    tasks = [open_task(load(FinetuneConfig, args[1], [*args[2:], f"method={name}"])) for name in METHODS]
    assert [task.steps_per_epoch for task in tasks] == [65 // 16] * 3, "an epoch is equally long for all methods"
    (facts,) = reports_of(tmp_path / "run", "pseudo_labels")
    assert facts["without"] < 100 and "accuracy" in facts, "the true label of one image is known"
    targets = torch.load(tmp_path / "run" / "checkpoints" / "last.pt")["targets"]
    assert targets[1:20].tolist() == [0] * 9 + [1] * 10 and set(targets[20:].tolist()) <= {-1, 0, 1}

    # The classifier labels the second folder, with the run keys of the command.
    (tmp_path / "rest" / "damaged.png").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="2"):
        finetune_program.main([*args, "--predict", str(tmp_path / "rest")])
    assert "or set data.unreadable=skip" in capsys.readouterr().err
    monkeypatch.setattr(files_module, "LOCKS_PARTIALS", False)  # no lock creates the folder `predictions`
    assert finetune_program.main([*args, "data.unreadable=skip", "--predict", str(tmp_path / "rest")]) == 0
    (tmp_path / "rest" / "damaged.png").unlink()
    config = load(FinetuneConfig, args[1], args[2:])
    starting = read_starting_weights(config)
    task = open_task(config, None)
    state = initial_state(task, starting)
    state.load_state_dict(torch.load(tmp_path / "run" / "checkpoints" / "last.pt"))
    files = sorted((tmp_path / "rest").rglob("*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = state.ema.ema_model(task.views.evaluation(pixels)).softmax(dim=1)
    (csv_file,) = (tmp_path / "run" / "predictions").glob("*.csv")
    assert csv_file.stem.endswith("--rest") and csv_file.stem.startswith(tmp_path.parts[1])
    monkeypatch.chdir(tmp_path)
    opened = open_prediction(config, Path("rest"))
    assert opened.path == tmp_path / "run" / "predictions" / "rest.csv"
    images = StoredImages(pixels, None, [])
    logits = encode_images(opened._model.eval(), images, 16, None)["logits"]
    torch.testing.assert_close(logits.softmax(dim=1), expected)
    assert not logits.requires_grad, "otherwise the activations of all images would stay in memory"
    assert {len(open_prediction(config, Path(name)).path.stem) for name in ("rest/train", "rest/../rest")} == {11, 14}
    with open(csv_file, newline="") as file:
        found = {line["file"]: line for line in csv.DictReader(file)}
    assert len(found) == len(files) == 45
    for path, probabilities in zip(files, expected, strict=True):
        line = found[str(path.relative_to(tmp_path / "rest"))]
        assert line["class"] == "ab"[int(probabilities.argmax())]
        assert float(line["probability"]) == pytest.approx(probabilities.max().item(), abs=1e-3)
    with caplog.at_level(logging.INFO):
        amp = config.training.model_copy(update={"use_amp": True})
        open_prediction(config.model_copy(update={"num_labels": 7, "training": amp}), Path("rest"))
    assert "last.pt has other values of num_labels: its own are used" in caplog.text
    with pytest.raises(ConfigError, match="has no checkpoint: train first, by the same command without --predict"):
        open_prediction(config.model_copy(update={"output_dir": str(tmp_path / "none")}), tmp_path / "rest")
    monkeypatch.setattr(predictions, "all_equal", lambda _: False)
    with pytest.raises(ConfigError, match="the processes read different checkpoints from"):
        open_prediction(config, tmp_path / "rest")


def test_one_file_has_the_same_greys_in_all_folders(tmp_path: Path, checkpoint: Path) -> None:
    """The range of greys is that of the encoder's images, else that of the data set, else that of `unlabelled`."""
    for names, largest in (("labelled train a|labelled train b|labelled test a|labelled test b", 1000), ("rest", 4000)):
        for name in names.split("|"):
            folder = tmp_path.joinpath(*name.split())
            folder.mkdir(parents=True)
            for index, value in enumerate((800, largest)):
                Image.fromarray(np.full((8, 8), value, np.uint16)).save(folder / f"{index}.png")
    args = ["--config", str(ROOT / "config" / "finetune_folder.yaml"), *TINY, *LAPLACENET, "num_labels=null"]
    args += [f"data.root={tmp_path / 'labelled'}", f"unlabelled={tmp_path / 'rest'}", "data.image_size=8"]
    args += [f"data.cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'run'}", "training.batch_size=4"]
    args += ["laplacenet.labelled_batch_size=2"]
    config = load(FinetuneConfig, args[1], args[2:])
    for given, bits in ((None, 10), (16, 16)):
        task = open_task(config, grey_bits=given)
        (pixels,) = task.train.batches([torch.tensor([0, 4])])
        assert pixels.unique().tolist() == [800 >> (bits - 8)] and task.info.grey_bits == bits
    experiment = experiment_of(tmp_path, f"data.cache_dir={tmp_path / 'cache'}")
    of_16_bits = replace(experiment, info=replace(experiment.info, grey_bits=16))
    _, others = open_others(tmp_path / "rest", of_16_bits)
    (pixels,) = others.batches([range(2)])
    assert pixels.unique().tolist() == [800 >> 8, 4000 >> 8]

    torch.save(torch.load(checkpoint) | {"grey_bits": 16}, tmp_path / "start.pt")
    place = ["data.name=folder", f"data.root={tmp_path / 'labelled'}", f"data.cache_dir={tmp_path / 'cache'}"]
    experiment, _ = open_trained(read_trained(None, tmp_path / "start.pt", place))
    (pixels,) = experiment.train.batches([range(4)])
    assert pixels.unique().tolist() == [1000 >> 8] and experiment.rules.grey_bits == 16
    args.append(f"encoder.weights={tmp_path / 'start.pt'}")
    assert finetune_program.main(args) == 0
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.pt")["grey_bits"] == 16
    (tmp_path / "start.pt").unlink()
    (tmp_path / "run" / "results.json").unlink()
    assert finetune_program.main(args) == 0, "a run that resumes keeps the range"


# Training


def test_rates_fall_towards_the_first_layers() -> None:
    task = task_of("optimizer.layer_decay=0.5", "optimizer.lr=0.1")
    state = initial_state(task, {})
    assert learning_rates(task, state, 0) == pytest.approx([0.1 / 2**n for n in (5, 4, 3, 2, 1, 0)])
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    groups = [{names[id(each)].split(".")[1] for each in group["params"]} for group in state.optimizer.param_groups]
    assert groups[:5] == [{"conv1", "bn1"}, {"layer1"}, {"layer2"}, {"layer3"}, {"layer4"}]
    assert {names[id(each)] for each in state.optimizer.param_groups[5]["params"]} == {
        *("norm.weight", "norm.bias", "head.weight", "head.bias")
    }
    over_time = initial_state(task_of("encoder.time_dependent=true"), {})
    assert len(over_time.optimizer.param_groups) == 6
    assert over_time.model.encoder.time.mlp[0].weight in over_time.optimizer.param_groups[0]["params"]
    (probe,) = initial_state(task_of("method=probe"), {}).optimizer.param_groups
    assert len(probe["params"]) == 4
    latent = initial_state(task_of("classifier.features=z", "classifier.batch_norm=false"), {})
    assert len(latent.optimizer.param_groups) == 7 and latent.model.head.in_features == 8


def test_an_encoder_of_another_kind_has_groups_of_its_layers() -> None:
    class Plain(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(4))
            self.conv = nn.Conv2d(3, 4, 3)
            self.blocks = nn.Sequential(nn.Conv2d(4, 4, 3))
            self.norm = nn.BatchNorm2d(4)
            self.add_head(4, 8, False, [4], torch.zeros(10))

    encoder = Plain()
    names = {id(parameter): name.split(".")[0] for name, parameter in encoder.named_parameters()}
    groups = [{names[id(each)] for each in group} for group in encoder.layer_groups()]
    assert groups == [{"positions", "time", "conv"}, {"blocks", "norm"}, {"fc"}]
    assert sum(map(len, encoder.layer_groups())) == len(names), "each parameter is in one group"


def test_the_config_holds_the_command_of_the_code_of_diffusion_based_representation_learning() -> None:
    config = load(FinetuneConfig, ROOT / "config" / "laplacenet_cifar10.yaml")
    keys = config.laplacenet
    assert (config.method, config.data.name, config.num_labels, config.label_split) == (
        *("laplacenet", "cifar10", 100, 12),
    )
    assert (config.training.batch_size, keys.labelled_batch_size, config.training.epochs) == (100, 50, 1000)
    assert (keys.num_views, keys.mixup_alpha, keys.supervised_epochs) == (3, 0, 10)
    assert (keys.k, keys.alpha, keys.tolerance, keys.max_iterations, keys.alignment_rounds) == (50, 0.99, 1e-3, 30, 100)
    assert config.encoder.architecture == "wide_resnet28_2" and config.training.checkpoint_every == "1 epochs"
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.03, 0.9, 5e-4)
    assert (optimizer.schedule, optimizer.layer_decay, optimizer.warmup_epochs) == ("cosine", 1.0, 0)
    assert optimizer.max_grad_norm >= 1e6 and not config.classifier.batch_norm
    pretraining = load_config(ROOT / "config" / "drl_cifar10.yaml")
    assert not differences(config, pretraining, run=False, prefixes=("encoder.", "diffusion.", "data."))
    weak, strong = config.views.weak, config.views.strong
    for view, operations in ((weak, 1), (strong, 2)):
        assert (view.crop_scale, view.crop_ratio, view.flip_probability) == ([1, 1], [1, 1], 0.5)
        assert (view.shift_pixels, view.cutout, view.crop_flip_probability) == (4, 0.5, 1)
        assert (view.randaugment_num_ops, view.randaugment_probability) == (operations, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of train.py with a tiny model, before its first step, and with statistics of other images."""
    folder = tmp_path_factory.mktemp("checkpoint")
    experiment = experiment_of(folder, "seed=5")
    path = folder / "start.pt"
    contents = checkpoint_contents(experiment, initial_train_state(experiment))
    torch.save(contents | {"statistics": [[0.4] * 3, [0.3] * 3]}, path)
    return path


def test_a_probe_keeps_the_encoder_of_the_checkpoint_and_fine_tuning_changes_it(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    weights = torch.load(checkpoint)["ema"]["model"]
    encoder = {name.removeprefix("encoder."): each for name, each in weights.items() if name.startswith("encoder.")}
    for method, changes in (("probe", False), ("finetune", True)):
        config = load(FinetuneConfig, DIGITS, [*TINY, f"encoder.weights={checkpoint}", f"method={method}"])
        starting = read_starting_weights(config)
        task = open_task(config, starting["encoder"].statistics)
        assert task.info.mean == (0.4, 0.4, 0.4), "views are normalised as those that the encoder was trained on"
        state = initial_state(task, starting)
        assert_equal_states(state.model.encoder.state_dict(), encoder)
        pixels = step_pixels(task, 0)
        for _ in range(2):
            train_step(task, state, pixels, PhaseTimer())
        for model in (state.model, state.ema.ema_model):
            found = model.encoder.state_dict()
            assert any(not torch.equal(found[name], encoder[name]) for name in encoder) == changes
            assert model.head.weight.abs().sum() > 0
    assert f"the encoder starts from {checkpoint}, the EMA encoder of step 0" in caplog.text


def test_the_timestep_of_a_time_dependent_encoder_is_trained() -> None:
    """It starts in the middle of the timesteps, and its gradient is the slope of the logits, by finite differences.

    Between two timesteps, log sigma is interpolated linearly.
    """
    task = task_of("method=finetune", "encoder.time_dependent=true", "diffusion.num_timesteps=8")
    classifier = build_classifier(task.config, 2).double().eval()
    assert classifier.timestep is not None and classifier.encoder.time is not None
    torch.nn.init.normal_(classifier.head.weight)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = classifier.encoder.pooled(x, torch.tensor([3.5]))
    assert torch.equal(classifier.features(x), expected)
    classifier(x).sum().backward()
    change, sums = 1e-6, []
    for sign in (-1, 1):
        with torch.no_grad():
            classifier.timestep.fill_(sign * change)
            sums.append(classifier(x).sum().item())
    time = classifier.encoder.time
    known = time.log_sigmas.numpy()
    for timestep in (0.0, 3.25, 6.75, 7.0):
        between = time._log_sigmas_at(torch.tensor([timestep])).item()
        assert between == pytest.approx(np.interp(timestep, range(8), known), rel=1e-6)
    assert classifier.timestep.grad is not None and classifier.timestep.grad.abs() > 1e-6
    assert classifier.timestep.grad.item() == pytest.approx((sums[1] - sums[0]) / (2 * change), rel=1e-3)
    assert any(classifier.timestep is each for each in classifier.layer_groups()[-1])


def test_a_step_is_plain_sgd_on_the_mean_over_views_and_pairs() -> None:
    """The gradient of a step of LaplaceNet is that of the formula, computed again from its views."""
    task = task_of(*LAPLACENET, "laplacenet.supervised_epochs=0", "optimizer.max_grad_norm=1e9")
    state = initial_state(task, {})
    state.targets = task.labels.clone()
    with torch.no_grad():
        state.model.head.weight.normal_()
    trained = {name: each for name, each in state.model.named_parameters() if each.requires_grad}
    gradients: dict[str, torch.Tensor] = {}
    state.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: each.grad.clone() for name, each in trained.items()})
    )
    inputs: list[torch.Tensor] = []
    state.model.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    train_step(task, state, step_pixels(task, 0), PhaseTimer())
    pairs, labels = pairs_of(task, 0), task.labels[task.draws.indices(0)]
    assert inputs[0].shape[0] == 32 and pairs.weight not in (0, 1) and not torch.equal(*inputs[0].chunk(2))
    state.model.load_state_dict(before)
    state.model.train().zero_grad()
    soft = pairs.weight * F.one_hot(labels, 10) + (1 - pairs.weight) * F.one_hot(labels[pairs.partner], 10)
    F.cross_entropy(state.model(inputs[0]), soft.float().repeat(2, 1)).backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_weights_follow_sgd_with_nesterov_momentum() -> None:
    """After two steps with the gradients g, b = m b + (g + d w) and w -= lr (g + d w + m b), from b = 0.

    An earlier step, whose gradients are not finite, changes neither the model nor the momentum.
    """
    task = task_of("method=finetune", "optimizer.layer_decay=0.5", "optimizer.weight_decay=0.1")
    state = initial_state(task, {})
    with torch.no_grad():
        state.model.head.weight.normal_()
    parameters = [each for group in state.optimizer.param_groups for each in group["params"]]
    expected, buffers = [each.detach().clone() for each in parameters], [torch.zeros_like(each) for each in parameters]

    def follow(*_: Any) -> None:
        rates = [group["lr"] for group in state.optimizer.param_groups for _ in group["params"]]
        for rate, parameter, weights, buffer in zip(rates, parameters, expected, buffers, strict=True):
            slope = parameter.grad + 0.1 * weights
            buffer.mul_(0.9).add_(slope)
            weights.sub_(rate * (slope + 0.9 * buffer))

    pixels = step_pixels(task, 0)
    model = {name: value.clone() for name, value in state.model.state_dict().items()}
    poison = parameters[-1].register_hook(lambda gradient: gradient * float("nan"))
    assert not train_step(task, state, pixels, PhaseTimer()).isfinite()
    poison.remove()
    assert_equal_states(state.model.state_dict(), model)
    assert not any(state.optimizer.state[each]["momentum_buffer"].any() for each in parameters)
    state.optimizer.register_step_pre_hook(follow)
    for _ in range(2):
        train_step(task, state, pixels, PhaseTimer())
    assert len(parameters) > 20 and all(buffer.abs().max() > 0 for buffer in buffers)
    rates = [group["lr"] for group in state.optimizer.param_groups]
    assert rates == learning_rates(task, state, 2) and rates[0] < rates[-1]
    for parameter, weights in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), weights, rtol=1e-4, atol=1e-5)


def test_a_run_that_died_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies in an epoch with pseudo-labels, and again before new ones are known."""
    more = [*LAPLACENET, "training.batch_size=128", "training.epochs=3", "training.checkpoint_every=4 steps"]
    assert finetune_program.main(args_of(tmp_path / "whole", *more)) == 0  # 11 steps per epoch
    for place, step in (("train_step", 18), ("renew_targets", 22)):
        with monkeypatch.context() as patch:
            patch.setattr(loop, place, dying_at(step, getattr(loop, place)))
            with pytest.raises(RuntimeError, match="died"):
                finetune_program.main(args_of(tmp_path / "died", *more))
        assert torch.load(tmp_path / "died" / "checkpoints" / "last.pt")["step"] == (16 if step == 18 else 22)
    assert finetune_program.main(args_of(tmp_path / "died", *more)) == 0
    ends = [torch.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("died", "whole")]
    assert all(end.pop("config") for end in ends)
    assert_equal_states(*ends)
    # The accuracies of the table are those of the two models of the checkpoint, in evaluation mode.
    task = task_of(*more)
    (pixels,) = task.test.batches([range(len(task.test))])
    state = initial_state(task, {})
    state.load_state_dict(torch.load(tmp_path / "whole" / "checkpoints" / "last.pt"))
    (cells,) = json.loads((tmp_path / "whole" / "results.json").read_text())["table"].values()
    both: list[np.ndarray] = []
    for name, model in (("EMA", state.ema.ema_model), ("last weights", state.model)):
        with torch.no_grad():
            scores = model.eval()(task.views.evaluation(pixels)).numpy()
        both.append(scores)
        expected = [100 * top_k_accuracy_score(task.test.labels, scores, k=k) for k in (1, 3)]
        assert list(cells[name].values()) == pytest.approx(expected, abs=0.01)
    assert not np.allclose(both[0], both[1], rtol=0.01)


def dying_at(step: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` of (task, state, ...), which raises RuntimeError at `step`."""

    def run(task: Task, state: FinetuneState, *rest: Any) -> Any:
        if state.step == step:
            raise RuntimeError("died")
        return function(task, state, *rest)

    return run


@pytest.mark.long
def test_the_script_is_stopped_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """A user starts the script, stops it in an epoch with pseudo-labels, and starts it again.

    Checkpoint and reports equal those of an uninterrupted run. TensorBoard's files and one table are written.
    """
    more = [*LAPLACENET, "training.batch_size=64", "training.epochs=5"]  # 22 steps per epoch
    command = [sys.executable, "finetune.py", *args_of(tmp_path / "stopped", *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "stopped" / "metrics.jsonl"
    while not (log.exists() and log.read_text().count('"kind": "train"') > 30):
        assert begun.poll() is None, begun.stderr and begun.stderr.read()
        time.sleep(0.01)
    begun.send_signal(signal.SIGTERM)
    _, said = begun.communicate(timeout=100)
    assert begun.returncode == 75 and "state saved: run the same command to resume" in said
    stopped_at = torch.load(tmp_path / "stopped" / "checkpoints" / "last.pt")["step"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert 30 < stopped_at < 110 and f"at step {stopped_at} of 110" in done.stderr
    assert done.stdout.count("top-1 / top-3 (%)") == 1 and "laplacenet, 20 labels (split 0)" in done.stdout
    assert list((tmp_path / "stopped" / "tensorboard").glob("events*"))

    assert finetune_program.main(args_of(tmp_path / "whole", *more)) == 0
    ends = [torch.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("stopped", "whole")]
    configs = [parse(FinetuneConfig, end.pop("config"), "").model_copy(update={"output_dir": ""}) for end in ends]
    assert configs[0] == configs[1] and ends[0]["step"] > stopped_at
    assert_equal_states(*ends)
    for kind, names in (("train", ("step", "loss", "grad_norm")), ("evaluation", ("step", "top1", "top3"))):
        stopped, whole = (
            [[line[name] for name in names] for line in reports_of(tmp_path / run, kind)]
            for run in ("stopped", "whole")
        )
        assert stopped == whole


@pytest.mark.long
def test_two_processes_compute_the_same(tmp_path: Path) -> None:
    """Losses and pseudo-labels of two processes equal those of one, up to rounding, also with mixup across shares."""
    more = [*LAPLACENET, "optimizer.lr=1e-4", "training.batch_size=260", "encoder.time_dependent=true"]
    launch_two("finetune.py", *args_of(tmp_path / "two", *more))
    assert finetune_program.main(args_of(tmp_path / "one", *more)) == 0
    for kind, name in (("train", "loss"), ("evaluation", "top1"), ("pseudo_labels", "accuracy")):
        one, two = ([line[name] for line in reports_of(tmp_path / run, kind)] for run in ("one", "two"))
        assert one and two == pytest.approx(one, rel=1e-5)


def test_pseudo_labels_and_their_accuracy_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The first pseudo-labels are better than chance. The same command then only prints the table again."""
    caplog.set_level(logging.INFO)
    args = args_of(tmp_path / "run", *LAPLACENET, "training.epochs=3", "num_labels=100", "training.batch_size=100")
    assert finetune_program.main(args) == 0
    first, second = reports_of(tmp_path / "run", "pseudo_labels")
    assert first["accuracy"] > 30 and second["changed"] > 0 and first["without"] == 0
    assert undocumented_tags(tmp_path / "run") == []
    printed = capsys.readouterr().out
    assert "laplacenet, 100 labels (split 0), from random weights" in printed and "last weights" in printed
    assert finetune_program.main(args) == 0
    assert capsys.readouterr().out == printed and "finished: all 3 epochs are done" in caplog.text


def test_each_program_refuses_the_configs_and_runs_of_the_other(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune_program.main(args_of(tmp_path / "run", "training.epochs=1")) == 0
    capsys.readouterr()
    finetuned = str(tmp_path / "run" / "checkpoints" / "last.pt")
    for program, arguments, expected in [
        (
            train_program,
            ["--config", str(DIGITS)],
            "is for finetune.py, because it has the key method: run finetune.py",
        ),
        (
            finetune_program,
            digits_args(tmp_path),
            "digits.yaml is for train.py, because it has the key decoder: run train",
        ),
        (
            finetune_program,
            ["--config", str(ROOT / "config/cifar10.yaml")],
            "is not for finetune.py, because it has no key",
        ),
        (
            train_program,
            digits_args(tmp_path / "run"),
            "belongs to finetune.py: use a file of train.py, or choose another output_dir",
        ),
        *(
            (
                program,
                [*make(tmp_path / "new"), f"encoder.weights={finetuned}"],
                f"encoder.weights: {finetuned} belongs to finetune.py: use a file of train.py",
            )
            for program, make in ((train_program, digits_args), (finetune_program, args_of))
        ),
    ]:
        with pytest.raises(SystemExit, match="2"):
            program.main(arguments)
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("error: ") and expected in said


def test_a_run_does_not_continue_from_other_weights(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run with other weights, or with none, is refused. Its results name the weights that it had."""
    args = args_of(tmp_path / "run", "training.epochs=1", f"encoder.weights={checkpoint}", "method=probe")
    assert finetune_program.main(args) == 0
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert f"probe, 20 labels (split 0), from weights {digest[:8]}" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["started_from"] == {"encoder": digest}
    other = tmp_path / "other.pt"
    torch.save(torch.load(checkpoint) | {"step": 1}, other)
    for weights, expected in ((str(other), "is not the file"), ("", f"a file with the SHA-256 {digest[:16]}")):
        with pytest.raises(SystemExit, match="2"):
            finetune_program.main([*args, f"encoder.weights={weights}"])
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("error: ") and expected in said
    scratch, trained = (
        load(FinetuneConfig, DIGITS, [f"encoder.weights={weights}"]).output_dir for weights in ("", str(checkpoint))
    )
    assert scratch == f"{trained}_from_scratch"

    torch.save(ResNetEncoder(architecture="resnet18", stem="small", width=4, latent_dim=9).state_dict(), other)
    with pytest.raises(SystemExit, match="2"):
        finetune_program.main(
            args_of(tmp_path / "z", "method=probe", "classifier.features=z", f"encoder.weights={other}")
        )
    assert "method=probe needs all weights, but" in capsys.readouterr().err


def test_a_run_does_not_continue_with_other_images_or_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither does a finished run report its table as that of other labelled images."""
    write_images(tmp_path / "labelled", train_a=10, train_b=10, test_a=4, test_b=4)
    write_images(tmp_path / "rest", seed=1, flat=10)
    chosen, given = tmp_path / "list.txt", ["a/1.png", "b/1.png", "b/2.png"]
    args = ["--config", str(ROOT / "config" / "finetune_folder.yaml"), *TINY, "method=finetune", "num_labels=null"]
    args += [f"data.root={tmp_path / 'labelled'}", f"unlabelled={tmp_path / 'rest'}", "data.image_size=8"]
    args += [f"labelled={chosen}", f"data.cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'run'}"]

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit, match="2"):
            finetune_program.main([*args, *more])
        return capsys.readouterr().err

    def name_images(names: list[str]) -> None:
        chosen.write_text("\n".join(names))

    name_images(given)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="died"):
        patch.setattr(loop, "train_step", dying_at(1, loop.train_step))
        finetune_program.main([*args, "training.checkpoint_every=1 steps"])
    name_images([*given, "a/2.png"])
    expected = "the run was started with other labelled images: restore the file in `labelled`"
    assert expected in refused()
    name_images(given[::-1])
    assert finetune_program.main(args) == 0
    table = capsys.readouterr().out
    assert finetune_program.main(args) == 0 and capsys.readouterr().out == table
    name_images([*given, "a/2.png"])
    assert expected in refused() and not capsys.readouterr().out
    name_images(given)
    (tmp_path / "rest" / "0.png").unlink()
    assert f"or unlabelled ({tmp_path / 'rest'}) holds other images than" in refused()
    assert "or unlabelled (empty) holds other images than" in refused("unlabelled=")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("num_labels=9", "num_labels=9 is less than the 10 classes: each class needs a labelled image"),
        ("num_labels=1438", "num_labels=1438 is more than the 1437 training images: lower it"),
        (
            "num_labels=1437",
            "of each class, but 0 has only 142: lower num_labels, or name the labelled images in a file",
        ),
        ("method=laplacenet laplacenet.labelled_batch_size=16", "leaves no room for unlabelled images"),
        ("num_labels=null method=laplacenet", "needs images without labels: lower"),
        ("labelled=none.txt", "labelled and num_labels exclude each other"),
        ("labelled=none.txt num_labels=null", "cannot use none.txt (No such file or directory)"),
        ("data.name=posed data.pose=eth80", "data.name=posed is for train.py, because classifiers use no"),
        ("encoder.frozen=true", "encoder.frozen is for train.py: set method=probe"),
        ("unlabelled=none", "no folder none"),
        ("method=laplacenet laplacenet.supervised_epochs=2", "supervised_epochs 2 leaves no epoch for pseudo-labels"),
        ("encoder.weights=none.pt", "encoder.weights: there is no checkpoint none.pt"),
        ("method=guess", "method: input should be 'probe', 'finetune' or 'laplacenet'"),
        ("label_splits=1", "unknown key label_splits: did you mean label_split?"),
        ("training.batch_size=18", "training.batch_size: input should be a multiple of 4"),
    ],
)
def test_bad_input_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, expected: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        finetune_program.main(args_of(tmp_path / "run", *arguments.split()))
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and expected in said
    assert not (tmp_path / "run").exists()
