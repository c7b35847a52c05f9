"""The state of a training run: written whole or not at all, read without executing anything."""

import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class CheckpointError(Exception):
    """A checkpoint that is missing or cannot be used; the message says what to do."""


@dataclass
class TrainState:
    """Everything that training changes; `step` counts the optimiser steps done."""

    soda: Any  # model.SODA, unwrapped
    ema: Any  # ema_pytorch.EMA, which is untyped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    wrapped: Any = None  # what a training step calls: `soda`, or DDP around it

    def __post_init__(self) -> None:
        self.wrapped = self.wrapped or self.soda

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.soda.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; raises CheckpointError where it does not fit this model."""
        difference = first_difference(state["model"], self.soda)
        if difference:
            raise CheckpointError(f"the checkpoint does not fit the model: {difference}; name another")
        try:
            self._load(state)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"the checkpoint does not fit the model ({reason}): name another") from None

    def _load(self, state: dict[str, Any]) -> None:
        # What the config says of lr, fused and foreach holds, not what the checkpoint says.
        settings = [{name: group[name] for name in ("lr", "fused", "foreach")} for group in self.optimizer.param_groups]
        self.soda.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        # Moments saved on a device with another memory layout keep it, and fused kernels read them as if they
        # had the parameter's.
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


def first_difference(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> str | None:
    """What tells a checkpoint's weights from those of `model`, which may lie on the meta device; None if nothing."""
    here = model.state_dict()
    for name in (*here, *weights):
        if name not in here:
            return f"its {name} is not in the model"
        if not isinstance(weights.get(name), torch.Tensor):
            return f"it has no {name}"
        if weights[name].shape != here[name].shape:
            return f"{name} is {tuple(weights[name].shape)} there and {tuple(here[name].shape)} here"
    return None


def save_checkpoint(path: Path, state: dict[str, Any], config_yaml: str, data_digest: str) -> None:
    """Write to a temporary name, flush to the disk, rename: `path` is at no time half a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        torch.save({**state, "config": config_yaml, "data": data_digest}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Model, EMA, optimiser, scaler, step, config and digest of the data, on the host; raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"no checkpoint {path}: train first, or name one that exists")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, which tell a user nothing
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # bytes that are no checkpoint make the unpickler fail in any way at all
        reason = f"{type(error).__name__}: it is damaged, or holds more than tensors and plain values"
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason}): remove it or name another") from None
    expected = {"model": dict, "ema": dict, "optimizer": dict, "scaler": dict, "step": int, "config": str, "data": str}
    fits = isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in expected.items())
    if not fits or state["step"] < 0:
        raise CheckpointError(f"{path} is not a checkpoint of this program: name another")
    return state


class CheckpointInterval:
    """When a checkpoint is due, from `N steps`, `N epochs` or `N minutes`."""

    def __init__(self, text: str, steps_per_epoch: int) -> None:
        number, unit = text.split()
        self._seconds = 60 * int(number) if unit == "minutes" else None
        self._steps = int(number) * (steps_per_epoch if unit == "epochs" else 1)
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        if self._seconds is None:
            return step % self._steps == 0
        if time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True
