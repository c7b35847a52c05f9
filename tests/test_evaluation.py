"""Tests of k-NN, the linear probe, the extraction of features and the table of accuracies."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler, normalize

from ablations import floors
from ablations.result_rows import read_rows
from config.reading import load_config
from config.schema import KNN, Probe, ProbeView
from datasets.images import Images, StoredImages
from docs import record
from docs.rows import accuracy
from evaluation import features, knn, linear_probe, logistic_regression
from evaluation.encoders import encode_with, settled
from evaluation.features import extract_features
from evaluation.judge import judge
from evaluation.knn import knn_votes, nearest_neighbours, topk_accuracy
from evaluation.linear_probe import LinearProbe
from evaluation.mlp_probe import MLPProbe
from evaluation.protocols import KNNProtocol, MLPProtocol, ProbeProtocol, Protocol, config_protocols
from experiment.models import initial_soda
from experiment.opening import open_experiment
from tests.conftest import ROOT, experiment_of


@pytest.mark.parametrize("k", [1, 7, 50])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_knn_against_scikit_learn(k: int, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Votes are those of scikit-learn, also far from the origin, and do not depend on the size of the chunks."""
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(offset, 1, (500, 16)), rng.normal(offset, 1, (200, 16))
    labels = rng.integers(0, 5, 500)
    theirs = KNeighborsClassifier(k, algorithm="brute").fit(bank, labels).predict_proba(queries)
    ours = knn_votes(*as_tensors(bank, labels, queries), k, num_classes=5)
    for chunk in (1, 3_000, 32_000):
        monkeypatch.setattr(knn, "MAX_DISTANCES", chunk)
        assert torch.equal(knn_votes(*as_tensors(bank, labels, queries), k, 5), ours)
    np.testing.assert_array_equal(ours.numpy() / k, theirs.astype(np.float32))


def test_knn_with_temperature_against_scikit_learn() -> None:
    """Votes with a temperature are proportional to those of scikit-learn with the same weights."""
    rng = np.random.default_rng(0)
    bank, queries = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.normal(size=(300, 8)), rng.normal(size=(90, 8)))
    )
    labels = rng.integers(0, 4, 300)
    weighted = KNeighborsClassifier(25, algorithm="brute", weights=lambda d: np.exp((1 - d**2 / 2) / 0.1))
    theirs = weighted.fit(bank, labels).predict_proba(queries)
    ours = knn_votes(*as_tensors(bank, labels, queries), 25, num_classes=4, temperature=0.1)
    np.testing.assert_allclose(ours / ours.sum(1, keepdim=True), theirs, atol=1e-5)


