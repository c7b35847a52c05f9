"""Weights that a new run starts from: the encoder or the decoder of a checkpoint, or a state dict of an encoder."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config.errors import ConfigError
from config.keys import differences
from config.reading import parse_config, to_words
from config.schema import Config, NoiseSchedule, RunConfig
from datasets.images import Statistics
from experiment.models import build_on_meta
from experiment.trained import first_difference
from model.diffusion import log_sigmas
from utils.distributed.collectives import all_equal
from utils.run_folder.checkpoint import CheckpointError, image_statistics, is_checkpoint, read_tensors

LAST_LAYER = "fc."  # prefix of the weights of an encoder's last layer, which computes z
NEED_NOT_AGREE = ("encoder.frozen", "decoder.image_size", "decoder.dropout")  # shapes are compared in any case
# Further keys that must agree for each part.
ALSO_AGREE = {"encoder": (), "decoder": ("initialization", "encoder.latent_dim", "diffusion.")}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingWeights:
    """Weights that were read from the file in `encoder.weights` or `decoder.weights`.

    Attributes:
        path: the file.
        digest: SHA-256 of the file, in hexadecimal digits.
        weights: state dict of the part. It has all of its weights, except those in `new`.
        new: names of the weights that keep their random initial values.
        origin: description for the log.
        statistics: mean and standard deviation of the images that the weights were trained on; None: not known.
        image_size: height and width in pixels of the images that the encoder was trained on; None: not known.
        grey_bits: range of the greys of these images (see `Rules.grey_bits`); None: not known, or no such greys.
    """

    path: str
    digest: str
    weights: dict[str, Any]
    new: list[str]
    origin: str
    statistics: Statistics | None = None
    image_size: int | None = None
    grey_bits: int | None = None

    def load_into(self, part: nn.Module) -> None:
        """Copies the weights into the encoder or the decoder."""
        missing, unexpected = part.load_state_dict(self.weights, strict=False)
        assert missing == self.new and not unexpected


def weight_paths(config: Config) -> dict[str, str]:
    """Returns the file in the config that each part of SODA starts from; empty: none."""
    return {"encoder": config.encoder.weights, "decoder": config.decoder.weights}


def read_starting_weights(config: Config) -> dict[str, StartingWeights]:
    """Collective. Reads and checks the files that a new run starts from. Returns the weights of each part.

    Raises ConfigError if a file is missing, does not fit the model, or is not the same on all ranks.
    """
    found = read_parts(config, weight_paths(config), build_on_meta(config))
    if config.encoder.frozen and "encoder" not in found:
        logger.info("encoder.frozen=true without encoder.weights: the encoder keeps its random initial weights")
    elif config.encoder.frozen and found["encoder"].new:
        raise ConfigError(
            f"encoder.frozen=true needs all weights, but {config.encoder.weights} has no {found['encoder'].new[0]} of "
            "the model's shape: set encoder.latent_dim to the width in the file, or encoder.frozen=false"
        )
    return found


def read_parts(config: RunConfig, paths: Mapping[str, str], model: nn.Module) -> dict[str, StartingWeights]:
    """Collective. Reads and checks the file of each part. Returns the weights of the parts that have a file.

    Raises ConfigError if a file is missing, does not fit the model, or is not the same on all ranks.

    Args:
        paths: file of each part; empty: none.
        model: module whose submodules are the parts, on the meta device.
    """
    found = {}
    for part, path in paths.items():
        if path:
            try:
                found[part] = _read(config, part, Path(path), model.get_submodule(part))
            except CheckpointError as error:
                raise ConfigError(f"{part}.weights: {error}") from None
    if not all_equal({part: each.digest for part, each in found.items()}):
        names = " or ".join(f"{part}.weights" for part in paths)
        raise ConfigError(f"the machines hold different files of {names}: copy the same files to all machines")
    return found


def _read(config: RunConfig, part: str, path: Path, module: nn.Module) -> StartingWeights:
    """Reads the weights of `part` and checks them against `module`, which is on the meta device.

    Raises ConfigError or CheckpointError.
    """
    contents, digest = read_tensors(path)
    if is_checkpoint(contents):
        found = _from_checkpoint(config, part, path, digest, contents)
    elif part == "encoder" and isinstance(contents, dict) and all(isinstance(name, str) for name in contents):
        found = _from_state_dict(path, digest, contents, module)
    else:
        wanted = "a checkpoint of this program" + (" or a state dict" if part == "encoder" else "")
        raise ConfigError(f"{part}.weights: {path} is not {wanted}: use another file")
    placeholders = {name: each for name, each in module.state_dict().items() if name in found.new}
    difference = first_difference(found.weights | placeholders, module, "the file")
    if difference:
        advice = _packed(contents) or f"set the keys of `{part}` to the architecture of the file{_guess(contents)}"
        problem = f"{part}.weights: {path} does not fit the model ({difference})"
        raise ConfigError(f"{problem}: {advice}, or use another file")
    for name, each in found.weights.items():
        if not each.isfinite().all():
            raise ConfigError(f"{part}.weights: {path} has values in {name} that are not finite: use another file")
    levels = found.weights.get("time.log_sigmas")
    if levels is not None and not _close(levels.double(), log_sigmas(**config.diffusion.model_dump())):
        raise ConfigError(
            f"encoder.weights: the timesteps of {path} have other noise levels: set the keys of `diffusion` to the "
            "noise schedule of the file, or use another file"
        )
    if part == "encoder" and found.image_size not in (None, config.encoder_size):
        logger.warning(
            "the encoder in %s was trained on images of %d px, but data.image_size is %d",
            *(path, found.image_size, config.encoder_size),
        )
    return found


def _from_checkpoint(
    config: RunConfig, part: str, path: Path, digest: str, contents: dict[str, Any]
) -> StartingWeights:
    """Returns the EMA weights of `part` in a checkpoint. Raises ConfigError if its config describes another part."""
    before = parse_config(contents["config"], f"{part}.weights: {path}")
    prefix, averaged = f"{part}.", contents["ema"].get("model", {})
    compared = [prefix, *ALSO_AGREE[part]]
    if part == "encoder" and before.encoder.time_dependent:
        levels = (log_sigmas(**each.diffusion.model_dump()) for each in (before, config))
        if not _close(*levels):
            compared += [f"diffusion.{name}" for name in NoiseSchedule.model_fields]
    changed = differences(before, config, run=False, prefixes=tuple(compared))
    to_add = {name: old for name, (old, _) in changed.items() if name not in NEED_NOT_AGREE}
    if to_add:
        raise ConfigError(
            f"{part}.weights: {path} holds another {part}: add {to_words(to_add)} to the command, or use another "
            "checkpoint"
        )
    return StartingWeights(
        str(path),
        digest,
        weights={name.removeprefix(prefix): each for name, each in averaged.items() if name.startswith(prefix)},
        new=[],
        origin=f"the EMA {part} of step {contents['step']}",
        statistics=image_statistics(contents),
        image_size=before.encoder_size,
        grey_bits=contents.get("grey_bits"),
    )


def _from_state_dict(path: Path, digest: str, contents: dict[str, Any], module: nn.Module) -> StartingWeights:
    """Returns the weights of a state dict for the encoder `module`. A last layer of another shape is left out."""
    # torch before 0.4.1 saved no counters, and still loads such files: the counters start at 0.
    counters = [name for name in module.state_dict() if name.endswith(".num_batches_tracked")]
    weights, new = {name: torch.tensor(0) for name in counters} | contents, []
    last = {name: each for name, each in module.state_dict().items() if name.startswith(LAST_LAYER)}
    if any(getattr(weights.get(name), "shape", None) != each.shape for name, each in last.items()):
        new = list(last)
        weights = {name: each for name, each in weights.items() if not name.startswith(LAST_LAYER)}
    return StartingWeights(str(path), digest, weights, new, "a state dict", *_exported_facts(path))


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def _guess(contents: dict[str, Any]) -> str:
    """Returns the keys that the first convolution of a ResNet's state dict has, as text in brackets; else nothing."""
    shape = tuple(getattr(contents.get("conv1.weight"), "shape", ()))
    if "layer4.1.conv2.weight" not in contents or len(shape) != 4:
        return ""
    return f" (encoder.width={shape[0]} encoder.stem={'imagenet' if shape[-1] == 7 else 'small'})"


