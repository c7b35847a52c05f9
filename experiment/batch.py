"""Construction of a batch: images, views, timesteps, noise and drop mask, all functions of (seed, purpose, step).

Adaptive timesteps also depend on the losses of earlier steps.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from config.schema import Config, View
from datasets.augmentation import Draw
from datasets.images import Images, Indices
from datasets.views import SourceDraw
from experiment.opening import Experiment
from experiment.posed import (
    PosedPixels,
    draw_num_sources,
    draw_sources,
    read_posed,
    read_with_sources,
    source_images,
    with_own_rays,
)
from experiment.timesteps import TimestepSampler
from utils.randomness import generator, image_noise, uniforms


@dataclass(frozen=True)
class Batch:
    """One micro-batch: inputs of a forward pass for N samples of the global batch.

    Attributes:
        x_source: (N, K, 3, S, S) source views, normalised, with Gaussian noise added; S is the encoder's size. If the
            images have cameras, (N, K, 9, S, S) with the rays of their pixels.
        x_start: (N, 3, D, D) target view in [-1, 1], without noise; D is the decoder's size.
        timesteps: (N,) int64.
        weights: (N,) factors of the samples' losses, which correct for the sampling of timesteps; None: all are 1.
        noise: (N, 3, D, D) standard normal; x_t is made from x_start and this noise.
        drop_mask: (N, sections) bool; True replaces a section of the sample's latent by zeros.
        latent_noise: (N, K, latent_dim) standard normal, for a probabilistic encoder; None: it is deterministic.
        rays: (N, 6, D, D) rays of the target's pixels; None: the images have no cameras.
    """

    x_source: Tensor
    x_start: Tensor
    timesteps: Tensor
    weights: Tensor | None
    noise: Tensor
    drop_mask: Tensor
    latent_noise: Tensor | None
    rays: Tensor | None


class HasCameras(Protocol):
    """Interface of images that may have cameras: a split, or a part of one."""

    def cameras_at(self, indices: Any, /) -> Tensor | None:
        """Returns the cameras (n, 3, 4) of the images at `indices`; None if they have none."""


Pixels = Tensor | PosedPixels
"""Images of a batch: (N, 3, P, P) uint8, each seen as source and as target, or targets with other source images."""


def read_pixels(experiment: Experiment, wanted: Iterable[tuple[int, range]]) -> Generator[Pixels, None, None]:
    """Yields the training images of each pair in `wanted`, in order.

    If they have cameras, source images are drawn for each image.

    Args:
        wanted: pairs (step, positions in the global batch of this step). Several pairs may be read ahead.
    """
    config, images, pin_memory = experiment.config, experiment.train, experiment.device.type == "cuda"
    indices = ((step, positions, experiment.loader.indices(step, positions)) for step, positions in wanted)
    if images.objects is None:
        return images.batches((chosen for _, _, chosen in indices), pin_memory)
    objects = images.objects

    def with_sources(step: int, positions: range, chosen: Tensor) -> Tensor:
        count = draw_num_sources(config, step)
        sources = draw_sources(images, objects[chosen], chosen, count, positions, config.seed, "", step)
        return torch.cat([chosen[:, None], sources], dim=1)

    return read_posed(images, (with_sources(*each) for each in indices), pin_memory)


def draw_batch(experiment: Experiment, pixels: Pixels, step: int, positions: range, sampler: TimestepSampler) -> Batch:
    """Returns the micro-batch of the samples at `positions` of the global batch of `step`.

    Args:
        pixels: images of these samples.
        sampler: sampler of the timesteps, with its history.
    """
    config, seed, device = experiment.config, experiment.config.seed, experiment.device
    # Timesteps and drop mask are drawn for the whole global batch and then sliced. A sample's values therefore do not
    # depend on how the batch is divided.
    here = slice(positions.start, positions.stop)
    timesteps, weights = sampler.draw(generator(seed, "timesteps", step), config.training.batch_size, here)
    x_source, x_start, rays = draw_views(experiment, pixels, positions, "", step)
    return Batch(
        x_source=x_source,
        x_start=x_start,
        timesteps=timesteps,
        weights=weights,
        noise=image_noise(x_start.shape[1:], positions, seed, "noise", step, device=device),
        drop_mask=_draw_drop_mask(config, step)[here].to(device, non_blocking=True),
        latent_noise=image_noise(
            (x_source.shape[1], config.encoder.latent_dim), positions, seed, "latent noise", step, device=device
        )
        if config.encoder.probabilistic
        else None,
        rays=rays,
    )


def draw_views(
    experiment: Experiment, pixels: Pixels, positions: range, purpose: str, *counters: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (x_source, x_start, rays) of the samples at `positions`, as in `Batch`.

    Args:
        purpose, counters: as in `view_draw`. "source" or "target", and " view" or " noise", are added to the purpose.
    """
    config, views = experiment.config, experiment.views
    like = "source" if config.views.same else "target"
    target_draw = view_draw(config.seed, positions, f"{purpose}{like} view", *counters)
    if isinstance(pixels, Tensor):
        sources = source_draws(experiment, config.views.num_sources, positions, f"{purpose}source", *counters)
        return *views.pair(pixels, sources, target_draw), None
    sources = source_draws(experiment, pixels.num_sources, positions, f"{purpose}source", *counters)
    of_target, *of_sources = pixels.pixels.to(experiment.device, non_blocking=True).unbind(dim=1)
    x_source, x_start = views.pair(of_target, sources, target_draw, of_sources)
    source_rays, target_rays = pixels.rays(config, experiment.device)
    return torch.cat([x_source, source_rays], dim=2), x_start, target_rays


