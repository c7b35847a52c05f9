"""Features of complete splits, in the order of the samples. All ranks share the work of encoding."""

from collections.abc import Callable, Generator, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datasets.images import Images
from model.encoder import Encoder
from utils.device import autocast
from utils.distributed.collectives import all_reduce
from utils.distributed.processes import my_range
from utils.randomness import generator

# Features by name, (N, D) each. A name may be a tuple that also names the encoder, so that several encoders share one
# pass over the views.
Features = dict[Hashable, Tensor]


def feature_name(kind: str, timestep: int | None) -> str:
    """Returns the name of an encoder's features, or of something made from them, at a timestep, as in z@500.

    Args:
        timestep: timestep of a time-dependent encoder; None: the name is `kind`.
    """
    return kind if timestep is None else f"{kind}@{timestep}"


@dataclass(frozen=True)
class Subset:
    """Images of a split at some indices, in the form that `extract_features` takes.

    Attributes:
        indices: (n,) int64, indices into `images`.
    """

    images: Images
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def cameras_at(self, positions: range) -> Tensor | None:
        """Returns the cameras of the images at `positions` in `indices`; None if they have none."""
        return self.images.cameras_at(self.indices[positions.start : positions.stop])

    def batches(self, wanted: Iterable[range], pin_memory: bool = False) -> Generator[Tensor, None, None]:
        """Yields the pixels of each range of positions in `indices`, as `Images.batches` does."""
        return self.images.batches((self.indices[each.start : each.stop] for each in wanted), pin_memory)


def random_subset(images: Images, count: int, seed: int, purpose: str) -> Subset:
    """Returns `count` images that are drawn at random, in the order of their indices; all images if they are fewer."""
    return Subset(images, torch.randperm(len(images), generator=generator(seed, purpose))[:count].sort().values)


def extract_features(
    encode: Callable[[Any, range], Features], images: Any, batch_size: int, device: torch.device
) -> Features:
    """Collective. Returns the features of all `images`, float32 on `device`, on all ranks.

    Each batch is encoded by one rank and not divided, so that features do not depend on the number of ranks.

    Args:
        encode: function (pixels, indices) -> features, (len(indices), D) each.
        images: object that has a length. Its method `batches(ranges, pin_memory)` yields the pixels of each range.
        batch_size: images per batch; the last batch may be smaller.
    """
    features: Features = {}
    count = len(images)
    times_encoded = torch.zeros(count, device=device)
    mine = [range(b * batch_size, min((b + 1) * batch_size, count)) for b in my_range(-(-count // batch_size))]
    # A rank without batches encodes one image to know the names and widths of the features. It discards the values.
    batches = mine or [range(1)]
    for batch, pixels in zip(batches, images.batches(batches, pin_memory=device.type == "cuda"), strict=True):
        if mine:
            times_encoded[batch.start : batch.stop] += 1
        for name, values in encode(pixels, batch).items():
            if name not in features:
                features[name] = torch.zeros(count, values.shape[1], device=device)
            if mine:
                features[name][batch.start : batch.stop] = values
    assert all_reduce(times_encoded).eq(1).all(), "each image must be encoded exactly once"
    # Sorted, so that all ranks reduce the features in the same order.
    return {name: all_reduce(features[name]) for name in sorted(features, key=str)}


@torch.no_grad()
def encode_views(encoder: Encoder, made: Tensor, device: torch.device, amp_dtype: torch.dtype | None) -> Tensor:
    """Returns z (N, latent_dim) float32 of views as the encoder receives them, in evaluation mode."""
    encoder.eval()
    with autocast(device, amp_dtype):
        return encoder(made).float()
