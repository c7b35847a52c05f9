"""Images to codes and back: the latent z, which holds what an image shows, and x_T, which holds what z leaves open."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets import Images
from datasets.views import scale
from model import SODA
from model.diffusion import Denoiser
from training.experiment import Experiment
from training.latents import encode_images, latents
from utils.device import autocast, memory_for
from utils.distributed import all_reduce, share, world_size
from utils.logging import progress
from utils.randomness import image_noise

BATCH = 16  # images at a time, however many processes there are: the pixels are then the same
INVERSION_PASSES = 2  # for each step


class Codec:
    """The EMA model as an encoder and a decoder of images (Preechakul et al. 2022, section 3).

    All processes call each method together, share the work, and get the same answer. Pixels are (N, 3, H, W) uint8;
    z is (N, latent_dim), x_T and images in [-1, 1] are (N, 3, H, W), float32 on the device.

    Args:
        seed: of `noise`, and of what eta adds.
    """

    def __init__(self, experiment: Experiment, soda: SODA, seed: int) -> None:
        self.experiment, self.soda, self.seed = experiment, soda, seed
        self._batch = min(BATCH, experiment.config.evaluation.batch_size)

    def encode(self, pixels: Tensor) -> Tensor:
        """z of images as they are, not augmented."""
        width = self.experiment.config.encoder.latent_dim

        def encode(positions: range, count: Callable[[int], Any]) -> Tensor:
            count(len(positions))
            return encode_images(self.experiment, self.soda, pixels[positions.start : positions.stop])

        return self._shared("encoding", 1, torch.zeros(len(pixels), width, device=self.experiment.device), encode)

    @cached_property
    def train_z(self) -> Tensor:
        """Of the whole training split."""
        return self._latents(self.experiment.train, "training")

    @cached_property
    def test_z(self) -> Tensor:
        """Of the whole test split."""
        assert self.experiment.test is not None
        return self._latents(self.experiment.test, "test")

    def _latents(self, images: Images, split: str) -> Tensor:
        with progress(len(images) // world_size(), f"encoding {split} images", "img") as bar:
            return latents(self.experiment, self.soda, images, bar.update)

    def noise(self, count: int, purpose: str) -> Tensor:
        """x_T at random; the first are the same for any `count`."""
        size = self.experiment.info.image_size
        return image_noise((3, size, size), range(count), self.seed, purpose, device=self.experiment.device)

    def invert(self, pixels: Tensor, z: Tensor) -> Tensor:
        """The x_T from which `decode` comes back to the images, given their z."""
        x_start, diffusion = scale(pixels).to(self.experiment.device), self.experiment.diffusion
        steps = self.experiment.config.sampling.num_sampling_steps

        def invert(denoise: Denoiser, x_start: Tensor, positions: range) -> Tensor:
            return diffusion.ddim_invert(denoise, x_start, steps, INVERSION_PASSES)

        return self._through("inverting", steps * INVERSION_PASSES, invert, z, x_start, self.soda.denoiser)

    def decode(self, z: Tensor, x_T: Tensor) -> Tensor:
        """Images of codes as `invert` gives them: without guidance, clipping and added noise."""
        diffusion, steps = self.experiment.diffusion, self.experiment.config.sampling.num_sampling_steps

        def decode(denoise: Denoiser, x_T: Tensor, positions: range) -> Tensor:
            return diffusion.ddim_sample(denoise, x_T, steps, clip_denoised=False)

        return self._through("decoding", steps, decode, z, x_T, self.soda.denoiser)

    def sample(self, z: Tensor, x_T: Tensor) -> Tensor:
        """Images of latents and random noise, as the config's `sampling` says, in [-1, 1]."""
        config, diffusion = self.experiment.config.sampling, self.experiment.diffusion

        def sample(denoise: Denoiser, x_T: Tensor, positions: range) -> Tensor:
            def draw_noise(t: int) -> Tensor:
                return image_noise(x_T.shape[1:], positions, self.seed, "eta", t, device=x_T.device)

            return diffusion.ddim_sample(denoise, x_T, config.num_sampling_steps, config.eta, draw_noise=draw_noise)

        def denoiser(z: Tensor) -> Denoiser:
            return self.soda.denoiser(z, config.guidance_scale, config.sections)

        return self._through("sampling", config.num_sampling_steps, sample, z, x_T, denoiser)

    def _through(
        self,
        what: str,
        passes: int,
        run: Callable[[Denoiser, Tensor, range], Tensor],
        z: Tensor,
        images: Tensor,
        denoiser: Callable[[Tensor], Denoiser],
    ) -> Tensor:
        """`run` on each batch of images, with the denoiser of its latents."""

        def work(positions: range, count: Callable[[int], Any]) -> Tensor:
            here = slice(positions.start, positions.stop)
            denoise = denoiser(z[here])

            def counted(x_t: Tensor, timesteps: Tensor) -> Tensor:
                count(len(x_t))
                return denoise(x_t, timesteps)

            return run(counted, images[here], positions)

        return self._shared(what, passes, torch.zeros_like(images), work)

    @torch.no_grad()
    def _shared(
        self, what: str, passes: int, out: Tensor, work: Callable[[range, Callable[[int], Any]], Tensor]
    ) -> Tensor:
        """`out`, zeros (N, ...), filled by `work`(positions, count) for this process's batches of positions."""
        self.soda.eval()
        batches = [range(start, min(start + self._batch, len(out))) for start in range(0, len(out), self._batch)]
        mine = share(len(batches))
        bar = progress(passes * sum(map(len, batches[mine.start : mine.stop])), what, "pass")
        smaller = f"set evaluation.batch_size={max(1, self._batch // 2)}"
        with bar, autocast(self.experiment.device, self.experiment.amp_dtype), memory_for(lambda: smaller):
            for positions in batches[mine.start : mine.stop]:
                out[positions.start : positions.stop] = work(positions, bar.update)
        return all_reduce(out)


def slerp(a: Tensor, b: Tensor, share_of_b: float) -> Tensor:
    """Between x_T (N, ...) on the arc through both, each sample for itself (Shoemake 1985); a at 0 and b at 1."""
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1)
    angle = cosine.arccos()[:, None, None, None]
    weight_a, weight_b = ((share * angle).sin() / angle.sin() for share in (1 - share_of_b, share_of_b))
    return torch.where(angle.sin() < 1e-3, a.lerp(b, share_of_b), weight_a * a + weight_b * b)