def as_tensors(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns bank, labels and queries as tensors, with features in float32."""
    return torch.tensor(bank, dtype=torch.float32), torch.tensor(labels), torch.tensor(queries, dtype=torch.float32)


def test_knn_by_hand() -> None:
    """Votes of four entries and two queries are as computed by hand."""
    bank = torch.tensor([[0.0, 0.0], [0.0, 1.0], [5.0, 5.0], [5.0, 6.0]])
    votes = knn_votes(bank, torch.tensor([2, 2, 0, 1]), torch.tensor([[0.0, 0.4], [5.0, 5.4]]), 2, 3)
    assert votes.tolist() == [[0, 0, 2], [1, 1, 0]]


def test_ties_go_to_the_smallest_class() -> None:
    """Classes with the same score are ranked by index, the lowest first."""
    votes = torch.tensor([[1.0, 2.0, 2.0, 1.0], [1.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]])
    accuracy = topk_accuracy(votes, torch.tensor([1, 2, 0, 3]))
    assert accuracy == {"top1": 50.0, "top3": 75.0}


def test_knn_ignores_autocast() -> None:
    """Votes are the same under autocast."""
    torch.manual_seed(0)
    bank, labels, queries = torch.randn(400, 64), torch.randint(0, 9, (400,)), torch.randn(50, 64)
    plain = knn_votes(bank, labels, queries, 5, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(knn_votes(bank, labels, queries, 5, 9), plain)


def make_probe(
    num_features: int, num_classes: int, seed: int = 0, kind: type[LinearProbe] = LinearProbe, **settings: Any
) -> LinearProbe:
    """Returns an untrained probe on the CPU, whose generator has this seed."""
    generator, device = torch.Generator().manual_seed(seed), torch.device("cpu")
    return kind(num_features, num_classes, **settings, generator=generator, device=device)


def test_probe_is_as_good_as_logistic_regression() -> None:
    """On digits, the accuracy of the probe is within 2 percentage points of scikit-learn's logistic regression."""
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(digits.data, digits.target, random_state=0)
    theirs = 100 * LogisticRegression(max_iter=2000).fit(x_train / 16, y_train).score(x_test / 16, y_test)
    features, labels = torch.tensor(x_train, dtype=torch.float32), torch.tensor(y_train)
    probe = make_probe(64, 10, epochs=15, lr=1e-2, batch_size=64)
    for _ in range(15):
        probe.train_epoch(features, labels)
    ours = topk_accuracy(probe.scores(torch.tensor(x_test, dtype=torch.float32)), torch.tensor(y_test))["top1"]
    assert abs(ours - theirs) < 2


def test_probe_follows_its_protocol() -> None:
    """The learning rate follows torch's cosine from epoch to epoch. More epochs than planned raise AssertionError."""
    probe = make_probe(4, 3, epochs=2, lr=1e-3, batch_size=8)
    rates: list[float] = []
    probe._optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    for _ in range(2):
        probe.train_epoch(torch.randn(21, 4), torch.randint(0, 3, (21,)))
    np.testing.assert_allclose(rates, [1e-3] * 3 + [0.5e-3] * 3)  # two epochs with batches of 8, 8 and 5
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.Adam([torch.zeros(1)], lr=1e-3), 2)
    assert theirs.get_last_lr() == [rates[0]]
    theirs.optimizer.step()
    theirs.step()
    assert theirs.get_last_lr() == [rates[-1]]
    with pytest.raises(AssertionError):
        probe.train_epoch(torch.randn(21, 4), torch.randint(0, 3, (21,)))


@pytest.mark.parametrize("gathered", [2**24, 150])
@pytest.mark.parametrize("batch_size", [8, 11, 19, 25, 100])
def test_probe_is_the_classifier_of_the_reference(
    batch_size: int, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe gives the same scores as the modules and the optimiser of the reference implementation.

    Both start with the same weights and are trained on the same batches. The result does not depend on the number of
    batches that are gathered together.
    """
    torch.manual_seed(0)
    monkeypatch.setattr(linear_probe, "GATHERED", gathered)
    features, labels = 3 * torch.randn(77, 6) + torch.arange(6), torch.randint(0, 3, (77,))
    features[:, 0] /= 1000  # small values, so that BatchNorm's eps changes the result
    probe = make_probe(6, 3, epochs=4, lr=1e-2, batch_size=batch_size, seed=1)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(6, affine=False, eps=1e-6), torch.nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (model[1].weight, model[1].bias):
            parameter.uniform_(-(6**-0.5), 6**-0.5, generator=generator)  # type: ignore[operator]
    for _ in range(3):
        probe.train_epoch(features, labels)
        for batch in torch.randperm(77, generator=generator).split(batch_size):
            if len(batch) > 1:
                loss = F.cross_entropy(model.train()(features[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        scheduler.step()
    torch.testing.assert_close(probe.scores(features), model.eval()(features))


def test_the_mlp_solves_what_the_linear_probe_cannot() -> None:
    """On XOR of two features, the MLP is as good as scikit-learn's, and the linear probe guesses.

    The result depends only on the probe's generator.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 6))
    labels = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).astype(int)
    theirs = MLPClassifier(512, batch_size=128, learning_rate_init=3e-3, max_iter=15, alpha=0, random_state=0)
    with pytest.warns(ConvergenceWarning):  # 15 epochs are all that the probe has, too
        expected = 100 * theirs.fit(x[:1500], labels[:1500]).score(x[1500:], labels[1500:])
    features, classes, queries = as_tensors(x[:1500], labels[:1500], x[1500:])

    def top1(kind: type[LinearProbe]) -> float:
        probe = make_probe(6, 2, kind=kind, epochs=15, lr=3e-3, batch_size=128)
        for _ in range(15):
            probe.train_epoch(features, classes)
        return topk_accuracy(probe.scores(queries), torch.tensor(labels[1500:]))["top1"]

    found = top1(MLPProbe)
    assert found > 95 and abs(found - expected) < 3 and top1(LinearProbe) < 60
    torch.manual_seed(1)
    assert top1(MLPProbe) == found


