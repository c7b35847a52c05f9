"""Loss terms: functions of one forward pass. They are summed here, and logged by name.

To add a term, write a function, with its weight, and put it into TERMS. Parameters of a new module of SODA are trained
automatically: the optimiser's groups cover the whole model.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from experiment.batch import Batch
from model.diffusion import GaussianDiffusion, eps_loss


@dataclass(frozen=True)
class ForwardPass:
    """Inputs and output of one forward pass; add a field for what another loss term needs.

    Attributes:
        diffusion: its schedule.
        x_t: (N, 3, H, W) noised target view.
        eps: (N, 3, H, W) predicted noise.
    """

    diffusion: GaussianDiffusion
    batch: Batch
    x_t: Tensor
    eps: Tensor


def denoising(found: ForwardPass) -> Tensor:
    """mean (eps - noise)^2, a scalar (DDPM, eq. 14)."""
    return eps_loss(found.eps, found.batch.noise)


TERMS: dict[str, Callable[[ForwardPass], Tensor]] = {"denoising": denoising}


def loss_terms(found: ForwardPass) -> dict[str, Tensor]:
    """Every term by name, and their sum as "loss"; scalars in float32."""
    terms = {name: term(found) for name, term in TERMS.items()}
    total, *others = terms.values()
    return {"loss": sum(others, start=total), **terms}
