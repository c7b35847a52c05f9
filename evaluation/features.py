"""Features of a data set, extracted once and placed by sample index."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

# What one pass over a batch yields, (N, D) each: several encoders can share one pass over the views.
Features = dict[Hashable, Tensor]


def extract_features(
    encode: Callable[[range], Features],
    num_samples: int,
    batch_size: int,
    device: torch.device,
    share: Callable[[int], range] = range,
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Features:
    """Features of samples 0..num_samples-1, float32 on `device`; all of them in every process.

    Args:
        encode: sample indices -> their features, (len(range), D) each.
        share: number of batches -> those that this process encodes. A batch is never split, so that its features do
            not depend on the number of processes.
        all_reduce: tensor -> its sum over all processes.
    """
    features: Features = {}
    times_encoded = torch.zeros(num_samples, device=device)
    # A process without a batch needs the features' names and widths all the same.
    starts = [batch * batch_size for batch in share(-(-num_samples // batch_size))]
    for start in starts or [0]:
        batch = range(start, min(start + batch_size, num_samples) if starts else 1)
        if starts:
            times_encoded[batch.start : batch.stop] += 1
        for name, values in encode(batch).items():
            if name not in features:
                features[name] = torch.zeros(num_samples, values.shape[1], device=device)
            if starts:
                features[name][batch.start : batch.stop] = values
    assert all_reduce(times_encoded).eq(1).all(), "processes share the batches out, each to one of them"
    return {name: all_reduce(values) for name, values in features.items()}
