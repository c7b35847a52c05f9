"""Sampling conditioned on some sections of the latent, with a separate guidance scale for each section."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.guidance import guided_denoiser
from model.soda import SODA
from tests.conftest import experiment_of
from training.sample_grid import sample_grid
from training.state import initial_state


def eps_of(soda: SODA, x_t: Tensor, timesteps: Tensor, z: Tensor, *sections: int) -> Tensor:
    """Returns eps conditioned on `sections`; other sections are zero. The sections have 3, 3 and 2 dimensions."""
    kept = torch.zeros_like(z)
    for start, stop in [((0, 3), (3, 6), (6, 8))[i] for i in sections]:
        kept[:, start:stop] = z[:, start:stop]
    return soda.decoder(x_t, timesteps, kept)


@torch.no_grad()
def test_guidance_by_sections(sectioned_soda: SODA) -> None:
    soda = sectioned_soda
    x_t, timesteps, z = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 8)

    def eps(*sections: int) -> Tensor:
        return eps_of(soda, x_t, timesteps, z, *sections)

    def guided(*args: Any) -> Tensor:
        return guided_denoiser(soda.decoder, z, *args)(x_t, timesteps)

    close = torch.testing.assert_close
    assert torch.equal(guided(1.0), eps(0, 1, 2)), "without guidance, there is one forward pass"
    for scale in (0.0, 0.5, 1.0, 2.5):  # one scale is ordinary guidance
        ordinary = eps() + scale * (eps(0, 1, 2) - eps())
        close(guided(scale), ordinary)
        close(guided([scale]), ordinary)
        close(guided([scale] * 3), ordinary)
        close(guided(scale, {0, 1, 2}), ordinary)
        close(guided(scale, [1]), eps() + scale * (eps(1) - eps()))
        close(guided([scale, 9.0, scale], [2, 0]), eps() + scale * (eps(0, 2) - eps()))
    close(guided(1.0, []), eps())
    # A different scale per section: compare with the integral in guided_denoiser's docstring, in small steps of s.
    scales = [0.7, 3.0, 1.5]
    integral, step = eps().clone(), 0.1
    for k in range(30):
        kept = [i for i, scale in enumerate(scales) if scale > (k + 0.5) * step]
        integral += step * (eps(*kept) - eps())
    close(guided(scales), integral, atol=1e-5, rtol=1e-4)
    close(guided([0.7, 0.7 + 1e-6, 0.7]), guided(0.7), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("args", "passes"),
    [((1.0,), 1), ((1.3,), 2), ((1.0, [0, 2]), 1), (([1.0, 0.5, 0.0],), 2), (([2.0, 3.0, 0.5],), 4), ((0.0,), 1)],
)
def test_guidance_takes_no_pass_that_has_no_weight(sectioned_soda: SODA, args: tuple[Any, ...], passes: int) -> None:
    soda = sectioned_soda
    batch_sizes: list[int] = []
    soda.decoder.conv_in.register_forward_hook(lambda _, inputs, out: batch_sizes.append(len(out)))
    eps = guided_denoiser(soda.decoder, torch.randn(2, 8), *args)(torch.randn(2, 3, 8, 8), torch.tensor([3, 700]))
    assert batch_sizes == [2 * passes] and eps.shape == (2, 3, 8, 8)


def test_the_grid_takes_sections_and_their_scales(tmp_path: Path) -> None:
    def samples(*overrides: str) -> Tensor:
        experiment = experiment_of(tmp_path, "decoder.modulation=sectioned", "sampling.num_images=3", *overrides)
        soda = initial_state(experiment).soda
        with torch.no_grad():
            for parameter in soda.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        return sample_grid(experiment, soda)[:, 68:134]

    everything = samples("sampling.guidance_scale=1")
    assert torch.equal(samples("sampling.guidance_scale=[1,1,1]"), everything)
    assert not torch.equal(samples("sampling.guidance_scale=[1,3,1]"), everything)
    nothing = samples("sampling.sections=[]")
    assert torch.equal(samples("sampling.guidance_scale=0"), nothing)
    assert not torch.equal(samples("sampling.guidance_scale=1", "sampling.sections=[0,2]"), everything)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([1.0, 2.0],), r"is \[1.0, 2.0\]: give one value, or 3 values \(one per section\), all at least 0"),
        ((-0.5,), "guidance_scale is -0.5: give one"),
        (([1.0, 1.0, -1.0],), "all at least 0"),
        ((1.0, [3, 0]), r"sections are \[0, 3\]: use only section numbers from 0 to 2"),
        ((1.0, [-1]), "from 0 to 2"),
    ],
)
def test_guidance_refuses_what_the_latent_does_not_have(
    sectioned_soda: SODA, args: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        guided_denoiser(sectioned_soda.decoder, torch.randn(2, 8), *args)
