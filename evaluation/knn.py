"""k-nearest-neighbour (k-NN) search and classification of features, as functions of tensors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MAX_DISTANCES = 2**25  # largest number of distances, or of neighbours times classes, in memory at the same time


@contextmanager
def true_float32() -> Iterator[None]:
    """Context in which products of float32 matrices do not use TensorFloat-32, whatever the precision outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Bank:
    """Features (N, D), prepared for a search by distance.

    Distances are computed in float32 without TensorFloat-32, even under autocast, for features of any dtype.
    """

    def __init__(self, features: Tensor) -> None:
        # |q - b|^2 = |q|^2 - 2 (q b - |b|^2 / 2). The nearest features b therefore have the largest q b - |b|^2 / 2.
        # The bank's mean is subtracted from q and b. This does not change distances, but reduces rounding errors.
        self._origin = features.float().mean(dim=0)
        self._centred = features.float() - self._origin
        self._half_squares = torch.linalg.vector_norm(self._centred, dim=1).square() / 2  # (N,)

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Returns (nearness, index) of the k features nearest to each of `queries` (Q, D): (Q, k) each.

        The nearness of q and b is q b - |b|^2 / 2. It grows as the distance falls.
        """
        with torch.autocast(queries.device.type, enabled=False), true_float32():
            products = (queries.float() - self._origin) @ self._centred.T
            nearness, neighbours = products.sub_(self._half_squares).topk(k, dim=1)
        return nearness, neighbours

    def squared_lengths(self, queries: Tensor) -> Tensor:
        """Returns |q|^2 (Q,) of `queries` (Q, D), relative to the bank's mean, which nearness is relative to."""
        return torch.linalg.vector_norm(queries.float() - self._origin, dim=1).square()


@torch.no_grad()
def nearest_neighbours(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns (distances, indices) of the k entries of `bank` (N, D) nearest to each of `queries` (Q, D): (Q, k) each.

    The nearest entry is first. Ties, such as copies of an image, go to the lower index, provided at most k + 9 entries
    tie. The results are on the host.
    """
    assert 1 <= k <= len(bank), "k must be between 1 and the size of the bank"
    prepared, num_candidates, found = _Bank(bank), min(2 * k + 8, len(bank)), []
    # A chunk has the distances of its queries, and the features of their candidates twice in float64.
    for chunk in queries.split(max(1, MAX_DISTANCES // max(len(bank), 2 * num_candidates * bank.shape[1]))):
        candidates = prepared.nearest(chunk, num_candidates)[1].sort(dim=1).values
        near, candidates = bank[candidates].cpu(), candidates.cpu()
        distances = torch.linalg.vector_norm(near.double() - chunk.cpu()[:, None].double(), dim=2)
        order = distances.sort(dim=1, stable=True).indices[:, :k]
        found.append((distances.gather(1, order).float(), candidates.gather(1, order)))
    distances, indices = (torch.cat(each) for each in zip(*found, strict=True))
    return distances, indices


@torch.no_grad()
def neighbour_distances(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """Returns the distances (Q, k) of each of `queries` (Q, D) to its k nearest entries of `bank` (N, D), rising.

    This is faster than `nearest_neighbours` and needs less memory. It rounds: distances close to 0 have large relative
    errors.
    """
    assert 1 <= k <= len(bank), "k must be between 1 and the size of the bank"
    prepared, found = _Bank(bank), []
    for chunk in queries.split(max(1, MAX_DISTANCES // len(bank))):
        nearness, _ = prepared.nearest(chunk, k)
        found.append((prepared.squared_lengths(chunk)[:, None] - 2 * nearness).clamp(min=0).sqrt())
    return torch.cat(found)


@torch.no_grad()
def knn_votes(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int,
    num_classes: int,
    temperature: float | None = None,
) -> Tensor:
    """Returns the votes (Q, num_classes) of the k nearest neighbours of each query, by Euclidean distance.

    Distances are computed in float32 without TensorFloat-32, even under autocast, for features of any dtype.

    Args:
        bank: (N, D) features, N >= k.
        bank_labels: (N,) int64.
        queries: (Q, D) features.
        temperature: None: every neighbour has one vote (Cover & Hart 1967). A number: the vote of a neighbour has a
            weight proportional to exp(cosine / temperature), for features of length 1 (Wu et al. 2018, section 3.4).
            The nearest neighbour has weight 1.
    """
    assert 1 <= k <= len(bank), "k must be between 1 and the size of the bank"
    votes = torch.zeros(len(queries), num_classes, device=bank.device)
    classes = torch.arange(num_classes, device=bank.device)
    laid_out = _Bank(bank)
    with torch.autocast(bank.device.type, enabled=False), true_float32():
        chunk_size = max(1, MAX_DISTANCES // max(len(bank), k * num_classes))
        for start in range(0, len(queries), chunk_size):
            nearness, neighbours = laid_out.nearest(queries[start : start + chunk_size], k)  # (q, k) each
            weights = torch.ones_like(nearness)
            if temperature is not None:
                # For features of length 1, differences in nearness are differences in cosine. Weights relative to the
                # nearest neighbour are at most 1, so they cannot overflow, and they cannot all underflow.
                weights = ((nearness - nearness[:, :1]) / temperature).exp()
            is_class = bank_labels[neighbours][:, :, None] == classes  # (q, k, num_classes)
            # A matrix product, because on CUDA a scatter adds in an undefined order.
            votes[start : start + chunk_size] = (weights[:, None] @ is_class.float())[:, 0]
    return votes


def topk_accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns {"top1": ..., "top3": ...}: per cent of samples whose label is among the 1 and the 3 highest scores.

    Ties go to the lower class.

    Args:
        scores: (N, C), one per class.
        labels: (N,) int64.
    """
    ranked = scores.sort(dim=1, descending=True, stable=True).indices  # (N, C)
    hits = ranked == labels[:, None]
    return {f"top{k}": 100 * hits[:, :k].any(dim=1).float().mean().item() for k in (1, 3)}
