"""The finished linear probe: logistic regression on standardised features, trained until it converges."""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.knn import true_float32
from utils.distributed.collectives import all_reduce, broadcast_object
from utils.distributed.processes import my_range

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""L2 strengths to choose from, the strongest first.

The strength s adds s / 2 * (sum of the squared weights) to the mean cross-entropy. For N samples, this is the loss of
scikit-learn's LogisticRegression with C = 1 / (s N), divided by C N.
"""

HELD_OUT = 10  # one of this many samples is held out
GRADIENT_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-9
MAX_ITERATIONS = 1000  # 20 to 60 are typical of 50,000 images
MAX_LOGITS = 2**24  # largest number of logits in memory: 64 MB in float32
MAX_ROTATED = 2**24  # largest number of feature values that are rotated in one operation: 64 MB in float32

logger = logging.getLogger(__name__)


class LogisticProbe:
    """Linear classifier: multinomial logistic regression on standardised features, trained by full-batch L-BFGS.

    Features are standardised by the mean and the standard deviation of the training features. Constant features are
    ignored. The strength of the L2 penalty is the entry of STRENGTHS with the lowest cross-entropy on a held-out tenth
    of the training features. The classifier is then trained again, on all training features.

    The ranks divide the strengths among them. The weights are equal on all ranks.

    Args:
        num_features: D.
        generator: draws the held-out samples.
    """

    def __init__(
        self, num_features: int, num_classes: int, *, generator: torch.Generator, device: torch.device
    ) -> None:
        self._num_classes, self._generator = num_classes, generator
        self._mean = self._scale = torch.zeros(num_features, device=device)
        self._weights = torch.zeros(num_classes, num_features + 1, device=device)  # the last column is the bias

    @torch.no_grad()
    def train_epoch(self, features: Tensor, labels: Tensor) -> None:
        """Collective. Trains to convergence on features (N, D) float32 and labels (N,) int64, on the probe's device.

        If a training feature is not finite, the weights remain zero, and a warning is logged.
        """
        order, num_kept = self._split(labels)
        std, mean = torch.std_mean(features, dim=0, correction=0)
        # The standard deviation of a constant feature may be a rounding error instead of 0.
        varies = std > 10 * torch.finfo(std.dtype).eps * mean.abs()
        scale = torch.where(varies, 1 / std, 0)
        inputs, targets = features[order].sub_(mean).mul_(scale), labels[order]
        if not inputs.isfinite().all():
            logger.warning("the features are not finite: the L-BFGS probe is not trained, and its scores are zero")
            return
        self._mean, self._scale = mean, scale
        with torch.autocast(features.device.type, enabled=False), true_float32():
            axes, variances = principal_axes(inputs)
            for rows in inputs.split(max(1, MAX_ROTATED // inputs.shape[1])):
                rows.copy_(rows @ axes)  # in place, because raw pixels may fill gigabytes
            strength = self._choose_strength(inputs, targets, variances, num_kept)
            weights = fit(inputs, targets, variances, strength, self._num_classes)
            weights[:, :-1] = weights[:, :-1] @ axes.T
        # Ranks with different hardware or numbers of threads round differently.
        self._weights = broadcast_object(weights.cpu()).to(features.device)

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Returns the scores (N, num_classes) of features (N, D). The highest score is the predicted class."""
        with torch.autocast(features.device.type, enabled=False), true_float32():
            return logits((features - self._mean) * self._scale, self._weights).T

    def _split(self, labels: Tensor) -> tuple[Tensor, int]:
        """Returns (order of the samples (N,), number of samples that are kept). The held-out samples are last.

        A tenth of each class is held out, up to rounding. With fewer than ten samples, none is held out.
        """
        order = torch.randperm(len(labels), generator=self._generator).to(labels.device)
        order = order[labels[order].argsort(stable=True)]  # sorted by class, in random order within each class
        held_out = torch.arange(len(order), device=order.device) % HELD_OUT == HELD_OUT - 1
        return torch.cat([order[~held_out], order[held_out]]), int((~held_out).sum())

    def _choose_strength(self, inputs: Tensor, labels: Tensor, variances: Tensor, num_kept: int) -> float:
        """Collective. Returns the strength with the lowest cross-entropy on the held-out samples.

        Without held-out samples, returns the strongest.
        """
        losses = torch.zeros(len(STRENGTHS), device=inputs.device)
        if num_kept < len(inputs):
            for i in my_range(len(STRENGTHS)):
                weights = fit(inputs[:num_kept], labels[:num_kept], variances, STRENGTHS[i], self._num_classes)
                losses[i] = F.cross_entropy(logits(inputs[num_kept:], weights).T, labels[num_kept:])
        return STRENGTHS[int(all_reduce(losses).argmin())]


