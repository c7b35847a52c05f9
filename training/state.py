"""Training state: the model, its moving average, the optimiser, and the sums and counts for reports."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from ema_pytorch import EMA
from torch import Tensor, nn

from config.schema import Optimizer, Running
from experiment.models import initial_soda
from experiment.opening import Experiment
from experiment.starting import StartingWeights, read_starting_weights, start_from
from experiment.timesteps import TimestepSampler, make_sampler
from experiment.trained import check_weights
from model.soda import SODA
from training.losses import logged_names
from utils.device import FUSED, memory_for
from utils.distributed.collectives import all_reduce
from utils.distributed.processes import world_size
from utils.run_folder.checkpoint import CheckpointError


class Snapshot:
    """Copies of small tensors that can be restored on the device without a host synchronisation."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            self._tensors.setdefault(tensor.dtype, []).append(tensor)
        self._values = {dtype: _flat(tensors) for dtype, tensors in self._tensors.items()}

    @torch.no_grad()
    def restore(self, condition: Tensor) -> None:
        """Sets the tensors back to their copies if `condition`, a bool tensor on their device, is true."""
        for dtype, tensors in self._tensors.items():
            chosen = torch.where(condition, self._values[dtype], _flat(tensors))
            parts = chosen.split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@dataclass(frozen=True)
class Summary:
    """Summary of the steps since the last report.

    Attributes:
        losses: mean of "loss", and of each loss term if there are several, over the steps that were not skipped; NaN if
            all were skipped.
        skipped: number of skipped steps.
        most_in_a_row: largest number of consecutive skipped steps. If such a sequence began before the last report, its
            earlier steps count as well.
    """

    losses: dict[str, float]
    skipped: int
    most_in_a_row: int