def pixels_with_sources(
    experiment: Experiment, images: Images, chosen: Tensor, positions: range, purpose: str
) -> Pixels:
    """Returns the images of a split at the indices `chosen`, with source images if they have cameras.

    Args:
        positions, purpose: they determine the random draw of views.num_sources source images, as in `draw_sources`.
    """
    config = experiment.config
    if images.objects is None:
        (pixels,) = images.batches([chosen], experiment.device.type == "cuda")
        return pixels
    others = source_images(experiment.train, images, config)
    but = chosen if others is images else None
    sources = draw_sources(
        others, images.objects[chosen], but, config.views.num_sources, positions, config.seed, purpose
    )
    return read_with_sources(images, others, chosen, sources)


def evaluation_view(
    experiment: Experiment,
    images: HasCameras,
    pixels: Tensor,
    indices: Indices,
    view: View | None = None,
    epoch: int = 0,
) -> Tensor:
    """Returns the encoder's input in the evaluation: images (N, 3, S, S), or (N, 9, S, S) with the rays of each.

    Args:
        images: object that knows the cameras of the images.
        pixels: (N, 3, P, P) uint8, images of the split at `indices`, or changed versions of them.
        view: augmentation, drawn for `indices` and `epoch`; None: none.
    """
    if view is None:
        made = experiment.views.evaluation(pixels)
    else:
        assert isinstance(indices, range)
        draw = view_draw(experiment.config.seed, indices, "probe view", epoch)
        made = experiment.views.augmented(pixels, draw, view)
    return with_own_rays(experiment.config, made, images.cameras_at(indices))


def draw_source(experiment: Experiment, pixels: Pixels, step: int, positions: range) -> Tensor:
    """Returns only the first source view (N, 3, S, S), drawn as in `draw_batch`, for the same arguments.

    If the images have cameras, the view has rays: (N, 9, S, S).
    """
    (draw,) = source_draws(experiment, 1, positions, "source", step)
    if isinstance(pixels, Tensor):
        return experiment.views.source(pixels, draw)
    source_rays, _ = pixels.rays(experiment.config, experiment.device)
    view = experiment.views.source(pixels.pixels[:, 1], draw)
    return torch.cat([view, source_rays[:, 0]], dim=1)


def source_draws(
    experiment: Experiment, num_views: int, positions: range, purpose: str, *counters: int
) -> list[SourceDraw]:
    """Returns the random numbers of the first `num_views` source views of the samples at `positions`.

    Args:
        purpose, counters: as in `view_draw`. " view" or " noise" is added to the purpose, and then, for each view after
            the first, its number.
    """
    config, size = experiment.config, experiment.config.encoder_size
    draws = []
    for view in range(num_views):
        suffix = f" {view}" if view else ""
        noise = image_noise(
            (3, size, size), positions, config.seed, f"{purpose} noise{suffix}", *counters, device=experiment.device
        )
        draws.append((view_draw(config.seed, positions, f"{purpose} view{suffix}", *counters), noise))
    return draws


def view_draw(seed: int, positions: range, purpose: str, *counters: int) -> Draw:
    """Returns the function that draws the random numbers for augmenting the samples at `positions`.

    Args:
        seed, purpose, counters: together, the name of the random stream. Different streams are independent.
    """
    return lambda columns, stream="": uniforms(positions, columns, seed, purpose + stream, *counters)


def _draw_drop_mask(config: Config, step: int) -> Tensor:
    """Returns the drop mask (batch_size, sections) bool of the global batch.

    Whole latents are dropped with `latent_probability`. In addition, each section is dropped with
    `section_probability`.
    """
    mask, batch_size = config.training.mask, config.training.batch_size
    whole = torch.rand(batch_size, generator=generator(config.seed, "drop mask", step)) < mask.latent_probability
    sections = torch.rand(
        batch_size, config.decoder.num_sections, generator=generator(config.seed, "section mask", step)
    )
    return whole[:, None] | (sections < mask.section_probability)