def principal_axes(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the principal axes (D, D) of centred features (N, D), one per column, and the variances (D,) along them.

    They are computed on the host in float64, which not every device has. The result is float32, on the device.
    """
    variances, axes = torch.linalg.eigh((features.T @ features / len(features)).cpu().double())
    return axes.float().to(features.device), variances.clamp(min=0).float().to(features.device)


def logits(inputs: Tensor, weights: Tensor) -> Tensor:
    """Returns the logits (C, N) of inputs (N, D) with weights (C, D + 1), of which the last column is the bias."""
    return torch.addmm(weights[:, -1:], weights[:, :-1], inputs.T)


def fit(inputs: Tensor, labels: Tensor, variances: Tensor, strength: float, num_classes: int) -> Tensor:
    """Returns the weights (num_classes, D + 1) float32 that minimise the mean cross-entropy plus the L2 penalty.

    The penalty is strength / 2 * (sum of the squared weights), without the bias, which is the last column.

    With zero weights, the Hessian of the mean cross-entropy is the covariance of the inputs, divided by the number of
    classes, in all directions but one: adding the same weights to every class changes nothing. The inputs are
    coordinates along their principal axes. There this Hessian is diagonal, and the penalty is unchanged. L-BFGS
    minimises over the weights times the square root of the Hessian with the penalty. It therefore needs few iterations
    even if features are strongly correlated.

    The minimiser is scipy's L-BFGS-B, on the host in float64. It stops if no element of the gradient, with respect to
    the multiplied weights, is larger than GRADIENT_TOLERANCE, or if an iteration lowers the loss by less than
    LOSS_TOLERANCE times the loss (times 1, if the loss is lower than 1).

    Args:
        inputs: (N, D) float32.
        labels: (N,) int64.
        variances: (D,), variance of the inputs along each axis.
    """
    from scipy.optimize import minimize  # imported here to keep the start-up short

    penalty = F.pad(torch.full_like(variances, strength), (0, 1)).cpu().double()  # (D + 1,)
    hessian = F.pad(variances, (0, 1), value=1.0).cpu().double() / num_classes + penalty  # (D + 1,)
    scale = hessian.rsqrt()

    def objective(multiplied: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(multiplied).view(num_classes, -1) * scale
        loss, gradient = cross_entropy(inputs, labels, weights)
        loss += (penalty * weights.square()).sum().item() / 2
        return loss, ((gradient + penalty * weights) * scale).numpy().ravel()

    found = minimize(
        objective,
        np.zeros(num_classes * len(hessian)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": MAX_ITERATIONS, "gtol": GRADIENT_TOLERANCE, "ftol": LOSS_TOLERANCE},
    )
    if found.nit >= MAX_ITERATIONS:
        logger.warning("L-BFGS stopped after %d iterations, before it converged (L2 strength %g)", found.nit, strength)
    return (torch.from_numpy(found.x).view(num_classes, -1) * scale).float().to(inputs.device)


def cross_entropy(inputs: Tensor, labels: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """Returns the mean cross-entropy and its gradient (C, D + 1), float64 on the host. Synchronises with the device.

    Products are float32. Sums over the samples are float64, except on mps, which does not have float64.

    Args:
        inputs: (N, D) float32.
        labels: (N,) int64.
        weights: (C, D + 1) float64, on the host.
    """
    precision = torch.float32 if inputs.device.type == "mps" else torch.float64
    loss = torch.zeros((), dtype=precision, device=inputs.device)
    gradient = torch.zeros(weights.shape, dtype=precision, device=inputs.device)
    on_device = weights.float().to(inputs.device)
    rows = max(1, MAX_LOGITS // len(weights))
    # The samples are the last dimension, because reductions over the few classes are then several times faster on CPUs.
    for x, y in zip(inputs.split(rows), labels[None].split(rows, dim=1), strict=True):
        scores = logits(x, on_device)  # (C, n)
        normaliser = scores.logsumexp(dim=0, keepdim=True)  # (1, n)
        loss += (normaliser - scores.gather(0, y)).sum(dtype=precision)
        errors = (scores - normaliser).exp_()  # predicted probabilities minus those of the labels
        errors.scatter_add_(0, y, torch.full_like(normaliser, -1))
        gradient[:, :-1] += errors @ x
        gradient[:, -1] += errors.sum(dim=1, dtype=precision)
    return loss.item() / len(inputs), gradient.cpu().double() / len(inputs)
