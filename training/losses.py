"""Loss terms: functions of one forward pass. The loss is their weighted sum. If several are used, each is logged.

To add a term, write a function, add it to TERMS, and add its weight to `training.terms` in config/schema.py. The
parameters of a new module of SODA are trained automatically, because the optimiser's groups cover the whole model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from config.schema import Training
from experiment.batch import Batch
from model.diffusion import GaussianDiffusion, squared_errors


@dataclass(frozen=True)
class ForwardPass:
    """Inputs and output of one forward pass. Add a field if another loss term needs it.

    Attributes:
        config: the `training` section of the config.
        diffusion: the diffusion process, with its noise schedule.
        batch: the micro-batch.
        x_t: (N, 3, H, W) noised target view.
        prediction: (N, 3, H, W) output of the model.
        latents, log_variances: (N, K, latent_dim) each (see model.soda.Denoised).
    """

    config: Training
    diffusion: GaussianDiffusion
    batch: Batch
    x_t: Tensor
    prediction: Tensor
    latents: Tensor
    log_variances: Tensor | None

    @cached_property
    def errors(self) -> Tensor:
        """Squared errors of the prediction, (N, 3, H, W) float32, with the weights of min-SNR if they are used."""
        batch, gamma = self.batch, self.config.min_snr_gamma
        errors = squared_errors(self.prediction, self.diffusion.target(batch.x_start, batch.timesteps, batch.noise))
        if gamma is None:
            return errors
        return errors * self.diffusion.min_snr_weights(batch.timesteps, gamma)[:, None, None, None]

    def weighted_mean(self, errors: Tensor) -> Tensor:
        """Returns the mean of errors (N, ...), weighted as the sampling of the timesteps requires."""
        if self.batch.weights is None:
            return errors.mean()
        return (self.batch.weights * errors.mean(dim=tuple(range(1, errors.dim())))).mean()


def denoising(found: ForwardPass) -> Tensor:
    """Returns the mean squared error of the prediction, a scalar (DDPM, eq. 14, for eps)."""
    return found.weighted_mean(found.errors)


def reconstruction(found: ForwardPass) -> Tensor:
    """Returns the mean squared error of the predicted clean target view, a scalar. This term is not SODA's."""
    x_start, _ = found.diffusion.split(found.x_t, found.batch.timesteps, found.prediction.float())
    return found.weighted_mean(squared_errors(x_start, found.batch.x_start))


def kl(found: ForwardPass) -> Tensor:
    """Returns the mean KL divergence of the latents' distributions from N(0, I), a scalar (Kingma & Welling 2014).

    It is summed over the dimensions of z and divided by half the number of values of a target view. Its weight is then
    that of Abstreiter et al. (2021), whose denoising loss is half of the sum over these values.
    """
    assert found.log_variances is not None, "config/consistency.py checks this"
    mean, log_variance = found.latents.float(), found.log_variances.float()
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1) / 2
    return found.weighted_mean(divergence) / (found.batch.x_start[0].numel() / 2)


def l1(found: ForwardPass) -> Tensor:
    """Returns the mean L1 norm of the latents, a scalar, divided by half the number of values of a target view."""
    return found.weighted_mean(found.latents.float().abs().sum(dim=-1)) / (found.batch.x_start[0].numel() / 2)


TERMS: dict[str, Callable[[ForwardPass], Tensor]] = {
    "denoising": denoising,
    "reconstruction": reconstruction,
    "kl": kl,
    "l1": l1,
}


def term_weights(config: Training) -> dict[str, float]:
    """Returns the weight of each term that is used. The weight of the denoising loss is 1."""
    weights = {"denoising": 1.0} | config.terms.model_dump()
    return {name: weight for name, weight in weights.items() if weight}


def logged_names(config: Training) -> list[str]:
    """Returns the names of the losses to log: "loss", and the terms. A single term equals the loss and is left out."""
    terms = list(term_weights(config))
    return ["loss", *terms] if len(terms) > 1 else ["loss"]


def loss_terms(found: ForwardPass) -> dict[str, Tensor]:
    """Returns every term that is used by name, and their weighted sum as "loss". All are scalars in float32."""
    weights = term_weights(found.config)
    terms = {name: TERMS[name](found) for name in weights}
    first, *others = (weight * terms[name] for name, weight in weights.items())
    return {"loss": sum(others, start=first), **terms}
