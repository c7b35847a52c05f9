"""Opening of a checkpoint of train.py, for programs that use the trained model: test.py, sample.py, embed.py."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config.errors import ConfigError
from config.keys import differences, portable
from config.reading import override, parse_config, to_words
from config.schema import Config
from datasets.images import Statistics
from experiment.models import build_on_meta, to_device
from experiment.opening import Experiment, open_experiment
from model.soda import SODA
from utils.distributed.collectives import all_equal, set_timeout
from utils.run_folder.checkpoint import CheckpointError, image_statistics, load_checkpoint, newest_checkpoint

logger = logging.getLogger(__name__)

# Prefixes of the experiment keys that must have the values of the checkpoint, because they define the model. Seed,
# views (except `views.probe`), diffusion and training (except `training.use_amp`) are always taken from the checkpoint.
# With --config, all experiment keys of `data` must agree as well. All other keys may differ.
MUST_AGREE = ("data.image_size", "data.stored_size", "encoder.", "decoder.", "initialization")
NOT_OF_THE_MODEL = ("encoder.frozen",)  # keys that begin like those above, but may differ


@dataclass(frozen=True)
class Trained:
    """A checkpoint that has been read.

    Attributes:
        contents: contents of the file, as returned by `load_checkpoint`.
        config: config to use the model with. It combines the checkpoint's config and the user's.
    """

    path: Path
    contents: dict[str, Any]
    config: Config

    @property
    def folder(self) -> Path:
        """Folder for reports: the run folder, or the checkpoint's own folder if that is not named `checkpoints`."""
        inside = self.path.parent
        return inside.parent if inside.name == "checkpoints" else inside

    @property
    def step(self) -> int:
        """Training step at which the checkpoint was saved."""
        return int(self.contents["step"])

    @property
    def digest(self) -> str:
        """SHA-256 of the checkpoint file, in hexadecimal digits, as in the run's checkpoints/SHA256SUMS."""
        return str(self.contents["sha256"])

    @property
    def reduced(self) -> bool:
        """True if the checkpoint holds only the EMA model (see `reduced_checkpoint`)."""
        return not self.contents["model"]

    @property
    def grey_bits(self) -> int | None:
        """Range of the training images' greys (see `Rules.grey_bits`)."""
        found = self.contents.get("grey_bits")  # checkpoints of older versions have none
        return None if found is None else int(found)

    def saw_images_of(self, experiment: Experiment) -> bool:
        """Returns True if the checkpoint was trained on the training images of `experiment`."""
        return bool(self.contents["data"] == experiment.data_digest)

    def progress(self, experiment: Experiment) -> str:
        """Returns the epoch and the step at which the checkpoint was saved: "epoch 2, step 44".

        The epoch is left out if the experiment has other training images than the run. The number of steps in the run's
        epochs is then unknown.
        """
        known = self.saw_images_of(experiment)
        epoch = f"epoch {self.step / experiment.steps_per_epoch:g}, " if known else ""
        return f"{epoch}step {self.step}"

    def describe(self, experiment: Experiment) -> str:
        """Returns the last three parts of the checkpoint's path, and its progress, in one line."""
        return f"{Path(*self.path.parts[-3:])}, {self.progress(experiment)}"

    @property
    def trained_with(self) -> Config:
        """Config that the checkpoint was saved with."""
        return parse_config(self.contents["config"], str(self.path))

    def soda(self) -> SODA:
        """Returns the EMA model on the host, in evaluation mode and without gradients.

        Raises CheckpointError if the weights do not fit the model that the config describes, or are not finite.
        """
        soda, weights = build_on_meta(self.config).to_empty(device="cpu"), self.contents["ema"].get("model", {})
        check_weights(weights, soda)
        if not self.reduced:
            check_weights(self.contents["model"], soda)
        if not all(each.isfinite().all() for each in weights.values()):
            raise CheckpointError(
                f"{self.path} has weights that are not finite: use a checkpoint from before the run diverged"
            )
        soda.load_state_dict(weights)
        return soda.eval().requires_grad_(False)

    def statistics(self) -> Statistics:
        """Returns (mean, standard deviation) of the training images' channels. They normalise the encoder's input.

        Raises CheckpointError if the checkpoint has none. Checkpoints of older versions may have none.
        """
        found = image_statistics(self.contents)
        if found is None:
            raise CheckpointError(
                f"{self.path} has no mean and standard deviation of its images: resume its run (with a larger "
                "training.epochs if it has finished) to save a new checkpoint"
            )
        return found


