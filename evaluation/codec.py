"""Encoding of images as a latent z and noise x_T, and decoding of both. x_T holds the details that z leaves out."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from datasets.images import Images
from evaluation.features import Features, encode_views, extract_features
from experiment.opening import Experiment
from model.diffusion import Denoiser
from model.encoder import Encoder
from model.guidance import Condition, guided_denoiser
from model.soda import SODA
from utils.device import autocast, memory_for
from utils.distributed.collectives import all_reduce
from utils.distributed.processes import my_range, world_size
from utils.logging import progress
from utils.randomness import image_noise

BATCH = 16  # images per forward pass; the same for any number of ranks, so that pixels do not depend on that number
INVERSION_PASSES = 2  # evaluations of the denoiser per step of the inversion

OnDone = Callable[[int], Any]
"""Callback for the progress bar. It receives the number of images of one forward pass."""

DrawLatents = Callable[[int, int], Tensor]
"""A prior over z: (number of latents N, seed) -> z (N, latent_dim) on the device. Collective."""


class Codec:
    """The EMA model as an encoder and a decoder of images (Preechakul et al. 2022, section 3).

    Collective: call each method on all ranks. The ranks share the work, and each rank gets the full result. Pixels are
    (N, 3, P, P) uint8, with the size of the data set's images. z is (N, latent_dim). For a time-dependent encoder, z is
    the curve over the S timesteps that the sampler visits, (N, S, latent_dim), unless a timestep is given. x_T, and
    images in [-1, 1], are (N, 3, decoder_size, decoder_size). All results are float32 on the device.

    Args:
        seed: seed of `noise`, and of the noise that `sample` adds if eta is above 0.
        timestep: timestep of z, for a time-dependent encoder; the decoder gets this z in all its steps.
        draw_latents: diffusion prior over z, if a picture needs it.
    """

    def __init__(
        self,
        experiment: Experiment,
        soda: SODA,
        seed: int,
        timestep: int | None = None,
        draw_latents: DrawLatents | None = None,
    ) -> None:
        self.experiment, self.soda, self.seed, self.timestep = experiment, soda, seed, timestep
        self.draw_latents = draw_latents
        self._batch = min(BATCH, experiment.config.evaluation.batch_size)
        self._encoder = soda.encoder if timestep is None else soda.encoder.at(timestep)
        self._visited = experiment.diffusion.sampling_timesteps(experiment.config.sampling.num_sampling_steps)

    def encode(self, pixels: Tensor) -> Tensor:
        """Returns z of the images, without augmentation."""
        is_curve, width = self._encoder.is_time_dependent, self.experiment.config.encoder.latent_dim
        encoders = [self._encoder.at(timestep) for timestep in self._visited] if is_curve else [self._encoder]

        def encode(positions: range, on_done: OnDone) -> Tensor:
            found = []
            for encoder in encoders:
                on_done(len(positions))
                found.append(self._encode(encoder, pixels[positions.start : positions.stop]))
            return torch.stack(found, dim=1)

        out = torch.zeros(len(pixels), len(encoders), width, device=self.experiment.device)
        z = self._fill("encoding", len(encoders), out, encode)
        return z if is_curve else z[:, 0]

    @cached_property
    def train_z(self) -> Tensor:
        """z (N, latent_dim) of all training images, in the order of the split. Not for curves over the timesteps."""
        return self._latents(self.experiment.train, "training")

    @cached_property
    def test_z(self) -> Tensor:
        """z of all test images, as `train_z`. The test split must exist."""
        assert self.experiment.test is not None
        return self._latents(self.experiment.test, "test")

    def _latents(self, images: Images, split: str) -> Tensor:
        def encode(pixels: Tensor, indices: range) -> Features:
            bar.update(len(indices))
            return {"z": self._encode(self._encoder, pixels)}

        batch_size, device = self.experiment.config.evaluation.batch_size, self.experiment.device
        with progress(len(images) // world_size(), f"encoding {split} images", "img") as bar:
            return extract_features(encode, images, batch_size, device)["z"]

    def _encode(self, encoder: Encoder, pixels: Tensor) -> Tensor:
        experiment = self.experiment
        return encode_views(encoder, experiment.views.evaluation(pixels), experiment.device, experiment.amp_dtype)

    def noise(self, count: int, purpose: str) -> Tensor:
        """Returns random x_T for `count` images. The noise of each image is the same for any `count`."""
        size = self.experiment.config.decoder_size
        return image_noise((3, size, size), range(count), self.seed, purpose, device=self.experiment.device)

    def invert(self, pixels: Tensor, z: Tensor) -> Tensor:
        """Returns the x_T that `decode` maps back to the images, given their z (DDIM inversion)."""
        diffusion = self.experiment.diffusion
        x_start = self.experiment.views.x_start(pixels).to(self.experiment.device)
        steps = self.experiment.config.sampling.num_sampling_steps

        def invert(denoise: Denoiser, x_start: Tensor, positions: range) -> Tensor:
            return diffusion.ddim_invert(denoise, x_start, steps, INVERSION_PASSES)

        return self._denoise("inverting", steps * INVERSION_PASSES, invert, z, x_start, self._unguided)

    def decode(self, z: Tensor, x_T: Tensor) -> Tensor:
        """Returns images decoded from z and an x_T from `invert`, without guidance, clipping or added noise."""
        diffusion, steps = self.experiment.diffusion, self.experiment.config.sampling.num_sampling_steps

        def decode(denoise: Denoiser, x_T: Tensor, positions: range) -> Tensor:
            return diffusion.ddim_sample(denoise, x_T, steps, clip_denoised=False)

        return self._denoise("decoding", steps, decode, z, x_T, self._unguided)

    def sample(self, z: Tensor, x_T: Tensor, noise_of: Sequence[int] | None = None) -> Tensor:
        """Returns images sampled from z and random x_T, with the settings of the config's `sampling` section.

        Args:
            noise_of: number of the noise that the sampler adds to each image in its steps, if `sampling.eta` is above
                0. Images with the same number get the same noise. None: each image gets noise of its own.
        """
        config, diffusion = self.experiment.config.sampling, self.experiment.diffusion
        numbers = range(len(z)) if noise_of is None else noise_of

        def sample(denoise: Denoiser, x_T: Tensor, positions: range) -> Tensor:
            here = numbers[positions.start : positions.stop]
            drawn = range(min(here), max(here) + 1)
            order = torch.tensor([number - drawn.start for number in here], device=x_T.device)

            def draw_noise(t: int) -> Tensor:
                return image_noise(x_T.shape[1:], drawn, self.seed, "eta", t, device=x_T.device)[order]

            return diffusion.ddim_sample(denoise, x_T, config.num_sampling_steps, config.eta, draw_noise=draw_noise)

        def guided(z: Condition) -> Denoiser:
            return guided_denoiser(self.soda.decoder, z, config.guidance_scale, config.sections)

        return self._denoise("sampling", config.num_sampling_steps, sample, z, x_T, guided)

    def _unguided(self, z: Condition) -> Denoiser:
        return guided_denoiser(self.soda.decoder, z)

    def _denoise(
        self,
        task: str,
        passes: int,
        run: Callable[[Denoiser, Tensor, range], Tensor],
        z: Tensor,
        images: Tensor,
        condition: Callable[[Condition], Denoiser],
    ) -> Tensor:
        """Returns the results of `run(denoiser, images, positions)` on each batch of images.

        `condition` makes the denoiser of a batch from its z, or from a function timesteps -> z.
        """
        position = torch.zeros(self.experiment.diffusion.num_timesteps, dtype=torch.int64, device=z.device)
        position[self._visited] = torch.arange(len(self._visited), device=z.device)

        def latents(z: Tensor) -> Condition:
            if z.dim() == 2:
                return z
            return lambda timesteps: z[torch.arange(len(z), device=z.device), position[timesteps]]

        def work(positions: range, on_done: OnDone) -> Tensor:
            here = slice(positions.start, positions.stop)
            denoise = condition(latents(z[here]))

            def counted(x_t: Tensor, timesteps: Tensor) -> Tensor:
                on_done(len(x_t))
                return denoise(x_t, timesteps)

            return run(counted, images[here], positions)

        return self._fill(task, passes, torch.zeros_like(images), work)

    @torch.no_grad()
    def _fill(self, task: str, passes: int, out: Tensor, work: Callable[[range, OnDone], Tensor]) -> Tensor:
        """Fills `out`, zeros (N, ...), and returns it on all ranks.

        The ranks divide the batches of positions. `work(positions, on_done)` computes one batch.

        Args:
            passes: forward passes per image, for the progress bar.
        """
        self.soda.eval()
        batches = [range(start, min(start + self._batch, len(out))) for start in range(0, len(out), self._batch)]
        mine = my_range(len(batches))
        bar = progress(passes * sum(map(len, batches[mine.start : mine.stop])), task, "pass")
        smaller = f"set evaluation.batch_size={max(1, self._batch // 2)}"
        with bar, autocast(self.experiment.device, self.experiment.amp_dtype), memory_for(lambda: smaller):
            for positions in batches[mine.start : mine.stop]:
                out[positions.start : positions.stop] = work(positions, bar.update)
        return all_reduce(out)
