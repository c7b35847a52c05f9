"""The moving average of the weights, which is what is judged."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """An exponential moving average of a module's parameters and floating-point buffers, on the module's device.

    The n-th update is averages += w (values - averages), w = max(n^-power, 1 - beta): the first one copies, and the
    decay 1 - w warms up to `beta`. ema-pytorch computes the same and counts n on the host, which would have to wait for
    the device to learn that a step is skipped and is no update.
    """

    def __init__(self, module: nn.Module, beta: float, power: float) -> None:
        self.module: Any = copy.deepcopy(module).requires_grad_(False).eval()
        self.beta, self.power = beta, power
        averages, values = _floating(self.module), _floating(module)
        self.updates = torch.zeros((), device=averages[0].device)
        # p -= w (p - value) is a step of SGD with the gradient -value and weight decay 1: a fused step reads and writes
        # the memory once, as a lerp does, and can be skipped by a number on the device.
        self._sgd = torch.optim.SGD(averages, self.updates.clone(), weight_decay=1, maximize=True, fused=True)
        for average, value in zip(averages, values, strict=True):
            average.grad = value

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Move towards the module's present values unless `skipped`, 0 or 1 in float32 on the device, is 1."""
        self.updates += 1 - skipped
        self._sgd.param_groups[0]["lr"].copy_(self._weight())
        self._sgd.found_inf = skipped  # type: ignore[attr-defined]
        self._sgd.step()

    def _weight(self) -> Tensor:
        return self.updates.clamp(min=1).pow(-self.power).clamp(min=1 - self.beta)

    def decay(self) -> float:
        """Of the last update; the host waits for it."""
        return 1 - self._weight().item()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["model"])
        self.updates.copy_(state["updates"])


def _floating(module: nn.Module) -> list[Tensor]:
    tensors: Iterable[Tensor] = (*module.parameters(), *module.buffers())
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
