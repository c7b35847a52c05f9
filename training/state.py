"""What training changes: the model, its moving average, the optimiser, and what is counted on the device."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.ema import EMA
from utils.checkpoint import CheckpointError
from utils.distributed import all_reduce, world_size


class Snapshot:
    """Values of small tensors, to which these can be set back without the host's knowing; a few kernels in all."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            self._tensors.setdefault(tensor.dtype, []).append(tensor)
        self._values = {dtype: _flat(tensors) for dtype, tensors in self._tensors.items()}

    @torch.no_grad()
    def restore(self, condition: Tensor) -> None:
        """Set the tensors back where `condition`, a bool on their device, holds."""
        for dtype, tensors in self._tensors.items():
            chosen = torch.where(condition, self._values[dtype], _flat(tensors))
            parts = chosen.split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@dataclass
class Summary:
    """Of the steps since the last report: mean loss of those that were not skipped, how many were, most in a row."""

    loss: float
    skipped: int
    most_in_a_row: int


class Tally:
    """Sums over the steps since the last report, on the device, so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(5, device=device)
        self._loss, self._steps, self._skipped, self._row, self._longest_row = self.values.unbind()

    def add(self, loss: Tensor, skipped: Tensor) -> None:
        """One step: the loss of this process's share, and `skipped`, 0 or 1 in float32 on the device."""
        self._loss += torch.where(skipped.bool() | ~loss.isfinite(), 0.0, loss)
        self._steps += 1
        self._skipped += skipped
        self._row.add_(1).mul_(skipped)
        torch.maximum(self._longest_row, self._row, out=self._longest_row)

    def take(self) -> Summary:
        """Of all processes, which call it together; start anew. The host waits."""
        loss, steps, skipped, row, longest_row = self.mean().tolist()
        self.values.zero_()
        self._row.fill_(row)  # it may go on
        return Summary(loss / (steps - skipped) if steps > skipped else float("nan"), int(skipped), int(longest_row))

    def mean(self) -> Tensor:
        """Over all processes, which call it together: only the losses differ."""
        return all_reduce(self.values.clone()) / world_size()


@dataclass
class TrainState:
    """Everything that training changes; `step` counts the optimiser steps done, skipped ones too."""

    soda: Any  # model.SODA, unwrapped
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tally: Tally
    step: int = 0
    wrapped: Any = None  # what a training step calls: `soda`, or DDP around it

    def __post_init__(self) -> None:
        self.wrapped = self.wrapped or self.soda

    def state_dict(self, alone: bool = False) -> dict[str, Any]:
        """All processes call it together, or one `alone`, with the losses of its own share."""
        return {
            "model": self.soda.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "tally": self.tally.values if alone else self.tally.mean(),
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
        self.tally.values.copy_(state["tally"])
        self.step = state["step"]


def first_difference(weights: dict[str, torch.Tensor], model: nn.Module) -> str | None:
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
