"""A checkpoint of train.py opened by the programs that look at it: test.py, sample.py, embed.py."""

import json
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config.errors import ConfigError
from config.reading import differences, override, parse_config
from config.schema import Config
from experiment.models import build_on_meta, to_device
from experiment.opening import Experiment, open_experiment
from model.soda import SODA
from utils.distributed.collectives import all_equal, set_timeout
from utils.run_folder.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint

logger = logging.getLogger(__name__)

# Keys that must have the checkpoint's values, since they give the weights their meaning. Seed, views, diffusion and
# training are taken from the checkpoint; all other keys may differ.
MUST_AGREE = ("data.", "encoder.", "decoder.", "initialization")


@dataclass(frozen=True)
class Trained:
    """A checkpoint that was read: its path, its contents, and the config to look at it with."""

    path: Path
    contents: dict[str, Any]
    config: Config

    @property
    def folder(self) -> Path:
        """Folder for reports: the run's, or the checkpoint's own if it was moved out of a run."""
        inside = self.path.parent
        return inside.parent if inside.name == "checkpoints" else inside

    @property
    def step(self) -> int:
        return int(self.contents["step"])

    @property
    def digest(self) -> str:
        """SHA-256 of the file, as SHA256SUMS lists it."""
        return str(self.contents["sha256"])

    def describe(self, steps_per_epoch: int) -> str:
        """The checkpoint's name, epoch and step."""
        return f"{Path(*self.path.parts[-3:])}, epoch {self.step / steps_per_epoch:g}, step {self.step}"

    def soda(self) -> SODA:
        """The EMA model on the host, in evaluation mode; raises CheckpointError."""
        soda, weights = build_on_meta(self.config).to_empty(device="cpu"), self.contents["ema"].get("model", {})
        check_weights(weights, soda)
        check_weights(self.contents["model"], soda)
        soda.load_state_dict(weights)
        return soda.eval().requires_grad_(False)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of the training images' channels, which normalise the encoder's input.

        Raises CheckpointError if the checkpoint has none, as those of ablations written before they had.
        """
        if "statistics" not in self.contents:
            raise CheckpointError(f"{self.path} holds no mean and deviation of its images: resume its run once")
        mean, std = self.contents["statistics"]
        return mean, std


def read_trained(config: Config | None, checkpoint: Path | None, overrides: list[str]) -> Trained:
    """Collective. Reads a checkpoint; raises ConfigError and CheckpointError.

    Args:
        config: the config to look at it with; None: the checkpoint's own, in float32, changed by `overrides`, which
            any other config already includes.
        checkpoint: None: the newest in the config's output_dir.
    """
    if checkpoint is None:
        assert config is not None, "config or checkpoint is given"
        folder = Path(config.output_dir) / "checkpoints"
        checkpoint, contents = newest_checkpoint(folder) or (folder / "last.pt", None)
        contents = contents or load_checkpoint(checkpoint)
    else:
        contents = load_checkpoint(checkpoint)
    trained_with = parse_config(contents["config"], str(checkpoint))
    if config is None:
        config = override(trained_with, ["training.use_amp=false", *overrides], str(checkpoint))
        set_timeout(config.distributed.timeout_minutes)
    _check_agreement(trained_with, config, checkpoint, contents["model"])
    views = trained_with.views.model_copy(update={"probe": config.views.probe})
    training = trained_with.training.model_copy(update={"use_amp": config.training.use_amp})
    as_trained = {"seed": trained_with.seed, "diffusion": trained_with.diffusion, "views": views, "training": training}
    config = config.model_copy(update=as_trained)
    config = parse_config(config.to_yaml(), f"the command line with the config of {checkpoint}")  # checked anew
    data = config.data.model_copy(update={"root": "", "cache_dir": ""})
    if not all_equal((contents["sha256"], config.model_copy(update={"data": data, "output_dir": ""}))):
        raise ConfigError(f"the processes read different checkpoints or configs from {checkpoint}: give them the same")
    return Trained(checkpoint, contents, config)


def _check_agreement(trained_with: Config, config: Config, checkpoint: Path, weights: dict[str, Any]) -> None:
    """Raise ConfigError, naming what to add to the command line, if `config` describes another model."""
    changed = differences(trained_with, config, run=False, prefixes=MUST_AGREE)
    if not changed:
        return
    to_add = dict(changed)
    if "decoder.modulation" in changed:  # these keys would be refused without it
        to_add |= differences(trained_with, config, run=False, prefixes=("training.mask.",))
        to_add |= differences(trained_with, config, run=True, prefixes=("sampling.sections", "sampling.guidance"))
    hint = " ".join(shlex.quote(f"{name}={json.dumps(old)}") for name, (old, _) in to_add.items())
    shapes = first_difference(weights, build_on_meta(config))
    reason = f" ({shapes})" if shapes else ""
    raise ConfigError(f"{checkpoint} was trained with another config{reason}: add {hint}")


def check_weights(weights: dict[str, Any], model: nn.Module) -> None:
    """Raise CheckpointError if a checkpoint's weights differ from those of `model` in name or shape."""
    difference = first_difference(weights, model)
    if difference:
        raise CheckpointError(f"the checkpoint does not fit the model: {difference}; name another")


def first_difference(weights: dict[str, Any], model: nn.Module) -> str | None:
    """The first name or shape in which a checkpoint's weights differ from `model` (meta or not); None if none does."""
    here = model.state_dict()
    for name in (*here, *weights):
        if name not in here:
            return f"its {name} is not in the model"
        if not isinstance(weights.get(name), torch.Tensor):
            return f"it has no {name}"
        if weights[name].shape != here[name].shape:
            return f"{name} is {tuple(weights[name].shape)} there and {tuple(here[name].shape)} here"
    return None


def open_trained(trained: Trained) -> tuple[Experiment, SODA]:
    """Collective. Opens the images, and the EMA model on the device; raises ConfigError, DatasetError, CheckpointError.

    Logs it if the images are not those that the checkpoint was trained on.
    """
    soda = trained.soda()
    experiment = open_experiment(trained.config)
    if trained.contents["data"] != experiment.data_digest:
        logger.info("the training images in %s are not those of the checkpoint", trained.config.data.root)
    return experiment, to_device(soda, experiment.device)