def read_trained(config: Config | None, checkpoint: Path | None, overrides: list[str]) -> Trained:
    """Collective. Reads a checkpoint and combines its config with the user's config.

    Args:
        config: the user's config, which already includes `overrides`. It must name the data set of the checkpoint.
            None: the config that is stored in the checkpoint is used, with float32 arithmetic, and changed by
            `overrides`, which may choose another data set.
        checkpoint: path of the checkpoint; None: the newest checkpoint in the output_dir of `config`.

    Raises:
        ConfigError: the config is not valid, describes another model than the checkpoint, or is not the same on all
            ranks. Also raised if the ranks read different checkpoints, or if `overrides` of the stored config name a
            run folder, which would be ignored.
        CheckpointError: the checkpoint is missing or cannot be used.
    """
    if checkpoint is None:
        assert config is not None, "a config or a checkpoint must be given"
        folder = Path(config.output_dir) / "checkpoints"
        checkpoint, contents = newest_checkpoint(folder) or (folder / "last.pt", None)
        contents = contents or load_checkpoint(checkpoint)
    else:
        if config is None and any(each.startswith("output_dir=") for each in overrides):
            raise ConfigError(f"output_dir does not apply to --checkpoint {checkpoint}: remove it")
        contents = load_checkpoint(checkpoint)
    contents = {**contents, "optimizer": {}}  # frees its moments, which are twice the model and only for training
    trained_with = parse_config(contents["config"], str(checkpoint))
    if config is None:
        config = override(trained_with, ["training.use_amp=false", *overrides], str(checkpoint))
        set_timeout(config.distributed.timeout_minutes)
        prefixes: tuple[str, ...] = MUST_AGREE
    else:
        prefixes = ("data.", *MUST_AGREE)
    _check_agreement(trained_with, config, prefixes, checkpoint, contents["ema"].get("model", {}))
    views = trained_with.views.model_copy(update={"probe": config.views.probe})
    training = trained_with.training.model_copy(update={"use_amp": config.training.use_amp})
    as_trained = {"seed": trained_with.seed, "diffusion": trained_with.diffusion, "views": views, "training": training}
    config = config.model_copy(update=as_trained)
    # Checks the combined config, because model_copy does not.
    config = parse_config(config.to_yaml(), f"the command line with the config of {checkpoint}")
    data = config.data.model_copy(update={"root": "", "cache_dir": ""})
    if not all_equal((contents["sha256"], config.model_copy(update={"data": data, "output_dir": ""}))):
        raise ConfigError(
            f"the processes read different checkpoints or configs from {checkpoint}: give all of them the same files"
        )
    return Trained(checkpoint, contents, config)


def _check_agreement(
    trained_with: Config, config: Config, prefixes: tuple[str, ...], checkpoint: Path, weights: dict[str, Any]
) -> None:
    """Raises ConfigError if keys that begin with `prefixes` differ. The message says what to add to the command."""
    changed = differences(trained_with, config, run=False, prefixes=prefixes)
    changed = {name: values for name, values in changed.items() if name not in NOT_OF_THE_MODEL}
    if not changed:
        return
    to_add = dict(changed)
    if "decoder.modulation" in changed:
        # The present values of these keys may not be valid with the modulation of the checkpoint.
        to_add |= differences(trained_with, config, run=False, prefixes=("training.mask.",))
        to_add |= differences(trained_with, config, run=True, prefixes=("sampling.sections", "sampling.guidance"))
    hint = to_words({name: old for name, (old, _) in to_add.items()})
    shapes = first_difference(weights, build_on_meta(config))
    reason = f" ({shapes})" if shapes else ""
    raise ConfigError(f"{checkpoint} was trained with another config{reason}: add {hint} to the command")


