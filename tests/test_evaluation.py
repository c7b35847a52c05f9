import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from evaluation import calibrate_batch_norm
from evaluation.features import extract_features, normalize_features
from evaluation.knn import knn_votes, topk_accuracy
from evaluation.linear_probe import LinearProbe
from model import ResNetEncoder


@pytest.mark.parametrize("k", [1, 7, 50])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_knn_against_scikit_learn(k: int, offset: float) -> None:
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(offset, 1, (500, 16)), rng.normal(offset, 1, (200, 16))
    labels = rng.integers(0, 5, 500)
    theirs = KNeighborsClassifier(k, algorithm="brute").fit(bank, labels).predict_proba(queries)
    ours = knn_votes(*as_tensors(bank, labels, queries), k, num_classes=5, chunk_size=64)
    np.testing.assert_array_equal(ours.numpy() / k, theirs.astype(np.float32))


def test_knn_with_temperature_against_scikit_learn() -> None:
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
    return torch.tensor(bank, dtype=torch.float32), torch.tensor(labels), torch.tensor(queries, dtype=torch.float32)


def test_knn_by_hand() -> None:
    bank = torch.tensor([[0.0, 0.0], [0.0, 1.0], [5.0, 5.0], [5.0, 6.0]])
    votes = knn_votes(bank, torch.tensor([2, 2, 0, 1]), torch.tensor([[0.0, 0.4], [5.0, 5.4]]), 2, 3)
    assert votes.tolist() == [[0, 0, 2], [1, 1, 0]]


def test_ties_go_to_the_smallest_class() -> None:
    votes = torch.tensor([[1.0, 2.0, 2.0, 1.0], [1.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]])
    accuracy = topk_accuracy(votes, torch.tensor([1, 2, 0, 3]))
    assert accuracy == {"top1": 50.0, "top3": 75.0}


def test_knn_ignores_autocast() -> None:
    torch.manual_seed(0)
    bank, labels, queries = torch.randn(400, 64), torch.randint(0, 9, (400,)), torch.randn(50, 64)
    plain = knn_votes(bank, labels, queries, 5, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(knn_votes(bank, labels, queries, 5, 9), plain)


def test_probe_is_as_good_as_logistic_regression() -> None:
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(digits.data, digits.target, random_state=0)
    theirs = 100 * LogisticRegression(max_iter=2000).fit(x_train / 16, y_train).score(x_test / 16, y_test)
    features, labels = torch.tensor(x_train, dtype=torch.float32), torch.tensor(y_train)
    probe = LinearProbe(64, 10, 15, 1e-2, 64, torch.Generator().manual_seed(0), torch.device("cpu"))
    for _ in range(15):
        probe.train_epoch(features, labels)
    ours = topk_accuracy(probe.scores(torch.tensor(x_test, dtype=torch.float32)), torch.tensor(y_test))["top1"]
    assert abs(ours - theirs) < 2


def test_probe_follows_its_protocol() -> None:
    probe = LinearProbe(4, 3, 2, 1e-3, 8, torch.Generator().manual_seed(0), torch.device("cpu"))
    rates: list[float] = []
    probe._optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    for _ in range(2):
        probe.train_epoch(torch.randn(21, 4), torch.randint(0, 3, (21,)))
    expected = [1e-3 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)]  # 21 // 8 steps an epoch, 2 epochs
    np.testing.assert_allclose(rates, expected)
    norm = probe._model[0]
    assert isinstance(norm, torch.nn.BatchNorm1d) and norm.eps == 1e-6 and norm.weight is None
    with pytest.raises(AssertionError):
        probe.train_epoch(torch.randn(21, 4), torch.randint(0, 3, (21,)))


def test_features_are_placed_by_index_and_normalised() -> None:
    values = torch.randn(10, 3)
    features = extract_features(lambda r: {"a": values[r.start : r.stop]}, 10, 4)["a"]
    assert torch.equal(features, values)
    torch.testing.assert_close(normalize_features(features, True).norm(dim=1), torch.ones(10))
    assert torch.equal(normalize_features(features, False), values)


def test_calibration_moves_statistics_only() -> None:
    encoder = ResNetEncoder(architecture="resnet18", stem="small", width=4, latent_dim=4).eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    batch = 3 + 2 * torch.randn(64, 3, 8, 8)
    calibrate_batch_norm(encoder, [batch] * 20)
    after = encoder.state_dict()
    moved = {name.rsplit(".", 1)[-1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}
    mean = encoder.conv1(batch).mean(dim=(0, 2, 3))
    torch.testing.assert_close(encoder.bn1.running_mean, (1 - 0.9**20) * mean)
    assert not encoder.training
