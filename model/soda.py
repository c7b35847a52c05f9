"""SODA: the encoder, the decoder and the latent between them, as the one module that everything else wraps."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from model.encoder import ResNetEncoder
from model.unet import UNetDecoder


class SODA(nn.Module):
    """eps = decoder(x_t, timesteps, encoder(x_source)) (Hudson et al., CVPR 2024, figure 2).

    The only way from the source view to the decoder is z, so the denoising loss shapes what z holds.
    """

    def __init__(self, encoder: ResNetEncoder, decoder: UNetDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, x_source: Tensor, x_t: Tensor, timesteps: Tensor, drop_mask: Tensor) -> Tensor:
        """Predict the noise in x_t from a source view of the same image.

        Args:
            x_source: (N, 3, H, W) source view, normalised.
            x_t: (N, 3, H, W) noised target view.
            timesteps: (N,) int64.
            drop_mask: (N,) bool; True replaces the sample's latent by the null latent, zeros.

        Returns:
            eps (N, 3, H, W).
        """
        z = self.encoder(x_source)  # (N, latent_dim)
        z = z.masked_fill(drop_mask[:, None], 0)
        return self.decoder(x_t, timesteps, z)

    def denoiser(self, z: Tensor, guidance_scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
        """A function (x_t, timesteps) -> eps for the sampler, conditioned on z (N, latent_dim).

        Classifier-free guidance (Ho & Salimans 2022): eps_uncond + s (eps_cond - eps_uncond) with
        s = `guidance_scale`; 1 is the conditional model alone and costs one pass instead of two.
        """
        if guidance_scale == 1.0:
            return partial(self.decoder, z=z)

        def guided(x_t: Tensor, timesteps: Tensor) -> Tensor:
            both = torch.cat([z, torch.zeros_like(z)])
            eps_cond, eps_uncond = self.decoder(x_t.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
            return eps_uncond + guidance_scale * (eps_cond - eps_uncond)

        return guided
