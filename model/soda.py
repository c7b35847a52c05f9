"""SODA: the encoder, the decoder and the latent between them, as the one module that everything else wraps."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import pairwise

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
            drop_mask: (N, sections) bool; True replaces a section of the sample's latent by zeros (layer masking,
                SODA, section 3). A row of True gives the null latent, which classifier-free guidance needs.

        Returns:
            eps (N, 3, H, W).
        """
        z = self.encoder(x_source)  # (N, latent_dim)
        return self.decoder(x_t, timesteps, self.decoder.mask(z, drop_mask))

    def denoiser(
        self, z: Tensor, guidance_scale: float | Sequence[float] = 1.0, sections: Collection[int] | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A function (x_t, timesteps) -> eps for the sampler, conditioned on z (N, latent_dim).

        With one scale s and all sections this is classifier-free guidance (Ho & Salimans 2022), eps_uncond +
        s (eps_cond - eps_uncond), where 1 is the conditional model alone and costs one pass instead of two. With a
        scale s_i for each section it is, eps(S) being conditioned on the sections in S and all others dropped,

            eps({}) + integral over s > 0 of eps({i: s_i >= s}) - eps({}).

        That is the former where all scales agree, and eps(S) itself where they are 1 in S and 0 elsewhere. (It is our
        choice: the paper's is not known to us, and eps({}) + sum of s_i (eps({i}) - eps({})) in general does neither.)
        It costs a pass for each different scale above 0, and the unconditional one.

        Args:
            guidance_scale: one for all sections, or one for each; 0 leaves a section out.
            sections: those to condition on; None: all.

        Raises ValueError where these do not fit the latent's sections.
        """
        count = len(self.decoder.section_dims)
        scales = [guidance_scale] if isinstance(guidance_scale, int | float) else list(guidance_scale)
        scales = scales * count if len(scales) == 1 else scales
        chosen = set(range(count)) if sections is None else set(sections)
        if len(scales) != count or min(scales) < 0:
            raise ValueError(f"guidance_scale {guidance_scale}: give one, or one for each of {count}, none below 0")
        if not chosen <= set(range(count)):
            raise ValueError(f"sections {sorted(chosen)}: the latent's go from 0 to {count - 1}")
        scales = [scale if i in chosen else 0.0 for i, scale in enumerate(scales)]

        # One pass for each of the nested sets, as (which sections are dropped, its weight); the weights sum to 1.
        levels = sorted({*scales, 0.0}, reverse=True)
        passes = [([s < level for s in scales], level - below) for level, below in pairwise(levels)]
        passes = [each for each in [*passes, ([True] * count, 1 - levels[0])] if each[1]]
        if passes == [([False] * count, 1.0)]:
            return partial(self.decoder, z=z)
        dropped, weights = zip(*passes, strict=True)
        drop_mask = torch.tensor(dropped, device=z.device).repeat_interleave(len(z), dim=0)  # (passes * N, sections)
        z = self.decoder.mask(z.repeat(len(passes), 1), drop_mask)

        def guided(x_t: Tensor, timesteps: Tensor) -> Tensor:
            eps = self.decoder(x_t.repeat(len(passes), 1, 1, 1), timesteps.repeat(len(passes)), z)
            return sum(weight * each for weight, each in zip(weights, eps.float().chunk(len(passes)), strict=True))

        return guided
