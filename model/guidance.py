"""Classifier-free guidance for sampling, with a separate scale for each section of the latent."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from model.decoder import UNetDecoder
from model.diffusion import Denoiser

Condition = Tensor | Callable[[Tensor], Tensor]
"""Latents of a batch: z (N, latent_dim), or a function timesteps (N,) -> z (N, latent_dim)."""


def guided_denoiser(
    decoder: UNetDecoder,
    z: Condition,
    guidance_scale: float | Sequence[float] = 1.0,
    sections: Collection[int] | None = None,
    rays: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Denoiser:
    """Returns a function (x_t, timesteps) -> prediction for the sampler, conditioned on z.

    With one scale w for all sections, this is classifier-free guidance (Ho & Salimans 2022):
    eps_uncond + w (eps_cond - eps_uncond). A scale of 1 is the conditional model alone. It costs one forward pass
    instead of two.

    With a scale s_i for each section, the function returns

        eps({}) + integral over s > 0 of [eps({i: s_i >= s}) - eps({})],

    where eps(S) is conditioned on the sections in S, and all other sections are dropped. This is ordinary guidance if
    all scales are equal. It is eps(S) if the scales are 1 for the sections in S and 0 for the others. The formula is
    the choice of this project, because the paper's formula is not known. The simpler formula
    eps({}) + sum over i of s_i (eps({i}) - eps({})) does not have these two properties in general.

    For v and x_start the formulas are the same, because the weights of the passes sum to 1.

    The cost is one forward pass for each distinct scale above 0. An unconditional pass is added unless the largest
    scale is 1.

    Args:
        z: (N, latent_dim), or a function timesteps (N,) -> z, for an encoder that depends on the timestep.
        guidance_scale: one value for all sections, or one value per section. A section with scale 0 is dropped.
        sections: indices of the sections to condition on. None means all sections.
        rays: (N, 6, H, W) rays of the images to sample, for a decoder with rays. All passes receive them.
        tokens: (N, L, token_dim) for a decoder with cross-attention (`SODA.tokens`). The pass without z has none.

    Raises:
        ValueError: the number of scales does not match the number of sections, a scale is negative, or a section index
            is out of range.
    """
    if callable(z):
        encode = z
        return lambda x_t, timesteps: guided_denoiser(
            decoder, encode(timesteps), guidance_scale, sections, rays, tokens
        )(x_t, timesteps)
    count = len(decoder.section_dims)
    scales = [guidance_scale] if isinstance(guidance_scale, int | float) else list(guidance_scale)
    scales = scales * count if len(scales) == 1 else scales
    chosen = set(range(count)) if sections is None else set(sections)
    if len(scales) != count or min(scales) < 0:
        raise ValueError(
            f"guidance_scale is {guidance_scale}: give one value, or {count} values (one per section), all at least 0"
        )
    if not chosen <= set(range(count)):
        raise ValueError(f"sections are {sorted(chosen)}: use only section numbers from 0 to {count - 1}")
    scales = [scale if i in chosen else 0.0 for i, scale in enumerate(scales)]

    # The sets {i: s_i >= s} change only at the scales, so the integral is a weighted sum with one pass per set. Each
    # pass is a pair: one bool per section, True if the section is dropped, and the weight of the pass. The weights sum
    # to 1.
    levels = sorted({*scales, 0.0}, reverse=True)
    passes = [([s < level for s in scales], level - below) for level, below in pairwise(levels)]
    passes = [each for each in [*passes, ([True] * count, 1 - levels[0])] if each[1]]
    if passes == [([False] * count, 1.0)]:
        return partial(decoder, z=z, rays=rays, tokens=tokens)
    dropped, weights = zip(*passes, strict=True)
    drop_mask = torch.tensor(dropped, device=z.device).repeat_interleave(len(z), dim=0)  # (passes * N, sections)
    z = decoder.mask(z.repeat(len(passes), 1), drop_mask)
    rays = None if rays is None else rays.repeat(len(passes), 1, 1, 1)
    tokens = None if tokens is None else decoder.mask_tokens(tokens.repeat(len(passes), 1, 1), drop_mask)

    def guided(x_t: Tensor, timesteps: Tensor) -> Tensor:
        repeated = x_t.repeat(len(passes), 1, 1, 1), timesteps.repeat(len(passes))
        predictions = decoder(*repeated, z, rays, tokens).float()
        return sum(weight * each for weight, each in zip(weights, predictions.chunk(len(passes)), strict=True))

    return guided
