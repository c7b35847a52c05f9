"""Tests of the finished linear probe: logistic regression by L-BFGS."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from config.reading import load_config
from evaluation import logistic_regression
from evaluation.knn import topk_accuracy
from evaluation.logistic_regression import STRENGTHS, LogisticProbe, cross_entropy, fit, logits, principal_axes
from evaluation.protocols import all_protocols, config_protocols
from tests.conftest import ROOT


def make_probe(num_features: int, num_classes: int) -> LogisticProbe:
    """Returns an untrained probe on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return LogisticProbe(num_features, num_classes, generator=generator, device=torch.device("cpu"))


def trained(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> LogisticProbe:
    """Returns a probe that is trained on these features."""
    probe = make_probe(features.shape[1], num_classes)
    probe.train_epoch(features, labels)
    return probe


@pytest.mark.parametrize(
    ("strength", "loss_error", "weight_error"), [(1e-1, 1e-6, 2e-3), (1e-3, 1e-5, 1e-2), (1e-5, 1e-3, 0.2)]
)
def test_the_probe_is_scikit_learns_logistic_regression(
    strength: float, loss_error: float, weight_error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On digits, accuracy, loss and weights are those of scikit-learn's LogisticRegression with the same penalty.

    Accuracies differ by at most 0.2 percentage points. Digits have constant features, and here a mean far from zero.
    With the weakest penalty, the classes are separated, and weights that differ have almost the same loss.
    """
    digits = load_digits()
    x = (10 * digits.data + 50).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(x, digits.target, test_size=0.5, random_state=0)
    scaler = StandardScaler().fit(x_train.astype(np.float64))
    standardised = scaler.transform(x_train.astype(np.float64))
    theirs = LogisticRegression(C=1 / (strength * len(x_train)), tol=1e-6, max_iter=10_000).fit(standardised, y_train)

    monkeypatch.setattr(logistic_regression, "STRENGTHS", (strength,))
    monkeypatch.setattr(logistic_regression, "MAX_ROTATED", 30_000)  # several chunks
    labels = torch.tensor(y_train)
    probe = trained(torch.tensor(x_train), labels, 10)
    accuracy = topk_accuracy(probe.scores(torch.tensor(x_test)), torch.tensor(y_test))["top1"]
    assert abs(accuracy - 100 * theirs.score(scaler.transform(x_test.astype(np.float64)), y_test)) < 0.2

    def penalised_loss(weights: torch.Tensor) -> float:
        """Returns the loss that both minimise, in float64."""
        fitted = F.cross_entropy(logits(torch.tensor(standardised), weights).T, labels)
        return (fitted + strength / 2 * weights[:, :-1].square().sum()).item()

    expected = torch.tensor(np.column_stack([theirs.coef_, theirs.intercept_]))
    assert penalised_loss(probe._weights.double()) == pytest.approx(penalised_loss(expected), rel=loss_error)
    found = probe._weights.double()
    found[:, -1] -= found[:, -1].mean()  # a constant that is added to all biases does not change the loss
    expected[:, -1] -= expected[:, -1].mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=weight_error * expected.abs().max().item())


def test_the_gradient_is_that_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-entropy and gradient agree with torch's, also in several chunks."""
    monkeypatch.setattr(logistic_regression, "MAX_LOGITS", 30)
    torch.manual_seed(0)
    inputs, labels = torch.randn(50, 4), torch.randint(0, 3, (50,))
    weights = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(inputs.double() @ weights[:, :-1].T + weights[:, -1], labels)
    expected.backward()
    loss, gradient = cross_entropy(inputs, labels, weights.detach())
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, weights.grad, rtol=1e-5, atol=1e-6)


def chosen_strength(features: torch.Tensor, labels: torch.Tensor, patch: pytest.MonkeyPatch) -> float:
    """Returns the strength with which the probe is trained on all features."""
    used: list[tuple[int, float]] = []

    def spy(inputs: torch.Tensor, *args: object) -> torch.Tensor:
        used.append((len(inputs), args[2]))  # type: ignore[arg-type]
        return fit(inputs, *args)  # type: ignore[arg-type]

    with patch.context() as context:
        context.setattr(logistic_regression, "fit", spy)
        trained(features, labels, 2)
    *tried, (count, strength) = used
    assert tried == [(len(features) * 9 // 10, each) for each in STRENGTHS] and count == len(features)
    return strength


def test_the_strength_fits_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features without information need the strongest penalty. Classes with a wide gap need the weakest.

    With random labels, any weights are overfitted, so zero weights are best. If one feature separates the classes in
    all samples, larger weights always lower the held-out loss.
    """
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    assert chosen_strength(torch.randn(200, 100), labels, monkeypatch) == STRENGTHS[0]
    separated = torch.stack([labels + 0.1 * torch.rand(200), torch.rand(200)], dim=1)
    assert chosen_strength(separated, labels, monkeypatch) == STRENGTHS[-1]


def test_correlated_features_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strongly correlated features, whose covariance has a condition number of 1e6, need few iterations."""
    torch.manual_seed(0)
    labels = torch.arange(2000) % 5
    features = torch.randn(2000, 40) + 0.3 * torch.randn(5, 40)[labels]
    features = (features * torch.logspace(0, -3, 40)) @ torch.linalg.qr(torch.randn(40, 40))[0]
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    axes, variances = principal_axes(features)
    assert variances.max() / variances.min() > 1e5
    losses: list[float] = []

    def recorded(*args: torch.Tensor) -> tuple[float, torch.Tensor]:
        found = cross_entropy(*args)
        losses.append(found[0])
        return found

    monkeypatch.setattr(logistic_regression, "cross_entropy", recorded)
    fit(features @ axes, labels, variances, 1e-6, 5)
    assert 5 < len(losses) < 60


def test_training_is_deterministic() -> None:
    """Two probes with generators of the same seed have equal weights, and a tenth of each class is held out."""
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 8) + torch.randn(3, 8)[labels]
    assert torch.equal(trained(features, labels, 3)._weights, trained(features, labels, 3)._weights)
    order, num_kept = make_probe(8, 3)._split(labels)
    assert order.sort().values.equal(torch.arange(300))
    assert labels[order[num_kept:]].bincount().tolist() == [10, 10, 10]


def test_a_constant_feature_is_ignored() -> None:
    """A constant feature does not change the scores, also if it is not constant in the test features."""
    torch.manual_seed(0)
    labels = torch.arange(100) % 2
    features = torch.randn(100, 3) + labels[:, None]
    constant = torch.cat([features, torch.full((100, 1), 0.1)], dim=1)
    queries = torch.cat([features, torch.full((100, 1), 1e6)], dim=1)
    torch.testing.assert_close(
        trained(constant, labels, 2).scores(queries), trained(features, labels, 2).scores(features)
    )


@pytest.mark.parametrize(
    "labels",
    [
        [0] * 30 + [1] * 30 + [2],  # class 2 is not held out, class 3 has no training images
        [0, 1, 2, 0, 1],  # fewer than ten images: none is held out
        [0],
        [2] * 40,
    ],
)
def test_few_images_and_missing_classes(labels: list[int]) -> None:
    """Scores are finite if classes are missing in the training images or in the held-out tenth, and with few images."""
    torch.manual_seed(0)
    targets = torch.tensor(labels)
    features = torch.randn(len(labels), 6) + 5 * F.one_hot(targets, 6)
    scores = trained(features, targets, 4).scores(features)
    assert scores.isfinite().all()
    if len(labels) > 1:
        assert topk_accuracy(scores, targets)["top1"] > 90


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite(value: float, caplog: pytest.LogCaptureFixture) -> None:
    """With a feature that is not finite, a warning is logged, and scores are zero."""
    features = torch.randn(50, 4)
    features[3, 1] = value
    probe = trained(features, torch.arange(50) % 2, 2)
    assert "not finite" in caplog.text
    assert probe.scores(torch.randn(5, 4)).eq(0).all()


def test_very_large_features() -> None:
    """A feature whose variance is too large for float32 is ignored. The other features are used."""
    labels = torch.arange(50) % 2
    features = torch.stack([labels.float(), 3e38 * torch.linspace(-1, 1, 50)], dim=1)
    assert topk_accuracy(trained(features, labels, 2).scores(features), labels)["top1"] == 100


def test_the_ranks_share_the_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three ranks tries some of the strengths, and the sum of their losses is that of a single process."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 2
    features = torch.randn(60, 3) + labels[:, None]
    shares: list[torch.Tensor] = []

    def reduce(losses: torch.Tensor) -> torch.Tensor:
        shares.append(losses.clone())
        return losses

    monkeypatch.setattr(logistic_regression, "all_reduce", reduce)
    alone = trained(features, labels, 2)
    for part in (range(0, 2), range(2, 4), range(4, 7)):
        monkeypatch.setattr(logistic_regression, "my_range", lambda total, part=part: part)
        monkeypatch.setattr(logistic_regression, "all_reduce", lambda losses: shares.append(losses) or shares[0])  # type: ignore[func-returns-value]
        assert torch.equal(trained(features, labels, 2)._weights, alone._weights)
    assert torch.equal(torch.stack(shares[1:]).sum(dim=0), shares[0])


def test_the_config_chooses_the_solver() -> None:
    """The solver replaces the config's probe. test.py also judges the finished probe on both features, clean."""
    path = ROOT / "config" / "digits.yaml"
    assert str(config_protocols(load_config(path))[1]).startswith("linear 15 epochs lr 0.001 batch 16, unit z, views: ")
    config = load_config(path, ["evaluation.probe.solver=lbfgs"])
    _, augmented = config_protocols(config)
    assert str(augmented) == "linear L-BFGS, unit z, views: affine 10 deg 0.1 x0.9-1.1 shear 5 (p=1)"
    assert augmented.metric == "probe" and augmented.epochs == 1
    clean = load_config(path, ["evaluation.probe.solver=lbfgs", "evaluation.probe.transform=clean"])
    assert str(config_protocols(clean)[1]) == "linear L-BFGS, unit z, views: clean"
    names = [str(protocol) for protocol in all_protocols(config, 1000)]
    finished = {"linear L-BFGS, z, views: clean", "linear L-BFGS, pooled, views: clean", str(augmented)}
    assert {name for name in names if "L-BFGS" in name} == finished
