"""One run of an ablation: trained until it is done or told to stop, resumed where it stopped, judged as by test.py."""

import hashlib
import io
import logging
import platform
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.measure import machine
from datasets import DatasetError
from training.experiment import Experiment, initial_state, open_experiment
from training.judge import all_protocols, encode_with, judge
from training.state import TrainState
from training.step import train_step, training_pixels
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.checkpoint_writer import save_checkpoint
from utils.config import Config, ConfigError
from utils.config_file import differences, parse_config
from utils.device import choose_compile, peak_memory_mb
from utils.logging import PhaseTimer

SAVE_EVERY_S = 120
WARMUP_STEPS = 30  # not in the images per second: kernels are chosen and compiled in them
LOOK_EVERY = 10  # steps between looks at the clock, for which the host waits for the device
PART_BYTES = 12 * 2**20

logger = logging.getLogger(__name__)


class Trial:
    """A config put to work, from its checkpoint if there is one that fits.

    Attributes:
        seconds: that training has taken, over all starts.
        looked_s: that it has taken since the first look at the clock, after the first step of this start.
        images_per_s: of this start, without its first steps; None if there were no others.
    """

    def __init__(self, config: Config, checkpoint: Path | None) -> None:
        torch.compiler.reset()  # else variants count as recompilations of the first, and the ninth runs eagerly
        self.config, self.checkpoint = config, checkpoint
        self.experiment: Experiment = open_experiment(config)
        if self.experiment.test is None:
            raise DatasetError(f"{config.data.root} has no labels, without which nothing can be judged")
        if self.experiment.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.experiment.device)
        self.state: TrainState = initial_state(self.experiment)
        self.seconds = self.looked_s = 0.0
        self.images_per_s: float | None = None
        self._recent: deque[torch.Tensor] = deque(maxlen=100)
        if checkpoint and checkpoint.exists():
            self._resume(checkpoint)
        if choose_compile(config.training.compile, self.experiment.device):
            self.state.soda.compile()

    def _resume(self, checkpoint: Path) -> None:
        try:
            saved = load_checkpoint(checkpoint)
            changed = differences(parse_config(saved["config"], str(checkpoint)), self.config, run=False)
        except (CheckpointError, ConfigError) as error:
            logger.info("%s; starting anew", error)
            return
        if changed or saved["data"] != self.experiment.data_digest:
            logger.info("%s is of %s; starting anew", checkpoint, ", ".join(changed) or "other images")
            return
        self.state.load_state_dict(saved)
        self.seconds = float(saved.get("seconds", 0))
        logger.info("%s: at step %d of %d", checkpoint, self.state.step, self.experiment.total_steps)

    @property
    def complete(self) -> bool:
        return self.state.step == self.experiment.total_steps

    def train(self, stop: Callable[[], bool]) -> None:
        """To the last step, or until `stop` says so; the state is then saved, if there is a checkpoint to write."""
        state, batch_size = self.state, self.config.training.batch_size
        first, begun, before = state.step, time.monotonic(), self.seconds
        looked, warm, saved = begun, begun, begun
        with closing(training_pixels(self.experiment, first)) as pixels:
            while not self.complete:
                loss, _ = train_step(self.experiment, state, pixels, PhaseTimer())
                self._recent.append(loss)
                done = state.step - first
                if done > 1 and done % LOOK_EVERY and not self.complete:
                    continue
                loss.item()  # the clock then tells of steps that are done
                now = time.monotonic()
                self.seconds = before + now - begun
                looked = now if done == 1 else looked
                self.looked_s = now - looked
                if done <= WARMUP_STEPS:
                    warm = now
                else:
                    self.images_per_s = (done - WARMUP_STEPS) * batch_size / (now - warm)
                if stop():
                    break
                if now - saved > SAVE_EVERY_S:
                    self.save()
                    saved = now
        if state.step > first:
            self.save()

    def save(self) -> None:
        if self.checkpoint is not None:
            described = {"config": self.config.to_yaml(), "data": self.experiment.data_digest, "seconds": self.seconds}
            save_checkpoint(self.checkpoint, self.state.state_dict() | described)

    def judged(self) -> dict[str, Any]:
        """What there is to say of it, with its accuracies under every protocol of test.py."""
        experiment, step, begun = self.experiment, self.state.step, time.monotonic()
        encoders = {"trained": encode_with(experiment, self.state.ema.module)}
        table = judge(experiment, encoders, all_protocols(experiment))
        return {
            "data_digest": experiment.data_digest,
            "complete": self.complete,
            "images": step * self.config.training.batch_size,
            "epochs": step / experiment.loader.steps_per_epoch,
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
            "loss": torch.stack(list(self._recent)).mean().item() if self._recent else None,
            "table": table,
            "evaluation_s": time.monotonic() - begun,
            "peak_memory_mb": peak_memory_mb(experiment.device) if experiment.device.type == "cuda" else None,
            "machine": machine(experiment.device),
            "versions": {"python": platform.python_version(), "torchvision": torchvision.__version__},
            "amp": str(experiment.amp_dtype),
            "config": self.config.to_yaml(),
        }


def write_parts(module: nn.Module, path: Path, config_yaml: str) -> None:
    """The module's weights in bf16, `path`.pt, in parts of less than 16 MB; `path`.yaml says how to join them."""
    whole = io.BytesIO()
    halved = {name: t.bfloat16() if t.is_floating_point() else t for name, t in module.state_dict().items()}
    torch.save({name: t.cpu().contiguous() for name, t in halved.items()}, whole)
    content = whole.getvalue()
    for part, start in enumerate(range(0, len(content), PART_BYTES)):
        path.with_name(f"{path.name}.pt.part{part}").write_bytes(content[start : start + PART_BYTES])
    join = f"cat {path.name}.pt.part* > {path.name}.pt; sha256sum {path.name}.pt"
    head = f"# {join}\n# {hashlib.sha256(content).hexdigest()}\n"
    path.with_name(f"{path.name}.yaml").write_text(head + config_yaml)
