"""k-nearest-neighbour classification of features: pure functions of tensors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MAX_DISTANCES = 2**25  # distances, or neighbours times classes, that are held at once


@contextmanager
def true_float32() -> Iterator[None]:
    """Products of float32 matrices without TensorFloat-32, whatever the training has asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Bank:
    """Features (N, D), laid out for true float32 distances to them, whatever autocast or the features' type."""

    def __init__(self, features: Tensor) -> None:
        # |q - b|^2 = |q|^2 - 2 (q b - |b|^2 / 2): the nearest have the largest q b - |b|^2 / 2. Distances do
        # not change with the origin, and about the bank's mean less is lost in the difference.
        self._origin = features.float().mean(dim=0)
        self._centred = features.float() - self._origin
        self._half_squares = torch.linalg.vector_norm(self._centred, dim=1).square() / 2  # (N,)

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Nearness, which grows as distance falls, and index of the k nearest to each of (Q, D): (Q, k) each."""
        with torch.autocast(queries.device.type, enabled=False), true_float32():
            products = (queries.float() - self._origin) @ self._centred.T
            nearness, neighbours = products.sub_(self._half_squares).topk(k, dim=1)
        return nearness, neighbours


@torch.no_grad()
def nearest_neighbours(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances and indices, (Q, k) each, of the k nearest of `bank` (N, D) to each of `queries` (Q, D), in order.

    Entries at the same distance, such as copies of an image, are in the order of their indices, provided at most 2k + 8
    entries tie. The result is on the host.
    """
    assert 1 <= k <= len(bank), "k is at most the size of the bank"
    _, candidates = _Bank(bank).nearest(queries, min(2 * k + 8, len(bank)))
    candidates = candidates.sort(dim=1).values
    near, queries, candidates = bank[candidates].cpu(), queries.cpu(), candidates.cpu()
    distances = torch.linalg.vector_norm(near.double() - queries[:, None].double(), dim=2)
    order = distances.sort(dim=1, stable=True).indices[:, :k]
    return distances.gather(1, order).float(), candidates.gather(1, order)


@torch.no_grad()
def knn_votes(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int,
    num_classes: int,
    temperature: float | None = None,
) -> Tensor:
    """Votes (Q, num_classes) of the k Euclidean nearest neighbours of each query.

    Args:
        bank: (N, D) features, N >= k; bank_labels: (N,) int64.
        queries: (Q, D) features.
        temperature: None lets every neighbour vote alike (Cover & Hart 1967); a number weighs it by
            exp(cosine / temperature), for features of length 1 (Wu et al. 2018, section 3.4).

    Distances are true float32, whatever autocast or the features' type.
    """
    assert 1 <= k <= len(bank), "k is at most the size of the bank"
    votes = torch.zeros(len(queries), num_classes, device=bank.device)
    classes = torch.arange(num_classes, device=bank.device)
    laid_out = _Bank(bank)
    with torch.autocast(bank.device.type, enabled=False), true_float32():
        chunk_size = max(1, MAX_DISTANCES // max(len(bank), k * num_classes))
        for start in range(0, len(queries), chunk_size):
            nearness, neighbours = laid_out.nearest(queries[start : start + chunk_size], k)  # (q, k) each
            weights = torch.ones_like(nearness)
            if temperature is not None:
                # At length 1, cosines differ as nearness does. Relative to the nearest, no weight overflows
                # and not all underflow.
                weights = ((nearness - nearness[:, :1]) / temperature).exp()
            is_class = bank_labels[neighbours][:, :, None] == classes  # (q, k, num_classes)
            # A product, since the order in which a scatter adds is not determined on CUDA.
            votes[start : start + chunk_size] = (weights[:, None] @ is_class.float())[:, 0]
    return votes


def topk_accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Per cent of samples whose label is among the 1 and 3 highest of scores (N, C): {"top1": ..., "top3": ...}.

    Of equal scores that of the lower class counts as the higher.
    """
    ranked = scores.sort(dim=1, descending=True, stable=True).indices  # (N, C)
    hits = ranked == labels[:, None]
    return {f"top{k}": 100 * hits[:, :k].any(dim=1).float().mean().item() for k in (1, 3)}