def test_the_mlp_is_a_protocol_of_the_config_if_wanted() -> None:
    config = load_config(ROOT / "config" / "digits.yaml")
    assert [protocol.metric for protocol in config_protocols(config)] == ["knn", "probe"]
    *_, probe, mlp = config_protocols(load_config(ROOT / "config" / "digits.yaml", ["evaluation.mlp=true"]))
    assert isinstance(mlp, MLPProtocol) and mlp.metric == "mlp"
    assert str(mlp) == str(probe).replace("linear", "mlp 512 hidden dropout 0.25")
    model = mlp.classifier(4, 3, torch.Generator(), torch.device("cpu"))
    assert isinstance(model, MLPProbe) and [type(layer).__name__ for layer in model._model] == [
        *("BatchNorm1d", "Linear", "ReLU", "Dropout", "Linear")
    ]


def test_features_are_placed_by_index() -> None:
    """Extracted features are in the order of the images."""
    values = torch.randn(10, 3)
    images = StoredImages(torch.zeros(10, 3, 1, 1, dtype=torch.uint8), None, [])
    found = extract_features(lambda _, r: {"a": values[r.start : r.stop]}, images, 4, torch.device("cpu"))["a"]
    assert torch.equal(found, values)


def test_features_are_reduced_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks reduce the features in the same order, even if their encoders return them in different orders.

    Names that come from a set can be in different orders on different ranks.
    """
    images = StoredImages(torch.zeros(4, 3, 1, 1, dtype=torch.uint8), None, [])
    widths = {"a": 1, "b": 2, ("c", True): 3}
    orders: list[list[int]] = []
    for names in (list(widths), list(widths)[::-1]):
        orders.append([])

        def encode(_: torch.Tensor, indices: range, names: Any = names) -> dict[Any, torch.Tensor]:
            return {name: torch.zeros(len(indices), widths[name]) for name in names}

        monkeypatch.setattr(features, "all_reduce", lambda t: orders[-1].append(t[0].numel()) or t)  # type: ignore[func-returns-value]
        extract_features(encode, images, 2, torch.device("cpu"))
    assert orders[0] == orders[1] and len(orders[0]) == 4


def test_a_tie_against_scikit_learn() -> None:
    """If two classes have the same number of votes, the prediction is that of scikit-learn."""
    bank, labels = np.array([[1.0, 0.0], [-1.1, 0.0], [0.0, 1.2], [0.0, -1.3], [5.0, 5.0]]), np.array([3, 1, 1, 3, 0])
    query = np.zeros((1, 2))
    theirs = KNeighborsClassifier(4, algorithm="brute").fit(bank, labels)
    votes = knn_votes(*as_tensors(bank, labels, query), 4, num_classes=4)
    assert votes.tolist() == [[0, 2, 0, 2]]
    assert theirs.predict(query).tolist() == [1]
    assert topk_accuracy(votes, torch.tensor([1]))["top1"] == 100.0


def test_of_equally_near_entries_the_first_are_neighbours() -> None:
    """As many as k + 9 entries are copies of one, at random places in the bank."""
    generator = torch.Generator().manual_seed(0)
    for k in (1, 5):
        bank = torch.randn(200, 6, generator=generator) + 10
        copies = torch.randperm(200, generator=generator)[: k + 9]
        bank[copies] = torch.randn(6, generator=generator)
        distances, indices = nearest_neighbours(bank, bank[copies[:3]], k)
        assert indices.tolist() == [copies.sort().values[:k].tolist()] * 3 and distances.eq(0).all()


def test_a_cold_temperature_still_votes() -> None:
    """With a very low temperature, the nearest neighbour still has a vote of 1: its weight does not underflow to 0."""
    bank = torch.tensor([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0]])
    votes = knn_votes(bank, torch.tensor([0, 1, 2]), torch.tensor([[0.96, 0.28]]), 3, 3, temperature=1e-4)
    assert votes.argmax().item() == 2 and votes.max().item() == 1


def test_settings_of_k_nn_reach_the_classifier(tmp_path: Path) -> None:
    """Votes with and without weights, and features with and without scaling, are scikit-learn's."""
    experiment = experiment_of(tmp_path)
    train, test = (
        experiment.views.evaluation(split.pixels).flatten(1).numpy() for split in (experiment.train, experiment.test)
    )
    labels, test_labels = experiment.train.labels.numpy(), experiment.test.labels.numpy()
    sharp, found = KNN(k=200, weights="temperature", temperature=0.02), []
    for settings, unit in ((sharp, True), (KNN(k=200), True), (KNN(k=200), False)):
        protocol = KNNProtocol(settings=settings, normalize=unit)
        (cells,) = judge(experiment, {"": lambda views, _: {"z": views.flatten(1)}}, [protocol]).values()
        weights = "uniform" if settings is not sharp else lambda far: np.exp((1 - far**2 / 2) / 0.02)
        bank, queries = (normalize(each) if unit else each for each in (train, test))
        theirs = KNeighborsClassifier(200, weights=weights, algorithm="brute").fit(bank, labels)
        found.append(cells[""]["top1"])
        assert found[-1] == pytest.approx(100 * theirs.score(queries, test_labels), abs=0.6)
    assert found[0] > found[1] + 2, "here, weights matter"


