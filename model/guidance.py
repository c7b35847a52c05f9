"""Conditioning of the decoder on a latent for sampling: classifier-free guidance, with a scale for each section."""

from collections.abc import Collection, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from model.decoder import UNetDecoder
from model.diffusion import Denoiser


def guided_denoiser(
    decoder: UNetDecoder,
    z: Tensor,
    guidance_scale: float | Sequence[float] = 1.0,
    sections: Collection[int] | None = None,
) -> Denoiser:
    """A function (x_t, timesteps) -> eps for the sampler, conditioned on z (N, latent_dim).

    With one scale s and all sections this is classifier-free guidance (Ho & Salimans 2022), eps_uncond +
    s (eps_cond - eps_uncond), where 1 is the conditional model alone and costs one pass instead of two. With a
    scale s_i for each section it is, eps(S) being conditioned on the sections in S with all others dropped,

        eps({}) + integral over s > 0 of eps({i: s_i >= s}) - eps({}).

    That is ordinary guidance if all scales agree, and eps(S) itself if they are 1 in S and 0 elsewhere. The formula
    is this project's: the paper's is not known, and eps({}) + sum of s_i (eps({i}) - eps({})) in general has neither
    property. It costs a pass for each different scale above 0, and the unconditional one.

    Args:
        guidance_scale: one for all sections, or one for each; 0 leaves a section out.
        sections: those to condition on; None: all.

    Raises:
        ValueError: scales or sections do not fit the latent's sections.
    """
    count = len(decoder.section_dims)
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
        return partial(decoder, z=z)
    dropped, weights = zip(*passes, strict=True)
    drop_mask = torch.tensor(dropped, device=z.device).repeat_interleave(len(z), dim=0)  # (passes * N, sections)
    z = decoder.mask(z.repeat(len(passes), 1), drop_mask)

    def guided(x_t: Tensor, timesteps: Tensor) -> Tensor:
        eps = decoder(x_t.repeat(len(passes), 1, 1, 1), timesteps.repeat(len(passes)), z)
        return sum(weight * each for weight, each in zip(weights, eps.float().chunk(len(passes)), strict=True))

    return guided
