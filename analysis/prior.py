"""Priors over z: distributions that latents of new images are drawn from.

There are two: a mixture of Gaussians, and a diffusion model of z, which `sample.py fit_prior` fits and writes to a file
beside the checkpoint. The same command resumes an interrupted fit.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.latent_diffusion import Fit
from analysis.latent_space import draw_from_mixture, fit_mixture, subset_to_fit
from config.errors import UserError
from evaluation.codec import Codec, DrawLatents
from evaluation.features import feature_name
from experiment.opening import Experiment
from experiment.trained import Trained
from utils.distributed.collectives import on_rank_0
from utils.randomness import derive_seed
from utils.run_folder.checkpoint import unpickle

MAX_COMPONENTS = 10  # Gaussians in the mixture


class PriorError(UserError):
    """A file of a prior that cannot be used. The message says what to do."""


def prior_path(trained: Trained, timestep: int | None) -> Path:
    """Returns the path of the prior's file: beside the checkpoint, such as last.prior, or last@500.prior."""
    return trained.path.with_name(f"{feature_name(trained.path.stem, timestep)}.prior")


def open_fit(path: Path, trained: Trained, experiment: Experiment, *, must_exist: bool) -> Fit:
    """Returns the fit in the file `path`, or a new one if the file does not exist.

    Raises PriorError if the file is damaged, belongs to another checkpoint or other training images, or is missing
    although it `must_exist`.
    """
    owner = {"digest": trained.digest, "data": experiment.data_digest}
    fit = Fit(owner, experiment.config.seed, experiment.device)
    if not path.exists():
        if must_exist:
            raise PriorError(f"there is no diffusion prior {path}: fit one by sample.py fit_prior")
        return fit
    try:
        with open(path, "rb") as file:
            state = unpickle(file)
        found = {name: state[name] for name in owner}
        if found == owner:
            fit.load(state)
    except OSError as error:
        raise PriorError(f"cannot read {path} ({error.strerror}): make it readable, or remove it") from None
    except Exception as error:  # on arbitrary bytes, the unpickler can raise any exception
        raise PriorError(
            f"{path} is damaged, or no prior of this version ({type(error).__name__}): remove it and run "
            "sample.py fit_prior"
        ) from None
    if found["digest"] != trained.digest:
        raise PriorError(
            f"{path} was fitted to another checkpoint than {trained.path} (step {trained.step}): remove it and run "
            "sample.py fit_prior, or use its own checkpoint"
        )
    if found != owner:
        raise PriorError(f"{path} was fitted to other training images: remove it, or use the same images")
    return fit


def draw_from(fit: Fit) -> DrawLatents:
    """Returns a collective function that draws latents from a fitted diffusion prior, the same on all ranks."""
    return lambda count, seed: on_rank_0(lambda: fit.draw(count, seed).cpu()).to(fit.device)


def priors_of(codec: Codec, diffusion: Fit | None) -> dict[str, DrawLatents]:
    """Returns a function for each prior that draws latents from it. Each function is collective.

    The mixture is fitted to the training latents when it is first used.

    Args:
        diffusion: the fitted diffusion prior, if there is one.
    """
    experiment = codec.experiment

    @cache
    def mixture() -> Any:
        latents, _ = subset_to_fit(codec.train_z, None, experiment.config.seed)
        num_components = min(MAX_COMPONENTS, len(latents))
        return on_rank_0(lambda: fit_mixture(latents, num_components, derive_seed(codec.seed, "mixture") % 2**32))

    def from_mixture(count: int, seed: int) -> Tensor:
        fitted = mixture()
        drawn: np.ndarray = on_rank_0(lambda: draw_from_mixture(fitted, count, derive_seed(seed, "latents") % 2**32))
        return torch.tensor(drawn, dtype=torch.float32, device=experiment.device)

    found: dict[str, DrawLatents] = {"mixture": from_mixture}
    if diffusion is not None:
        found["diffusion"] = draw_from(diffusion)
    return found