def test_each_protocol_is_judged_on_its_own_features_and_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell of the table uses the features and the view of its protocol. Each view is made only once per epoch.

    The clean view shows the label, and the augmented view is noise. z contains the view, and pooled is all zeros.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    split = StoredImages(labels.byte()[:, None, None, None].expand(-1, 3, 1, 1), labels, ["a", "b", "c"])
    noise = torch.randn(60, 1, generator=generator)
    seen: list[tuple[str, int]] = []

    def make_view(_: Any, split: Images, pixels: torch.Tensor, indices: range, view: Any, epoch: int) -> torch.Tensor:
        seen.append(("clean" if view is None else "noisy", epoch))
        # The augmented view contains nothing about the label.
        return pixels[:, 0, 0].float() if view is None else noise[indices.start : indices.stop]

    encoders = {
        "good": lambda x, _: {"z": torch.cat([x, (x - 1) ** 2], 1), "pooled": torch.zeros(len(x), 1)},
        "pixels": lambda x, _: {"z": x},
    }
    protocols: list[Protocol] = [
        KNNProtocol(settings=KNN(k=5), normalize=False),
        KNNProtocol(settings=KNN(k=5), view=ProbeView(), normalize=False),
        KNNProtocol(settings=KNN(k=5), features="pooled", normalize=False),
        ProbeProtocol(settings=Probe(epochs=5, lr=0.5, batch_size=20), normalize=False),
        ProbeProtocol(settings=Probe(epochs=2, batch_size=20), view=ProbeView(), normalize=False),
    ]
    monkeypatch.setattr("evaluation.judge.evaluation_view", make_view)
    stored: list[set[Any]] = []

    def extract(*args: Any) -> features.Features:
        found = extract_features(*args)
        stored.append(set(found))
        return found

    monkeypatch.setattr("evaluation.judge.extract_features", extract)
    config = SimpleNamespace(seed=0, evaluation=SimpleNamespace(batch_size=25))
    experiment: Any = SimpleNamespace(config=config, train=split, test=split, info=split, device=torch.device("cpu"))
    found = judge(experiment, encoders, protocols)
    z, pooled = {("good", "z"), ("pixels", "z")}, {("good", "pooled")}
    assert stored == [z | pooled, z | pooled, z, z], "noisy views are encoded only to z"
    top1 = {name: {encoder: cell["top1"] for encoder, cell in cells.items()} for name, cells in found.items()}
    clean_z, noisy_z, clean_pooled, probe_z, probe_noisy = (top1[str(protocol)] for protocol in protocols)
    assert clean_z == {"good": 100, "pixels": 100} and probe_z["good"] > 95
    assert noisy_z["good"] < 60 and probe_noisy["good"] < 60
    assert set(clean_pooled) == {"good"} and clean_pooled["good"] < 60, "`pixels` has no pooled features"
    assert seen == [("clean", 0)] * 6 + [("noisy", 0)] * 3 + [("noisy", 1)] * 3, "each view is made only once per epoch"


