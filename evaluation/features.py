"""Features of whole splits, encoded by all processes together and placed by sample index."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from datasets.images import Images
from datasets.views import Views
from model.soda import SODA
from utils.device import autocast
from utils.distributed.collectives import all_reduce
from utils.distributed.processes import my_range

# Features of one batch, (N, D) each, by name: several encoders can share one pass over the views.
Features = dict[Hashable, Tensor]


def extract_features(
    encode: Callable[[Tensor, range], Features], images: Any, batch_size: int, device: torch.device
) -> Features:
    """Collective. Features of all `images`, float32 on `device`, on every rank.

    Each batch is encoded whole by one process, so that features do not depend on the number of processes.

    Args:
        encode: pixels and their indices -> their features, (len(range), D) each.
        images: of known length; `batches(ranges, pin_memory)` yields the pixels of each.
    """
    features: Features = {}
    count = len(images)
    times_encoded = torch.zeros(count, device=device)
    mine = [range(b * batch_size, min((b + 1) * batch_size, count)) for b in my_range(-(-count // batch_size))]
    # A process without a batch needs the names and widths of the features all the same.
    batches = mine or [range(1)]
    for batch, pixels in zip(batches, images.batches(batches, pin_memory=device.type == "cuda"), strict=True):
        if mine:
            times_encoded[batch.start : batch.stop] += 1
        for name, values in encode(pixels, batch).items():
            if name not in features:
                features[name] = torch.zeros(count, values.shape[1], device=device)
            if mine:
                features[name][batch.start : batch.stop] = values
    assert all_reduce(times_encoded).eq(1).all(), "each batch is encoded by one process"
    # Sorted, so that the n-th all_reduce is of the same features on all ranks.
    return {name: all_reduce(features[name]) for name in sorted(features, key=str)}


@torch.no_grad()
def encode_clean(
    soda: SODA, views: Views, pixels: Tensor, device: torch.device, amp_dtype: torch.dtype | None
) -> Tensor:
    """z (N, latent_dim) float32 of images (N, 3, H, W) uint8, not augmented."""
    soda.eval()
    with autocast(device, amp_dtype):
        return soda.encoder(views.evaluation(pixels)).float()


def extract_latents(
    encode: Callable[[Tensor], Tensor],
    images: Images,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int], Any] = lambda count: None,
) -> Tensor:
    """Collective. z (N, latent_dim) float32 of a whole split, on the device.

    Args:
        encode: pixels -> z.
        on_batch: called before each batch of this process with its number of images.
    """

    def run(pixels: Tensor, indices: range) -> Features:
        on_batch(len(indices))
        return {"z": encode(pixels)}

    return extract_features(run, images, batch_size, device)["z"]