def _packed(contents: Any) -> str | None:
    """Returns advice for a state dict inside another dict, or with a prefix before all names; None for other files."""
    if is_checkpoint(contents):
        return None
    for name, each in contents.items():
        if isinstance(each, dict) and each and all(isinstance(value, torch.Tensor) for value in each.values()):
            return f"its entry {name!r} is a state dict: save this entry to a file of its own"
    prefixes = {"".join(name.partition(".")[:2]) for name in contents}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    return f"all its names begin with {prefix!r}: save it without this prefix" if prefix.endswith(".") else None


def _exported_facts(path: Path) -> tuple[Statistics | None, int | None, int | None]:
    """Returns statistics, size and range of greys of the images, if a file of `embed.py --export` notes them."""
    if path.suffix.lower() != ".safetensors":
        return None, None, None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        notes = file.metadata() or {}
    if not {"mean", "std", "image_size"} <= notes.keys():
        return None, None, None
    mean, std, image_size = (json.loads(notes[name]) for name in ("mean", "std", "image_size"))
    return (tuple(mean), tuple(std)), image_size, json.loads(notes.get("grey_bits", "null"))


def start_from(model: nn.Module, starting: Mapping[str, StartingWeights], normalised_by: str) -> None:
    """Copies the weights into the parts of `model`. Logs which weights were taken and which are random.

    Args:
        normalised_by: description of the images whose statistics normalise the encoder's input, for the log.
    """
    for part, found in starting.items():
        found.load_into(model.get_submodule(part))
        rest = f"; {' and '.join(found.new)} are new, with random weights" if found.new else ""
        logger.info(
            "the %s starts from %s, %s: %d tensors%s. Images are normalised by the statistics of %s",
            *(part, found.path, found.origin, len(found.weights), rest, normalised_by),
        )


def check_origin(paths: Mapping[str, str], digests: Mapping[str, str]) -> None:
    """Checks, on resume, that the files in the config are those that the run started from.

    A file that is missing is not needed.

    Args:
        paths: file of each part in the config; empty: none.
        digests: digests of the files that the run started from, by part.

    Raises:
        ConfigError: a file is another one, the config names none, or the run started from random weights.
    """
    for part, text in paths.items():
        path, expected = Path(text), digests.get(part)
        if expected and not text:
            raise ConfigError(
                f"this run started from {part}.weights, a file with the SHA-256 {expected[:16]}...: add "
                f"{part}.weights=PATH (the file may be missing now), or choose another output_dir"
            )
        if text and expected is None:
            raise ConfigError(
                f"this run did not start from {part}.weights, which has no effect on resume: remove it, or choose "
                "another output_dir"
            )
        if text and not path.is_file():
            logger.info("%s.weights=%s is missing, but is not needed on resume", part, path)
        elif text:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != expected:
                raise ConfigError(
                    f"{part}.weights={path} is not the file that this run started from, which has the SHA-256 "
                    f"{expected}: put it back, or choose another output_dir"
                )
