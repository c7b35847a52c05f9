"""Sampling of images from source views, with the settings of the config's `sampling` section."""

import torch
from torch import Tensor

from experiment.opening import Experiment
from model.guidance import guided_denoiser
from model.soda import SODA
from utils.device import autocast
from utils.randomness import image_noise


@torch.no_grad()
def sample_from_views(
    experiment: Experiment,
    soda: SODA,
    x_source: Tensor,
    rays: Tensor | None,
    positions: range,
    seed: int,
    purpose: str,
    num_sampling_steps: int,
) -> Tensor:
    """Returns images (N, 3, D, D) sampled by DDIM from random x_T, guided by the latents of the source views.

    Args:
        x_source: (N, K, C, S, S) source views, as the encoder receives them.
        rays: (N, 6, D, D) rays of the images to sample; None: the decoder has no rays.
        positions: positions of the samples, which determine their noise, together with `seed` and `purpose`.
        num_sampling_steps: replaces that of the config.
    """
    sampling, size = experiment.config.sampling, experiment.config.decoder_size

    def noise(name: str, *counters: int) -> Tensor:
        return image_noise((3, size, size), positions, seed, f"{purpose} {name}", *counters, device=experiment.device)

    soda.eval()
    with autocast(experiment.device, experiment.amp_dtype):
        z, tokens = soda.condition(x_source), soda.tokens(x_source)
        denoise = guided_denoiser(soda.decoder, z, sampling.guidance_scale, sampling.sections, rays, tokens)
        return experiment.diffusion.ddim_sample(
            denoise, noise("noise"), num_sampling_steps, sampling.eta, draw_noise=lambda t: noise("eta", t)
        )
