"""Evaluation of a run: the steps at which it is due, and its result."""

from dataclasses import dataclass

from torch import Tensor

from evaluation.encoders import baselines, encode_with
from evaluation.features import encode_clean, extract_latents
from evaluation.judge import Table, judge
from evaluation.protocols import Protocol, config_protocols
from experiment.opening import Experiment
from model.soda import SODA
from training.sample_grid import sample_grid
from utils.device import memory_for


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation of the EMA model.

    Attributes:
        step: optimiser steps done.
        at_end: True if training is complete. Only then does the evaluation include baselines and test latents.
        protocols: protocols that were applied; empty if the images have no labels.
        table: accuracies by protocol and encoder.
        grid: (3, H, W) uint8 image of samples; None if `sampling.num_images` is 0.
        test_z: (N, latent_dim) latents of the test images; None before the end of training or without labels.
    """

    step: int
    at_end: bool
    protocols: list[Protocol]
    table: Table
    grid: Tensor | None
    test_z: Tensor | None


def evaluation_due(experiment: Experiment, step: int) -> bool:
    """Returns True every `evaluation.every` epochs and after the last step."""
    epoch, step_of_epoch = divmod(step, experiment.loader.steps_per_epoch)
    periodic = step_of_epoch == 0 and epoch > 0 and epoch % experiment.config.evaluation.every == 0
    return periodic or step == experiment.total_steps


def evaluate(experiment: Experiment, soda: SODA, step: int) -> Evaluation:
    """Collective. Judges the encoder of `soda` and draws a grid of samples. Raises OutOfMemoryError.

    After the last step, the untrained encoder and the raw pixels are judged as well.
    """
    config, test = experiment.config, experiment.test
    at_end = step == experiment.total_steps
    protocols, table, test_z, grid = [], Table(), None, None
    if test is not None:
        protocols = config_protocols(config)
        encoders = {"trained": encode_with(experiment, soda)} | (baselines(experiment) if at_end else {})
        smaller = max(1, config.evaluation.batch_size // 2)
        with memory_for(lambda: f"set evaluation.batch_size={smaller}"):
            table = judge(experiment, encoders, protocols)
            if at_end:
                test_z = extract_latents(
                    lambda pixels: encode_clean(
                        soda, experiment.views, pixels, experiment.device, experiment.amp_dtype
                    ),
                    test,
                    config.evaluation.batch_size,
                    experiment.device,
                )
    if config.sampling.num_images:
        with memory_for(lambda: f"set sampling.num_images={config.sampling.num_images // 2}"):
            grid = sample_grid(experiment, soda)
    return Evaluation(step, at_end, protocols, table, grid, test_z)
