"""One run of an ablation: trained until it is done or told to stop, resumed where it stopped, judged as by test.py."""

import hashlib
import io
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
from training.experiment import Experiment, initial_state, open_experiment
from training.judge import all_protocols, encode_with, judge
from training.step import train_step, training_pixels
from utils.checkpoint import TrainState, load_checkpoint, save_checkpoint
from utils.config import Config
from utils.config_file import parse_config, result_digest
from utils.device import choose_compile, peak_memory_mb
from utils.logging import PhaseTimer

SAVE_EVERY_S = 300
WARMUP_STEPS = 30  # not in the images per second: kernels are chosen and compiled in them
LOOK_EVERY = 10  # steps between looks at the clock, for which the host waits for the device
PART_BYTES = 12 * 2**20


class Trial:
    """A config put to work, from its checkpoint if there is one that fits.

    Attributes:
        seconds: that training has taken, over all starts.
        images_per_s: of this start, without its first steps; None if there were no others.
    """

    def __init__(self, config: Config, checkpoint: Path | None) -> None:
        torch.compiler.reset()  # else variants count as recompilations of the first, and the ninth runs eagerly
        self.config, self.checkpoint = config, checkpoint
        self.experiment: Experiment = open_experiment(config)
        self.state: TrainState = initial_state(self.experiment)
        self.seconds = 0.0
        self.images_per_s: float | None = None
        self._recent: deque[torch.Tensor] = deque(maxlen=100)
        if checkpoint and checkpoint.exists():
            saved = load_checkpoint(checkpoint)
            if parse_config(saved["config"], str(checkpoint)) == config:
                self.state.load_state_dict(saved)
                self.seconds = float(checkpoint.with_suffix(".seconds").read_text())
        if choose_compile(config.training.compile, self.experiment.device):
            self.state.soda.compile()

    @property
    def complete(self) -> bool:
        return self.state.step == self.experiment.total_steps

    def train(self, stop: Callable[[], bool]) -> None:
        """To the last step, or until `stop` says so; what is not done is saved, if there is a checkpoint to write."""
        state, batch_size = self.state, self.config.training.batch_size
        first, begun, before = state.step, time.monotonic(), self.seconds
        warm, saved = begun, begun
        with closing(training_pixels(self.experiment, first)) as pixels:
            while not self.complete:
                loss, _ = train_step(self.experiment, state, pixels, PhaseTimer())
                self._recent.append(loss)
                done = state.step - first
                if done % LOOK_EVERY and not self.complete:
                    continue
                loss.item()  # the clock then tells of steps that are done
                now = time.monotonic()
                self.seconds = before + now - begun
                if done <= WARMUP_STEPS:
                    warm = now
                else:
                    self.images_per_s = (done - WARMUP_STEPS) * batch_size / (now - warm)
                if stop():
                    break
                if now - saved > SAVE_EVERY_S:
                    self.save()
                    saved = now
        if not self.complete:
            self.save()

    def save(self) -> None:
        if self.checkpoint is None:
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.checkpoint.with_suffix(".seconds").write_text(str(self.seconds))
        text, digest = self.config.to_yaml(), self.experiment.data_digest
        save_checkpoint(self.checkpoint, self.state.state_dict(), text, digest)

    def judged(self) -> dict[str, Any]:
        """What there is to say of it, with its accuracies under every protocol of test.py."""
        experiment, step, begun = self.experiment, self.state.step, time.monotonic()
        encoders = {"trained": encode_with(experiment, self.state.ema.ema_model)}
        table = judge(experiment, encoders, all_protocols(experiment))
        return {
            "config_digest": result_digest(self.config),
            "data_digest": experiment.data_digest,
            "data": self.config.data.name,
            "complete": self.complete,
            "images": step * self.config.training.batch_size,
            "epochs": step / experiment.loader.steps_per_epoch,
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
            "loss": torch.stack(list(self._recent)).mean().item() if self._recent else None,
            "table": table,
            "evaluation_s": time.monotonic() - begun,
            "peak_memory_mb": peak_memory_mb(experiment.device),
            "machine": machine(experiment.device),
            "versions": {"python": platform.python_version(), "torchvision": torchvision.__version__},
            "amp": str(experiment.amp_dtype),
        }


def write_parts(module: nn.Module, path: Path) -> None:
    """The module's weights in bf16, in files of less than 16 MB, and their checksum.

    `cat encoder.pt.part* > encoder.pt; sha256sum -c encoder.pt.sha256` puts them together again.
    """
    whole = io.BytesIO()
    halved = {name: t.bfloat16() if t.is_floating_point() else t for name, t in module.state_dict().items()}
    torch.save({name: t.cpu().contiguous() for name, t in halved.items()}, whole)
    content = whole.getvalue()
    for part, start in enumerate(range(0, len(content), PART_BYTES)):
        path.with_name(f"{path.name}.part{part}").write_bytes(content[start : start + PART_BYTES])
    path.with_name(f"{path.name}.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
