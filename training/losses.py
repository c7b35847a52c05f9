"""Loss terms: functions of one forward pass. The loss is their sum. If there are several, each is logged by name.

To add a term, write a function that includes the term's weight, and add it to TERMS. The parameters of a new module of
SODA are trained automatically, because the optimiser's groups cover the whole model.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from experiment.batch import Batch
from model.diffusion import GaussianDiffusion, eps_loss


@dataclass(frozen=True)
class ForwardPass:
    """Inputs and output of one forward pass. Add a field if another loss term needs it.

    Attributes:
        diffusion: the diffusion process, with its noise schedule.
        batch: the micro-batch.
        x_t: (N, 3, H, W) noised target view.
        eps: (N, 3, H, W) predicted noise.
    """

    diffusion: GaussianDiffusion
    batch: Batch
    x_t: Tensor
    eps: Tensor


def denoising(found: ForwardPass) -> Tensor:
    """Returns mean (eps - noise)^2, a scalar (DDPM, eq. 14)."""
    return eps_loss(found.eps, found.batch.noise)


TERMS: dict[str, Callable[[ForwardPass], Tensor]] = {"denoising": denoising}


def loss_terms(found: ForwardPass) -> dict[str, Tensor]:
    """Returns every term by name, and their sum as "loss". All are scalars in float32."""
    terms = {name: term(found) for name, term in TERMS.items()}
    total, *others = terms.values()
    return {"loss": sum(others, start=total), **terms}
