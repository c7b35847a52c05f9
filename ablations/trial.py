"""One run of an ablation. It can be stopped and resumed at any step, and is judged under the protocols of test.py."""

import hashlib
import io
import logging
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from ablations.controls import attach_control, control_step
from ablations.plan import Judging
from benchmarks.measure import machine
from config.errors import ConfigError
from config.keys import differences
from config.reading import parse_config
from config.schema import Config
from datasets.images import Statistics
from evaluation.encoders import encode_with
from evaluation.judge import check_can_judge, judge
from evaluation.protocols import all_protocols, config_protocols
from experiment.batch import Pixels
from experiment.models import build_on_meta, pass_flops, step_flops
from experiment.opening import Experiment, check_can_train, open_experiment
from experiment.starting import StartingWeights, check_origin, read_starting_weights, weight_paths
from experiment.trained import halved_weights
from training.saving import checkpoint_contents
from training.state import TrainState, initial_state
from training.step import train_step, training_pixels
from utils.device import choose_compile, peak_memory_mb
from utils.logging import PhaseTimer
from utils.run_folder.checkpoint import CheckpointError, image_statistics, load_checkpoint
from utils.run_folder.checkpoint_writer import save_checkpoint

SAVE_EVERY_S = 120
WARMUP_STEPS = 30  # not part of images per second, because kernels are chosen and compiled in these steps
LOOK_EVERY = 10  # steps between checks of the clock; each check synchronises with the device
LOSSES = 100  # the reported loss is the mean over at most this number of last steps
PART_BYTES = 12 * 2**20

logger = logging.getLogger(__name__)


class Trial:
    """An experiment and its training state, resumed from the checkpoint if there is one of the same experiment.

    Args:
        config: config of the run.
        checkpoint: file to resume from and to save to; None: nothing is loaded or saved.
        judging: protocols of `judged` (see `Plan.judging`).
        control: name of the objective that replaces SODA's (ablations/controls.py); None: SODA.

    Attributes:
        seconds: training time, summed over all starts of the run.
        seconds_after_first_step: training time of this start, without its first step. The first step also loads the
            images, chooses kernels and compiles.
        images_per_s: training speed of this start, without its first WARMUP_STEPS, without judging and without saving;
            None if there were no more steps.

    Raises:
        ConfigError, CheckpointError, DatasetError, OutOfMemoryError
    """

    def __init__(
        self,
        config: Config,
        checkpoint: Path | None,
        judging: Judging = "all",
        control: str | None = None,
    ) -> None:
        torch.compiler.reset()  # otherwise each variant counts as a recompilation, and the ninth runs eagerly
        self.config, self.checkpoint, self.judging = config, checkpoint, judging
        saved = self._load(checkpoint) if checkpoint and checkpoint.exists() else None
        starting = {} if saved else read_starting_weights(config)
        self.experiment: Experiment = open_experiment(config, *_as_trained(config, saved, starting.get("encoder")))
        check_can_train(self.experiment)
        check_can_judge(self.experiment)
        if self.experiment.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.experiment.device)
        self.state: TrainState = initial_state(self.experiment, starting)
        self._control_name = control
        self.control = attach_control(self.experiment, self.state, control) if control else None
        self.seconds = self.seconds_after_first_step = 0.0
        self._num_steps = self._timed_steps = 0  # steps of this start, and those of them after the first WARMUP_STEPS
        self._timed_s = 0.0
        self._losses: deque[torch.Tensor] = deque(maxlen=LOSSES)
        if saved is not None and checkpoint is not None:
            self._resume(saved, checkpoint)
        if not control and choose_compile(config.training.compile, self.experiment.device):
            self.state.soda.compile()

    def _load(self, checkpoint: Path) -> dict[str, Any] | None:
        """Returns the contents of the checkpoint. If it is damaged, renames it, logs this, and returns None.

        Raises CheckpointError if the file could not be read now, because it may be intact.
        """
        try:
            return load_checkpoint(checkpoint)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):
                raise
            damaged = checkpoint.replace(checkpoint.with_name(f"{checkpoint.name}.damaged"))
            logger.info("cannot resume (%s; it is now %s): starting from scratch", error, damaged.name)
            return None

    def _resume(self, saved: dict[str, Any], checkpoint: Path) -> None:
        """Continues from the contents of a checkpoint. Raises ConfigError if it is that of another experiment."""
        others = []
        if saved["data"] != self.experiment.data_digest:
            others.append("data set")
        if saved.get("control") != self._control_name:
            others.append("control")
        check_same_experiment(checkpoint, saved["config"], self.config, others)
        self.state.load_state_dict(saved)
        check_origin(weight_paths(self.config), self.state.started_from)
        self.seconds = float(saved.get("seconds", 0))
        self._losses.extend(saved.get("losses", torch.empty(0)).to(self.experiment.device))
        logger.info("%s: resuming at step %d of %d", checkpoint, self.state.step, self.experiment.total_steps)

    @property
    def complete(self) -> bool:
        """True after the last step."""
        return self.state.step == self.experiment.total_steps

    @property
    def images_per_s(self) -> float | None:
        """See the class."""
        return self._timed_steps * self.config.training.batch_size / self._timed_s if self._timed_steps else None

    def train(self, must_stop: Callable[[], bool], end: int | None = None) -> None:
        """Trains until `must_stop` returns True, or to the step `end` (None: the last step). Then saves the state.

        `must_stop` is called after the first step and then every LOOK_EVERY steps.
        """
        state = self.state
        end = self.experiment.total_steps if end is None else end
        first_step, began, seconds_before = state.step, time.monotonic(), self.seconds
        after_first_step = saved = last_look = began
        last_step = first_step
        with closing(training_pixels(self.experiment, first_step)) as pixels:
            while state.step < end:
                loss = self._step(pixels)
                self._losses.append(loss)
                done = state.step - first_step
                if done > 1 and done % LOOK_EVERY and state.step < end:
                    continue
                loss.item()  # synchronises with the device, so that the clock measures finished steps
                now = time.monotonic()
                self.seconds = seconds_before + now - began
                if done == 1:
                    after_first_step = now
                self.seconds_after_first_step = now - after_first_step
                self._add_speed(state.step - last_step, now - last_look)
                last_step, last_look = state.step, now
                if must_stop():
                    break
                if now - saved > SAVE_EVERY_S:
                    self._save()
                    saved = now
                    last_look = time.monotonic()
        if state.step > first_step:
            self._save()

    def _add_speed(self, num_steps: int, seconds: float) -> None:
        """Adds the time of a number of steps to the speed, unless they begin within the first WARMUP_STEPS."""
        if self._num_steps >= WARMUP_STEPS:
            self._timed_steps += num_steps
            self._timed_s += seconds
        self._num_steps += num_steps

    def _step(self, pixels: Iterator[Pixels]) -> torch.Tensor:
        if self.control:
            return control_step(self.experiment, self.state, self.control, pixels)
        loss, _ = train_step(self.experiment, self.state, pixels, PhaseTimer())
        return loss

    def _step_flops(self) -> int:
        """Returns the FLOPs of a training step per image, forward and backward."""
        soda = build_on_meta(self.config)
        if self.control:
            return 3 * self.control.num_views * pass_flops(self.config, soda)[0]
        return step_flops(self.config, soda)

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        more = {"seconds": self.seconds, "control": self._control_name, "losses": torch.stack(list(self._losses))}
        save_checkpoint(self.checkpoint, checkpoint_contents(self.experiment, self.state) | more)

    def judged(self) -> dict[str, Any]:
        """Returns the result: accuracies of the EMA encoder, speed, work and settings."""
        experiment, step, began = self.experiment, self.state.step, time.monotonic()
        encoders = {"trained": encode_with(experiment, self.state.ema.ema_model)}
        protocols = config_protocols(self.config)
        if self.judging == "all":
            protocols = all_protocols(self.config, len(experiment.train))
        table = judge(experiment, encoders, protocols)
        return {
            "data_digest": experiment.data_digest,
            "complete": self.complete,
            "images": step * self.config.training.batch_size,
            "epochs": step / experiment.steps_per_epoch,
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
            "step_gflop": self._step_flops() / 1e9,
            "loss": torch.stack(list(self._losses)).mean().item() if self._losses else None,
            "table": table,
            "evaluation_s": time.monotonic() - began,
            "peak_memory_mb": peak_memory_mb(experiment.device) if experiment.device.type == "cuda" else None,
            "machine": machine(experiment.device),
            "versions": {"python": platform.python_version(), "torchvision": torchvision.__version__},
            "amp": str(experiment.amp_dtype or torch.float32),
            "config": self.config.to_yaml(),
        }