def test_principal_components_are_scikit_learns(tmp_path: Path) -> None:
    """Raw pixels along the first principal components equal scikit-learn's, apart from signs."""
    experiment = experiment_of(tmp_path, "evaluation.batch_size=100")
    train, test = (
        experiment.views.evaluation(split.pixels).flatten(1) for split in (experiment.train, experiment.test)
    )
    expected = PCA(8, svd_solver="full").fit(train.numpy()).transform(test.numpy())
    encode, count = floors.principal_components(experiment, 8)
    found = encode(experiment.views.evaluation(experiment.test.pixels), range(len(test)))
    assert count == 8 and floors.principal_components(experiment, 10**6)[1] == train.shape[1]
    np.testing.assert_allclose(np.abs(found["z"].numpy()), np.abs(expected), atol=1e-3)


def test_the_floors_are_scikit_learns_accuracies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """k-NN and probe are scikit-learn's k-NN and logistic regression on the same features, up to one image of 360.

    The recorded figures are those that are printed.
    """
    strength = 1e-3
    monkeypatch.setattr(logistic_regression, "STRENGTHS", (strength,))
    settings = [
        "device=cpu",
        "evaluation.probe.solver=lbfgs",
        "evaluation.probe.transform=clean",
    ]
    options = ["--components", "6", "--out", str(tmp_path / "floors"), "--data", "digits of 8 px"]
    assert floors.main(["--config", str(ROOT / "config" / "digits.yaml"), *options, *settings]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    columns = ["untrained", "raw pixels", "PCA to 6"]
    assert re.split(r"  +", head) == ["top-1 / top-3 (%)", *columns]
    knn, linear = (dict(zip(columns, re.findall(r"(\d+\.\d) / \d+\.\d", row), strict=True)) for row in rows)
    assert record.main([str(tmp_path / "floors"), "--out", str(tmp_path)]) == 0
    (recorded,) = read_rows(tmp_path / "floors.jsonl")
    expected = {"run": "floors-6-0", "data": "digits of 8 px", "amp": "torch.float32"}
    assert {key: recorded[key] for key in expected} == expected
    for kind, printed in (("k-NN", knn), ("linear", linear)):
        assert {name: f"{accuracy(recorded, kind, encoder=name):.1f}" for name in columns} == printed

    experiment = open_experiment(load_config(ROOT / "config" / "digits.yaml", settings))
    (pixels, labels), (test_pixels, test_labels) = (
        (experiment.views.evaluation(split.pixels), split.labels.numpy())  # type: ignore[union-attr]
        for split in (experiment.train, experiment.test)
    )
    encode = encode_with(experiment, settled(experiment, initial_soda(experiment.config, experiment.device)))
    pca = PCA(6, svd_solver="full").fit(pixels.flatten(1).numpy())
    floor_features: dict[str, Callable[[torch.Tensor], np.ndarray]] = {
        "untrained": lambda views: encode(views, range(len(views)))["z"].numpy(),
        "raw pixels": lambda views: views.flatten(1).numpy(),
        "PCA to 6": lambda views: pca.transform(views.flatten(1).numpy()),
    }
    for name, features_of in floor_features.items():
        bank, queries = (normalize(features_of(views)) for views in (pixels, test_pixels))
        theirs = KNeighborsClassifier(20, algorithm="brute").fit(bank, labels).score(queries, test_labels)
        assert float(knn[name]) == pytest.approx(100 * theirs, abs=0.33), name
        scaler = StandardScaler().fit(bank)
        regression = LogisticRegression(C=1 / (strength * len(bank)), max_iter=2000).fit(scaler.transform(bank), labels)
        theirs = regression.score(scaler.transform(queries), test_labels)
        assert float(linear[name]) == pytest.approx(100 * theirs, abs=0.33), name
