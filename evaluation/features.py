"""Features of a data set, extracted once and placed by sample index."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What one pass over a batch yields, by name, (N, D) each: several encoders can share one pass over the views.
Features = dict[str, Tensor]


def extract_features(encode: Callable[[range], Features], num_samples: int, batch_size: int) -> Features:
    """Features of samples 0..num_samples-1, float32 on the host, a name each.

    Args:
        encode: sample indices -> their features, (len(range), D) each.
    """
    features: Features = {}
    filled = 0
    for start in range(0, num_samples, batch_size):
        batch = range(start, min(start + batch_size, num_samples))
        for name, values in encode(batch).items():
            if name not in features:
                features[name] = torch.empty(num_samples, values.shape[1])
            features[name][batch.start : batch.stop] = values.float()
        filled += len(batch)
    assert filled == num_samples, "every sample has its features"
    return features


def normalize_features(features: Tensor, normalize: bool) -> Tensor:
    """(N, D) -> (N, D), scaled to length 1 if asked."""
    return F.normalize(features, dim=1) if normalize else features


@torch.no_grad()
def calibrate_batch_norm(encoder: nn.Module, batches: list[Tensor]) -> None:
    """Forward passes in training mode, which only move BatchNorm's running statistics.

    An untrained encoder starts with mean 0 and variance 1 there; without this it would be a straw man.
    """
    was_training = encoder.training
    encoder.train()
    for batch in batches:
        encoder(batch)
    encoder.train(was_training)