def _as_trained(
    config: Config, saved: Mapping[str, Any] | None, starting: StartingWeights | None
) -> tuple[Statistics | None, int | None]:
    """Returns the statistics and the range of greys of a frozen encoder's training images; (None, None): not known."""
    if not config.encoder.frozen:
        return None, None
    if saved is not None:
        return image_statistics(saved), saved.get("grey_bits")
    return (starting.statistics, starting.grey_bits) if starting else (None, None)


def check_same_experiment(path: Path, saved: str, config: Config, others: Iterable[str] = ()) -> None:
    """Raises ConfigError if a file belongs to another experiment, so that it is not overwritten.

    Args:
        saved: config in YAML that the file was made with.
        others: further things in which the two experiments differ.
    """
    changed = [*differences(parse_config(saved, str(path)), config, run=False), *others]
    if changed:
        raise ConfigError(
            f"{path} is of another run, with another {', '.join(changed)}: move or delete it, or choose another --out"
        )


def check_encoder_parts(path: Path, config: Config) -> None:
    """Raises ConfigError if `write_encoder_parts` has written the encoder of another experiment to `path`."""
    described = path.with_name(f"{path.name}.yaml")
    if described.exists():
        check_same_experiment(described, described.read_text(encoding="utf-8"), config)


def write_encoder_parts(encoder: nn.Module, path: Path, config_yaml: str) -> None:
    """Writes the encoder's weights in bf16 to `path`.pt.part0, `path`.pt.part1, ..., each smaller than 16 MB.

    Also writes `path`.yaml: the command that joins the parts to `path`.pt, the SHA-256 of `path`.pt, and the config.
    """
    file = io.BytesIO()
    torch.save({name: t.cpu().contiguous() for name, t in halved_weights(encoder).items()}, file)
    content = file.getvalue()
    for part, start in enumerate(range(0, len(content), PART_BYTES)):
        path.with_name(f"{path.name}.pt.part{part}").write_bytes(content[start : start + PART_BYTES])
    join = f"cat {path.name}.pt.part* > {path.name}.pt; sha256sum {path.name}.pt"
    head = f"# {join}\n# {hashlib.sha256(content).hexdigest()}\n"
    path.with_name(f"{path.name}.yaml").write_text(head + config_yaml, encoding="utf-8")
