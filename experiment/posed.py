"""Source images of a target: other photographs of the same object, with the cameras of all of them."""

import itertools
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from config.schema import Config
from datasets.cameras import canonical, rays
from datasets.images import Images
from utils.randomness import generator, uniforms


@dataclass(frozen=True)
class PosedPixels:
    """Images of N targets, each followed by K images of the same object, with their cameras.

    Attributes:
        pixels: (N, 1 + K, 3, P, P) uint8.
        cameras: (N, 1 + K, 3, 4) float32, on the host.
    """

    pixels: Tensor
    cameras: Tensor

    @property
    def num_sources(self) -> int:
        """Number K of source images of each target."""
        return self.pixels.shape[1] - 1

    def split(self, size: int) -> list["PosedPixels"]:
        """Returns parts of `size` targets each."""
        parts = zip(self.pixels.split(size), self.cameras.split(size), strict=True)
        return [PosedPixels(pixels, cameras) for pixels, cameras in parts]

    def rays(self, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the rays of the source views (N, K, 6, S, S), and those of the target view (N, 6, D, D)."""
        # The cameras are turned on the host, where matrix products are exact.
        cameras = canonical(self.cameras, self.cameras[:, 1:2]) if config.views.canonical else self.cameras
        cameras = cameras.to(device, non_blocking=True)
        return rays(cameras[:, 1:], config.encoder_size), rays(cameras[:, 0], config.decoder_size)


def draw_num_sources(config: Config, step: int) -> int:
    """Returns the number of source images of each target of a training step, from 1 to views.num_sources."""
    most = config.views.num_sources
    return int(torch.randint(1, most + 1, (), generator=generator(config.seed, "number of sources", step)))


def draw_sources(
    images: Images,
    objects: Tensor,
    targets: Tensor | None,
    count: int,
    positions: range,
    seed: int,
    purpose: str,
    *counters: int,
) -> Tensor:
    """Draws `count` images of each object, (N, count) int64 indices into `images`.

    The images of an object are drawn without replacement, and are repeated only if there are fewer than `count`.

    Args:
        images: split that the images are drawn from.
        objects: (N,) number of the object of each sample.
        targets: (N,) indices into `images`, which are not drawn; None: the targets are in another split.
        positions: positions of the samples, which determine their random numbers.
        seed, purpose, counters: as in `uniforms`. "source images" is added to the purpose.
    """
    members = images.views_of_objects[objects]  # (N, M), padded by -1
    allowed = members >= 0 if targets is None else (members >= 0) & (members != targets[:, None])
    keys = uniforms(positions, members.shape[1], seed, f"{purpose}source images", *counters)
    order = keys.masked_fill(~allowed, 2).argsort(dim=1, stable=True)  # allowed images first, in random order
    columns = torch.arange(count) % allowed.sum(dim=1, keepdim=True)
    return members.gather(1, order.gather(1, columns))


def read_posed(images: Images, wanted: Iterable[Tensor], pin_memory: bool) -> Generator[PosedPixels, None, None]:
    """Yields the images at each (N, 1 + K) int64 indices in `wanted`: those of the targets, then of their sources."""
    assert images.cameras is not None
    for_pixels, for_cameras = itertools.tee(wanted)
    found = images.batches((indices.flatten() for indices in for_pixels), pin_memory)
    for pixels, indices in zip(found, for_cameras, strict=True):
        yield PosedPixels(pixels.unflatten(0, indices.shape), images.cameras[indices])


def source_images(train: Images, images: Images, config: Config) -> Images:
    """Returns the images from which the sources of `images` are drawn.

    Sources of views that are held out are training images, because a held-out view may be the only one of its object.
    """
    return train if config.data.split == "views" else images


def read_with_sources(images: Images, others: Images, indices: Tensor, sources: Tensor) -> PosedPixels:
    """Returns `images` at `indices` (N,), with the images of `others` at `sources` (N, K) as source images."""
    assert images.cameras is not None and others.cameras is not None
    (targets,) = images.batches([indices])
    (seen,) = others.batches([sources.flatten()])
    return PosedPixels(
        torch.cat([targets[:, None], seen.to(targets.device).unflatten(0, sources.shape)], dim=1),
        torch.cat([images.cameras[indices][:, None], others.cameras[sources]], dim=1),
    )


def with_own_rays(config: Config, images: Tensor, cameras: Tensor | None) -> Tensor:
    """Returns images (N, 3, S, S) with the rays of their own cameras, (N, 9, S, S), as the encoder receives them.

    If `views.canonical` is set, each camera has azimuth 0, as that of a first source view.

    Args:
        cameras: (N, 3, 4); None: the images have none, and are returned unchanged.
    """
    if cameras is None:
        return images
    cameras = canonical(cameras, cameras) if config.views.canonical else cameras
    return torch.cat([images, rays(cameras.to(images.device, non_blocking=True), images.shape[-1])], dim=1)
