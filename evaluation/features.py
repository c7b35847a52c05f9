"""Features of a data set, extracted once and placed by sample index."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

# What one pass over a batch yields, (N, D) each: several encoders can share one pass over the views.
Features = dict[Hashable, Tensor]


def extract_features(
    encode: Callable[[range], Features], num_samples: int, batch_size: int, device: torch.device
) -> Features:
    """Features of samples 0..num_samples-1, float32 on `device`.

    Args:
        encode: sample indices -> their features, (len(range), D) each.
    """
    features: Features = {}
    for start in range(0, num_samples, batch_size):
        batch = range(start, min(start + batch_size, num_samples))
        for name, values in encode(batch).items():
            if name not in features:
                features[name] = torch.full((num_samples, values.shape[1]), torch.nan, device=device)
            features[name][batch.start : batch.stop] = values
    return features
