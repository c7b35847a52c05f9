"""Pseudo-labels by propagation over a graph of images, as in LaplaceNet (Sellars et al., arXiv 2106.04527)."""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.knn import nearest_neighbours
from utils.distributed.collectives import all_gather_object
from utils.distributed.processes import my_range

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

STEP = 0.01  # largest relative change of a class in one round of `align`


def neighbour_graph(features: Tensor, k: int) -> "csr_matrix":
    """Collective. Returns the normalised graph of features (N, D): D^-1/2 W D^-1/2, (N, N) float64.

    W holds the cosine similarities of each image and its k nearest others (all others, if these are fewer). Negative
    ones are set to 0. W is made symmetric by the element-wise maximum of W and its transpose. A zero vector has
    similarity 0 to all others. D is the diagonal matrix of the sums of W's rows. The search is exact. The ranks divide
    the images among them.
    """
    from scipy.sparse import csr_matrix  # imported here to keep the start-up short

    count, features = len(features), F.normalize(features.float(), dim=1)
    is_zero = features.eq(0).all(dim=1).cpu()
    k, mine = min(k, count - 1), my_range(count)
    distances, indices = nearest_neighbours(features, features[mine.start : mine.stop], k + 1)
    # The image itself is left out. If it has more than k copies, it may not be among the neighbours.
    rows = torch.arange(mine.start, mine.stop)
    others = indices != rows[:, None]
    others[:, -1] &= ~others.all(dim=1)
    similarities = 1 - distances[others].double().square() / 2  # the cosine of vectors of length 1
    similarities[is_zero[indices[others]] | is_zero[rows].repeat_interleave(k)] = 0
    found = indices[others].view(-1, k).numpy(), similarities.clamp(min=0).view(-1, k).numpy()
    neighbours, weights = (np.concatenate(each) for each in zip(*all_gather_object(found), strict=True))
    directed = csr_matrix((weights.ravel(), neighbours.ravel(), np.arange(0, count * k + 1, k)), shape=(count, count))
    return normalized(directed.maximum(directed.T))


def normalized(weights: "csr_matrix") -> "csr_matrix":
    """Returns D^-1/2 W D^-1/2 for symmetric weights W (N, N). Rows of images without neighbours are zero."""
    from scipy.sparse import diags

    degrees = np.asarray(weights.sum(axis=1)).ravel()
    scale = diags(np.divide(1, np.sqrt(degrees), out=np.zeros_like(degrees), where=degrees > 0))
    return (scale @ weights @ scale).tocsr()


def propagate(
    graph: "csr_matrix", labels: Tensor, num_classes: int, *, alpha: float, tolerance: float, max_iterations: int
) -> Tensor:
    """Collective. Returns the share of each class in each image, (N, num_classes) float64.

    For each class c, conjugate gradients solve (I - alpha graph) f = y (Zhou et al. 2004). y is 1 for the labelled
    images of class c, and 0 for all others. Negative values are set to 0, and the rows are scaled to the sum 1.
    Labelled images belong to their class. Images that no label reaches have rows of zeros. The ranks divide the classes
    among them.

    Args:
        graph: normalised graph (N, N).
        labels: (N,) int64, -1 for images without a label.
        tolerance: relative residual at which the iterations stop.
    """
    from scipy.sparse import identity
    from scipy.sparse.linalg import cg

    system = identity(len(labels), format="csr") - alpha * graph
    targets = labels.cpu().numpy()
    mine = [
        cg(system, (targets == label).astype(np.float64), rtol=tolerance, maxiter=max_iterations)[0]
        for label in my_range(num_classes)
    ]
    columns = [column for of_rank in all_gather_object(mine) for column in of_rank]
    shares = F.normalize(torch.from_numpy(np.stack(columns, axis=1)).clamp(min=0), p=1, dim=1)
    is_labelled = labels.cpu() >= 0
    shares[is_labelled] = F.one_hot(labels.cpu()[is_labelled], num_classes).double()
    return shares


def align(shares: Tensor, frequencies: Tensor, rounds: int) -> Tensor:
    """Returns shares (N, C) whose classes are about as frequent as in `frequencies` (C,), which has the sum 1.

    In each round, each column is multiplied by the ratio of its wanted frequency to its present one, limited to the
    range from 1 - STEP to 1 + STEP. Then the rows are scaled to the sum 1.
    """
    for _ in range(rounds):
        present = shares.sum(dim=0) / shares.sum()
        shares = F.normalize(shares * (frequencies / present).clamp(1 - STEP, 1 + STEP), p=1, dim=1)
    return shares
