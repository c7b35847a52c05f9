"""Features of a data set, extracted once and placed by sample index."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

# What one pass over a batch yields, (N, D) each: several encoders can share one pass over the views.
Features = dict[Hashable, Tensor]


def extract_features(
    encode: Callable[[Tensor, range], Features],
    images: Any,
    batch_size: int,
    device: torch.device,
    share: Callable[[int], range] = range,
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Features:
    """Features of all `images`, float32 on `device`; all of them in every process.

    Args:
        encode: pixels and their indices -> their features, (len(range), D) each.
        images: of known length; `batches(ranges, pin_memory)` yields the pixels of each.
        share: number of batches -> those that this process encodes. A batch is never split, so that its features do
            not depend on the number of processes.
        all_reduce: tensor -> its sum over all processes.
    """
    features: Features = {}
    count = len(images)
    times_encoded = torch.zeros(count, device=device)
    mine = [range(b * batch_size, min((b + 1) * batch_size, count)) for b in share(-(-count // batch_size))]
    # A process without a batch needs the features' names and widths all the same.
    batches = mine or [range(1)]
    for batch, pixels in zip(batches, images.batches(batches, pin_memory=device.type == "cuda"), strict=True):
        if mine:
            times_encoded[batch.start : batch.stop] += 1
        for name, values in encode(pixels, batch).items():
            if name not in features:
                features[name] = torch.zeros(count, values.shape[1], device=device)
            if mine:
                features[name][batch.start : batch.stop] = values
    assert all_reduce(times_encoded).eq(1).all(), "processes share the batches out, each to one of them"
    return {name: all_reduce(values) for name, values in features.items()}
