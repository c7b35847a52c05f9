"""Grid of samples that a run draws at each evaluation."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from experiment.batch import draw_views, pixels_with_sources
from experiment.opening import Experiment
from experiment.sampling import sample_from_views
from model.soda import SODA
from utils.distributed.collectives import all_reduce
from utils.distributed.processes import my_range
from utils.randomness import CHUNK, generator


@torch.no_grad()
def sample_grid(experiment: Experiment, soda: SODA) -> Tensor:
    """Collective. Returns an image (3, H, W) uint8 of three rows: first source views, samples, target views.

    The samples are drawn by DDIM and guided by the latents of the source views. If the images have cameras, the sources
    are other photographs of the object, each in a row of its own, and a sample has the pose of the target. Images,
    views and noise depend only on the seed, so that grids of different epochs can be compared.
    """
    config, seed = experiment.config.sampling, experiment.config.seed
    images = experiment.train if experiment.test is None else experiment.test
    num_images = min(config.num_images, len(images))
    chosen = torch.randperm(len(images), generator=generator(seed, "grid images"))[:num_images]
    pixels = pixels_with_sources(experiment, images, chosen, range(num_images), "grid ")
    x_source, x_target, rays = draw_views(experiment, pixels, range(num_images), "grid ")

    mine = my_range(num_images, CHUNK)
    samples = torch.zeros_like(x_target)
    if mine:
        here = slice(mine.start, mine.stop)
        my_rays, steps = None if rays is None else rays[here], config.num_sampling_steps
        samples[here] = sample_from_views(experiment, soda, x_source[here], my_rays, mine, seed, "grid", steps)
    sources = x_source[:, :1] if rays is None else x_source[:, :, :3]
    seen = [experiment.views.denormalize(view) * 2 - 1 for view in sources.unbind(dim=1)]
    rows = [*seen, all_reduce(samples), x_target]
    size = x_source.shape[-1]  # the decoder's images may be smaller
    size *= max(1, round(64 / size))  # small images are enlarged to about 64 px
    shown = [
        F.interpolate((row.clamp(-1, 1) * 127.5 + 127.5).round().byte(), (size, size), mode="nearest") for row in rows
    ]
    return make_grid(torch.cat(shown), nrow=num_images, padding=2, pad_value=255).cpu()


def save_png(path: Path, image: Tensor) -> None:
    """Writes an image (3, H, W) uint8 to a PNG file."""
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
