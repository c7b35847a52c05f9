"""A checkpoint of train.py opened by those who look at it: test.py, sample.py, embed.py."""

import json
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import build_dataset
from model import SODA
from training.experiment import Experiment, build_on_meta, near, open_experiment
from training.state import first_difference
from utils.agreement import first_on_each_node
from utils.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint
from utils.config import Config, ConfigError
from utils.config_file import differences, override, parse_config
from utils.distributed import same_everywhere, set_timeout

logger = logging.getLogger(__name__)

# What the weights mean. Seed, views, diffusion and batch size are the checkpoint's; the rest is no matter to a judge.
MUST_AGREE = ("data.", "encoder.", "decoder.", "initialization")


@dataclass(frozen=True)
class Trained:
    """A checkpoint read: where it lies, what it holds, and the config under which to look at it."""

    path: Path
    contents: dict[str, Any]
    config: Config

    @property
    def folder(self) -> Path:
        """Of the run that wrote it, where reports are put; its own folder, if it was moved out of such a one."""
        inside = self.path.parent
        return inside.parent if inside.name == "checkpoints" else inside

    def describe(self, steps_per_epoch: int) -> str:
        """Which checkpoint, of which epoch and step."""
        step = self.contents["step"]
        return f"{Path(*self.path.parts[-3:])}, epoch {step / steps_per_epoch:g}, step {step}"

    @property
    def digest(self) -> str:
        """SHA-256 of the file, as SHA256SUMS lists it."""
        return str(self.contents["sha256"])

    def soda(self) -> SODA:
        """The EMA model on the host, in evaluation mode; raises CheckpointError."""
        soda, weights = build_on_meta(self.config).to_empty(device="cpu"), self.contents["ema"].get("model", {})
        difference = first_difference(weights, soda) or first_difference(self.contents["model"], soda)
        if difference:
            raise CheckpointError(f"the checkpoint does not fit the model: {difference}; name another")
        soda.load_state_dict(weights)
        return soda.eval().requires_grad_(False)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of the training images' channels, by which the encoder's input is normalised.

        Checkpoints of earlier versions lack them: the images are then opened, which raises DatasetError.
        """
        if "statistics" not in self.contents:
            logger.info("%s holds no mean and deviation of its images: opening them", self.path)
            data = self.config.data.model_dump()
            _, _, info = first_on_each_node(lambda: build_dataset(**data))
            return list(info.mean), list(info.std)
        mean, std = self.contents["statistics"]
        return mean, std


def read_trained(config: Config | None, checkpoint: Path | None, overrides: list[str]) -> Trained:
    """The checkpoint that is named, else the newest of `config`'s output_dir; raises ConfigError, CheckpointError.

    Args:
        config: how to look at it; None: the checkpoint's own, in float32, changed by `overrides`, which are in any
            other already.
    """
    if checkpoint is None:
        assert config is not None, "one of them is given"
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
    if not same_everywhere((contents["sha256"], config.model_copy(update={"data": data, "output_dir": ""}))):
        raise ConfigError(f"the processes read different checkpoints or configs from {checkpoint}: give them the same")
    return Trained(checkpoint, contents, config)


def _check_agreement(trained_with: Config, config: Config, checkpoint: Path, weights: dict[str, Any]) -> None:
    """Raise ConfigError, saying what to add to the command line, where `config` describes another model."""
    changed = differences(trained_with, config, run=False, prefixes=MUST_AGREE)
    if not changed:
        return
    told = dict(changed)
    if "decoder.modulation" in changed:  # without which these would be refused
        told |= differences(trained_with, config, run=False, prefixes=("training.mask.",))
        told |= differences(trained_with, config, run=True, prefixes=("sampling.sections", "sampling.guidance"))
    hint = " ".join(shlex.quote(f"{name}={json.dumps(old)}") for name, (old, _) in told.items())
    shapes = first_difference(weights, build_on_meta(config))
    reason = f" ({shapes})" if shapes else ""
    raise ConfigError(f"{checkpoint} was trained with another config{reason}: add {hint}")


def open_trained(trained: Trained) -> tuple[Experiment, SODA]:
    """Its images, and its EMA model on the device; raises ConfigError, DatasetError, CheckpointError."""
    soda = trained.soda()
    experiment = open_experiment(trained.config)
    if trained.contents["data"] != experiment.data_digest:
        logger.info("the training images in %s are not those of the checkpoint", trained.config.data.root)
    return experiment, near(soda, experiment.device)
