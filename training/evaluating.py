"""Evaluation of a run: the steps at which it is due, and its result."""

from dataclasses import dataclass

from torch import Tensor

from evaluation.encoders import baselines, encode_with
from evaluation.features import Features, encode_views, extract_features, feature_name, random_subset
from evaluation.hypersphere import alignment_and_uniformity
from evaluation.judge import Table, judge
from evaluation.protocols import Protocol, config_protocols
from evaluation.spectrum import effective_rank, variance_spectrum
from experiment.batch import evaluation_view
from experiment.opening import Experiment
from model.encoder import Encoder
from model.soda import SODA
from training.sample_grid import sample_grid
from training.saving import Opened
from utils.device import memory_for

MAX_LATENTS = 10_000  # enough for the spectrum, and TensorBoard's projector loads all of them into the browser

EARLY_LOOKS = (100, 300)  # steps after which latents are measured and samples drawn, before the first evaluation


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation of the EMA model.

    Attributes:
        step: optimiser steps done.
        at_end: True if training is complete. Only then does the evaluation include the baselines.
        protocols: protocols that were applied; empty if the images have no labels, and at an early look.
        table: accuracies by protocol and encoder.
        grid: (3, H, W) uint8 image of samples; None if `sampling.num_images` is 0.
        chosen: (n,) int64, indices of the images that `z` encodes: test images, or training images if there is no test
            split.
        z: (n, latent_dim) latents of these images, without augmentation.
        z_name: "z", or "z@500" for a time-dependent encoder: `z` is that of the middle one of the judged timesteps.
        measures: effective rank of `z`; and alignment and uniformity (Wang & Isola 2020) of views of at most 2,000
            images of the same split, unless the images have cameras.
        spectrum: (latent_dim,) float64, eigenvalues of the covariance of `z`, largest first.
    """

    step: int
    at_end: bool
    protocols: list[Protocol]
    table: Table
    grid: Tensor | None
    chosen: Tensor
    z: Tensor
    z_name: str
    measures: dict[str, float]
    spectrum: Tensor


def evaluation_due(experiment: Opened, step: int) -> bool:
    """Returns True every `evaluation.every` epochs and after the last step."""
    epoch, step_of_epoch = divmod(step, experiment.steps_per_epoch)
    periodic = step_of_epoch == 0 and epoch > 0 and epoch % experiment.config.evaluation.every == 0
    return periodic or step == experiment.total_steps


def look_due(experiment: Opened, step: int) -> bool:
    """Returns True at the steps EARLY_LOOKS, as long as no evaluation has been due."""
    first_evaluation = experiment.config.evaluation.every * experiment.steps_per_epoch
    return step in EARLY_LOOKS and step < min(first_evaluation, experiment.total_steps)


def evaluate(experiment: Experiment, soda: SODA, step: int) -> Evaluation:
    """Collective. Judges the encoder of `soda`, measures its latents and draws samples. Raises OutOfMemoryError.

    After the last step, the untrained encoder and the raw pixels are judged as well. At an early look, nothing is
    judged.
    """
    config, at_end = experiment.config, step == experiment.total_steps
    protocols, table, grid = [], Table(), None
    smaller = max(1, config.evaluation.batch_size // 2)
    with memory_for(lambda: f"set evaluation.batch_size={smaller}"):
        if experiment.has_test_labels and evaluation_due(experiment, step):
            protocols = config_protocols(config)
            encoders = {"trained": encode_with(experiment, soda)} | (baselines(experiment) if at_end else {})
            table = judge(experiment, encoders, protocols)
        timestep = config.judged_timesteps[len(config.judged_timesteps) // 2]
        name = feature_name("z", timestep)
        encoder = soda.encoder if timestep is None else soda.encoder.at(timestep)
        chosen, z = latents(experiment, encoder)
        measures = {"effective_rank": effective_rank(z)}
        if not config.data.has_cameras:  # augmentations that move pixels would not fit the rays

            def encode(views: Tensor, _: range) -> dict[str, Tensor]:
                return {name: encode_views(encoder, views, experiment.device, experiment.amp_dtype)}

            found = alignment_and_uniformity(experiment, {"trained": encode}, name)["trained"]
            measures |= zip(("alignment", "uniformity"), found, strict=True)
    if config.sampling.num_images:
        with memory_for(lambda: f"set sampling.num_images={config.sampling.num_images // 2}"):
            grid = sample_grid(experiment, soda)
    return Evaluation(step, at_end, protocols, table, grid, chosen, z, name, measures, variance_spectrum(z))


def latents(experiment: Experiment, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Collective. Encodes at most MAX_LATENTS test images, or training images if there are no test images.

    Returns the indices of the images (n,), which depend only on the seed, and their z (n, latent_dim).
    """
    config, device = experiment.config, experiment.device
    images = experiment.train if experiment.test is None else experiment.test
    chosen = random_subset(images, MAX_LATENTS, config.seed, "latents")

    def encode(pixels: Tensor, positions: range) -> Features:
        made = evaluation_view(experiment, images, pixels, chosen.indices[positions.start : positions.stop])
        return {"z": encode_views(encoder, made, device, experiment.amp_dtype)}

    features = extract_features(encode, chosen, config.evaluation.batch_size, device)
    return chosen.indices, features["z"]