def reduced_checkpoint(trained: Trained) -> dict[str, Any]:
    """Returns the contents of a checkpoint that holds only the EMA model, in bf16, and what is needed to use it.

    test.py, sample.py, embed.py and `load_encoder` open it. Training cannot resume from it. Its config defines the
    experiment of the checkpoint, and names no paths. The name of the images, and the settings of samples and
    evaluations, are those of `trained.config`. Raises ConfigError if another name contradicts other keys.
    """
    halved = halved_weights(trained.soda())
    kept = {name: trained.contents[name] for name in ("step", "data", "statistics")}
    no_state: dict[str, Any] = {name: {} for name in ("model", "optimizer", "scaler", "tally")}
    used = {name: getattr(trained.config, name) for name in ("sampling", "evaluation")}
    config = portable(trained.trained_with.model_copy(update=used))
    config = override(config, [f"data.name={trained.config.data.name}"], str(trained.path))
    more = {"ema": {"model": halved}, "config": config.to_yaml(), "grey_bits": trained.grey_bits}
    return no_state | kept | more


def halved_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the state dict with the parameters in bf16.

    Buffers are small and keep their type. Rounded to bf16, the frequencies of `TimeBiases` would be other frequencies.
    """
    parameters = {name for name, _ in module.named_parameters()}
    return {name: each.bfloat16() if name in parameters else each for name, each in module.state_dict().items()}


def check_timestep(config: Config, timestep: int | None) -> None:
    """Raises ConfigError if a time-dependent encoder has no timestep, or another encoder has one.

    The features of a time-dependent encoder at one timestep are a single z, as those of any other encoder.
    """
    last = config.diffusion.num_timesteps - 1
    if config.encoder.time_dependent and timestep is None:
        raise ConfigError(
            "the z of this encoder depends on the timestep, and a single z is needed: add --timestep T, from 0 to "
            f"{last} (in Python, timestep=T); test.py shows the accuracy at several timesteps"
        )
    if not config.encoder.time_dependent and timestep is not None:
        raise ConfigError(f"--timestep {timestep} is for encoders with encoder.time_dependent=true: remove it")
    if timestep is not None and not 0 <= timestep <= last:
        raise ConfigError(f"--timestep {timestep} does not exist: choose one from 0 to {last}")


def check_no_cameras(config: Config, what: str) -> None:
    """Raises ConfigError if the encoder needs the camera of each image, which `what` does not give."""
    if config.data.has_cameras:
        raise ConfigError(f"{what} does not support cameras (data.name=posed): use a model of another data set")


def check_cameras(config: Config, what: str) -> None:
    """Raises ConfigError if the images have no cameras, which `what` needs, or if no images are held out."""
    if not config.data.has_cameras:
        raise ConfigError(f"{what} needs images with cameras (data.name=posed): use a model of such images")
    if not config.data.holdout:
        raise ConfigError(f"{what} needs images that are held out: set data.holdout as in training")


def check_weights(weights: dict[str, Any], model: nn.Module) -> None:
    """Raises CheckpointError if the names or shapes of a checkpoint's weights differ from those of `model`."""
    difference = first_difference(weights, model)
    if difference:
        raise CheckpointError(f"the checkpoint does not fit the model ({difference}): use another checkpoint")


def first_difference(weights: dict[str, Any], model: nn.Module, source: str = "the checkpoint") -> str | None:
    """Returns a text about the first weight whose name or shape differs between `weights` and `model`.

    Returns None if all names and shapes are the same. `model` may be on the meta device.

    Args:
        source: name of the origin of `weights` in the text.
    """
    here = model.state_dict()
    for name in (*here, *weights):
        if name not in here:
            return f"the model has no {name}"
        if not isinstance(weights.get(name), torch.Tensor):
            return f"{source} has no {name}"
        if weights[name].shape != here[name].shape:
            return f"{name} is {tuple(weights[name].shape)} in {source} and {tuple(here[name].shape)} in the model"
    return None


def open_trained(trained: Trained) -> tuple[Experiment, SODA]:
    """Collective. Loads the images and returns (experiment, EMA model on the device).

    Logs a message if the training images are not the images that the checkpoint was trained on. Raises ConfigError,
    DatasetError and CheckpointError.
    """
    soda = trained.soda()
    # The encoder's input is decoded and normalised as in training, also if these are other images.
    experiment = open_experiment(trained.config, image_statistics(trained.contents), trained.grey_bits)
    if not trained.saw_images_of(experiment):
        logger.info(
            "the training images in %s are not the images that the checkpoint was trained on%s",
            trained.config.data.root,
            ", which may include images that are now held out for testing" if trained.config.data.holdout else "",
        )
    return experiment, to_device(soda, experiment.device)