class Tally:
    """Sums over the steps since the last report. They are on the device, so that no step synchronises with it.

    Attributes:
        names: names of the sums: first the losses, then "steps", "skipped", "row" (number of consecutive skipped steps
            up to now) and "longest_row" (largest value of "row").
        values: the sums, (len(names),) float32.
    """

    def __init__(self, device: torch.device, losses: Iterable[str]) -> None:
        self._losses = list(losses)
        self.names = [*self._losses, "steps", "skipped", "row", "longest_row"]
        self.values = torch.zeros(len(self.names), device=device)
        self._sums, self._counts = self.values.split([len(self._losses), 4])

    def add(self, losses: Mapping[str, Tensor], skipped: Tensor) -> None:
        """Adds one step: the losses of this rank's share, and `skipped`, 0 or 1 in float32 on the device."""
        values = torch.stack([losses[name] for name in self._losses])
        self._sums += torch.where(skipped.bool() | ~values.isfinite(), 0.0, values)
        steps, skips, row, longest_row = self._counts.unbind()
        steps += 1
        skips += skipped
        row.add_(1).mul_(skipped)
        torch.maximum(longest_row, row, out=longest_row)

    def take(self) -> Summary:
        """Collective. Reduces the sums over all ranks, returns their summary and resets them.

        Synchronises with the device.
        """
        found = dict(zip(self.names, self._mean().tolist(), strict=True))
        self.values.zero_()
        self._counts[2] = found["row"]  # the next steps may be skipped as well
        counted = found["steps"] - found["skipped"]
        losses = {name: found[name] / counted if counted else float("nan") for name in self._losses}
        return Summary(losses, int(found["skipped"]), int(found["longest_row"]))

    def _mean(self) -> Tensor:
        """Collective. Returns the mean of the sums over all ranks. Only the losses differ between ranks."""
        return all_reduce(self.values.clone()) / world_size()

    def state_dict(self, alone: bool = False) -> dict[str, Tensor]:
        """Collective unless `alone`. Returns the sums by name: means over all ranks, or, with `alone`, this rank's."""
        return dict(zip(self.names, (self.values if alone else self._mean()).unbind(), strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the result of `state_dict`. A row of skipped steps that has ended no longer counts."""
        self.values.copy_(torch.stack([state[name].cpu() for name in self.names]))
        self._counts[3] = self._counts[2]


@dataclass(kw_only=True)
class RunState:
    """Everything that training changes, in any program that trains.

    Attributes:
        model: the unwrapped module.
        wrapped: the module that a training step calls: `model`, or DDP around it.
        step: optimiser steps done, skipped ones included.
        started_from: SHA-256 of the file that "encoder" or "decoder" started from, if there is one.
    """

    model: Any  # a module; a type checker does not know its submodules
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tally: Tally
    step: int = 0
    wrapped: Any = None
    started_from: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.wrapped = self.wrapped or self.model

    def state_dict(self, alone: bool = False) -> dict[str, Any]:
        """Collective unless `alone`. Returns the state. With `alone`, the tally covers only this rank's share."""
        return {
            "model": self.model.state_dict(),
            "ema": {"model": self.ema.ema_model.state_dict(), "step": self.ema.step, "initted": self.ema.initted},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "tally": self.tally.state_dict(alone),
            "step": self.step,
            "started_from": self.started_from,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the result of `state_dict`. Raises CheckpointError if the state does not fit this model."""
        if not state["model"]:
            raise CheckpointError(
                "the checkpoint holds only the EMA model, for test.py, sample.py and embed.py: training cannot resume "
                "from it; choose another output_dir"
            )
        check_weights(state["model"], self.model)
        try:
            self._load(state)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"the checkpoint does not fit the model ({reason}): use another checkpoint") from None

    def _load(self, state: dict[str, Any]) -> None:
        # Learning rates, `fused` and `foreach` come from the config and the device, not from the checkpoint.
        # They are needed during loading, because torch moves the counts of steps to the device only for fused groups.
        groups = [
            saved | {name: group[name] for name in ("lr", "fused", "foreach")}
            for saved, group in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.model.load_state_dict(state["model"])
        self.ema.ema_model.load_state_dict(state["ema"]["model"])
        self.ema.step.copy_(state["ema"]["step"])
        self.ema.initted.copy_(state["ema"]["initted"])
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        # Moments that were saved on another device may have another memory layout and keep it when they are loaded.
        # Fused kernels would read them in the memory layout of the parameter.
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.tally.load_state_dict(state["tally"])
        self.step = state["step"]
        self.started_from = dict(state["started_from"])


@dataclass(kw_only=True)
class TrainState(RunState):
    """State of train.py, whose model is SODA."""

    timestep_sampler: TimestepSampler

    @property
    def soda(self) -> Any:
        """The model, a `model.soda.SODA`."""
        return self.model

    def state_dict(self, alone: bool = False) -> dict[str, Any]:
        """Collective unless `alone`. Returns the state.

        With `alone`, the tally and the history of adaptive timesteps cover only this rank's share.
        """
        return super().state_dict(alone) | {"timesteps": self.timestep_sampler.state_dict(alone)}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.timestep_sampler.load_state_dict(state["timesteps"])


def averaged(model: nn.Module, config: Running) -> EMA:
    """Returns the moving average of a model that is on its device already, as `config` describes it."""
    # The average is never moved itself. So its own counters stay on the host, and no step synchronises with the device.
    ema = EMA(
        model,
        beta=config.ema_decay,
        power=config.ema_power,
        update_after_step=0,
        update_every=1,
        include_online_model=False,
        use_foreach=True,
    )
    ema.ema_model.eval()  # the copy starts in training mode
    return ema


def initial_state(experiment: Experiment, starting: Mapping[str, StartingWeights] | None = None) -> TrainState:
    """Returns model, EMA, optimiser, scaler, sampler and tally before the first step.

    Args:
        starting: weights that the parts start from. {}: random weights, for a run that resumes. None: the files in the
            config are read, which is collective.

    Raises:
        ConfigError: a file cannot be used.
        OutOfMemoryError
    """
    training, device = experiment.config.training, experiment.device
    if starting is None:
        starting = read_starting_weights(experiment.config)
    with memory_for(lambda: "use a smaller model or another device"):
        soda = initial_soda(experiment.config, device)
        encoder, ours = starting.get("encoder"), (experiment.info.mean, experiment.info.std)
        as_before = encoder is not None and encoder.statistics == ours
        images = "the images that the encoder was trained on" if as_before else "this run's own images"
        start_from(soda, starting, images)
        if experiment.config.encoder.frozen:
            soda.freeze_encoder()
        return TrainState(
            model=soda,
            ema=averaged(soda, training),
            optimizer=_optimizer(soda, experiment.config.optimizer, device),
            scaler=torch.amp.GradScaler(device.type, enabled=experiment.amp_dtype == torch.float16),
            timestep_sampler=make_sampler(training.timesteps, experiment.diffusion, device),
            tally=Tally(device, logged_names(training)),
            started_from={part: found.digest for part, found in starting.items()},
        )


def _optimizer(soda: SODA, config: Optimizer, device: torch.device) -> torch.optim.Optimizer:
    """Returns AdamW over all parameters: the encoder's with `encoder_lr`, all others with `decoder_lr`.

    The group of a frozen encoder is empty.
    """
    of_encoder = {id(parameter) for parameter in soda.encoder.parameters()}
    encoder = [parameter for parameter in soda.encoder.parameters() if parameter.requires_grad]
    others = [parameter for parameter in soda.parameters() if id(parameter) not in of_encoder]
    return torch.optim.AdamW(
        [{"params": encoder, "lr": config.encoder_lr}, {"params": others, "lr": config.decoder_lr}],
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        fused=device.type in FUSED,
    )
