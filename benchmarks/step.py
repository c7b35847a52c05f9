"""Speed of our training step and of a plain loop, measured in one run, and the time of each phase of our step.

The plain loop is similar to the reference implementation: eager, float32, contiguous memory layout, an optimiser and an
EMA that are not fused, timesteps drawn on the host, and a synchronisation with the device at each step. All its steps
use the same batch, so it draws no views. On CUDA, it runs with the same settings as our step: TensorFloat-32 and
cuDNN's autotuning. Our step is the step of train.py, including the views.

For each variant, the benchmark also prints TFLOP/s, and the ratio of this speed to the machine's matrix rate. The
matrix rate is the speed of large matrix products or convolutions in the same number format. It is measured in the same
run. The FLOPs of a step are counted as three forward passes.

  python -m benchmarks.step --batch_sizes 8 32                              # ten minutes on two CPU cores
  python -m benchmarks.step --batch_sizes 128 512 1024 --rounds 20          # a data-centre GPU
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import machine, ratio, spread, synchronize, take_turns
from config.reading import load_config
from datasets.images import StoredImages
from datasets.loader import Loader
from experiment.batch import draw_batch, read_pixels
from experiment.models import build_on_meta, initial_soda, step_flops
from experiment.opening import Experiment, open_experiment
from experiment.timesteps import make_sampler
from training.state import TrainState, initial_state
from training.step import train_step, training_pixels
from utils.cli import run
from utils.device import choose_compile
from utils.logging import PhaseTimer
from utils.randomness import generator
from utils.run_folder.checkpoint_writer import CheckpointWriter


class SynchronizedTimer(PhaseTimer):
    """Timer that synchronises with the device around each phase, so that the seconds include its work on the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context whose wall time is added to the phase `name`."""
        synchronize(self._device)
        with super().phase(name):
            yield
            synchronize(self._device)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Returns the FLOP/s of large matrix products, or of large convolutions if they are faster, as on some CPUs."""
    size, images = (8192, 512) if device.type == "cuda" else (2048, 32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    x, w = (
        torch.randn(images, 256, 32, 32, device=device).to(dtype),
        torch.randn(256, 256, 3, 3, device=device).to(dtype),
    )
    if device.type == "cuda":
        x, w = (values.contiguous(memory_format=torch.channels_last) for values in (x, w))
    with torch.no_grad():
        seconds = take_turns({"a": lambda: a @ b, "w": lambda: torch.conv2d(x, w, padding=1)}, 10, device)
    work = {"a": 2 * size**3, "w": 2 * x.numel() * w[0].numel()}
    return max(work[name] / statistics.median(each) for name, each in seconds.items())


def synthetic(config_path: str, batch_size: int, overrides: list[str]) -> Experiment:
    """Returns the experiment of a config, but with random images, so that no data set is needed."""
    config = load_config(config_path, overrides)
    size, stored = config.encoder_size, config.data.kept_size
    digits = ["data.name=digits", f"data.image_size={size}", f"training.batch_size={min(batch_size, 1024)}"]
    experiment = open_experiment(load_config(config_path, [*overrides, *digits]))
    training = experiment.config.training.model_copy(update={"batch_size": batch_size})
    # On the device, because real runs also keep a small data set there.
    pixels = torch.randint(0, 256, (4 * batch_size, 3, stored, stored), dtype=torch.uint8, device=experiment.device)
    return replace(
        experiment,
        config=experiment.config.model_copy(update={"training": training}),
        train=StoredImages(pixels, None, []),
        loader=Loader(len(pixels), batch_size, lambda epoch: generator(0, "order", epoch)),
    )


def plain_step(experiment: Experiment) -> Callable[[], object]:
    """Returns a function that runs one step of the plain loop. All steps use the same batch."""
    device, config = experiment.device, experiment.config
    soda = initial_soda(config, device).to(memory_format=torch.contiguous_format)
    groups = [{"params": list(part.parameters())} for part in (soda.encoder, soda.decoder)]
    optimizer = torch.optim.AdamW(groups, lr=4e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=False, foreach=False)
    averages = copy.deepcopy(soda).requires_grad_(False)
    positions = range(config.training.batch_size)
    (pixels,) = read_pixels(experiment, [(0, positions)])
    sampler = make_sampler(config.training.timesteps, experiment.diffusion, device)
    batch = draw_batch(experiment, pixels, 0, positions, sampler)

    def step() -> float:
        soda.train()
        timesteps = torch.randint(0, config.diffusion.num_timesteps, (len(batch.x_start),)).to(device)
        noise = torch.randn_like(batch.x_start)
        x_t = experiment.diffusion.q_sample(batch.x_start, timesteps, noise)
        loss = (soda(batch.x_source, x_t, timesteps, batch.drop_mask).prediction - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(soda.parameters(), 1.0)
        optimizer.step()
        for average, parameter in zip(averages.parameters(), soda.parameters(), strict=True):
            average.lerp_(parameter.detach(), 1 - 0.9999)
        return loss.item()

    return step


def our_step(experiment: Experiment, compiled: bool) -> tuple[Callable[[PhaseTimer], object], TrainState]:
    """Returns (function that runs one training step of ours, state that this function changes)."""
    state = initial_state(experiment)
    if compiled:
        state.soda.compile()
    pixels = training_pixels(experiment, 0)
    return lambda timer: train_step(experiment, state, pixels, timer), state


def main() -> int:
    """Runs the benchmark and prints its results. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        default="config/cifar10.yaml",
        help="YAML file of the experiment; its data set is not used; default: %(default)s",
    )
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[32], help="global batch sizes to measure; default: 32"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="number of timed steps of each variant; default: %(default)s"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also measure our step compiled by torch.compile; default: only on CUDA",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replace the value of a config key, e.g. decoder.dropout=0"
    )
    args = parser.parse_intermixed_args()

    for batch_size in args.batch_sizes:
        exact = synthetic(args.config, batch_size, [*args.overrides, "training.use_amp=false"])
        mixed = synthetic(args.config, batch_size, [*args.overrides, "training.use_amp=true"])
        device, sizes = exact.device, (exact.config.encoder_size, exact.config.decoder_size)
        work = step_flops(exact.config, build_on_meta(exact.config)) * batch_size
        rates = {dtype: matrix_rate(dtype, device) for dtype in {torch.float32, mixed.amp_dtype or torch.float32}}
        print(
            f"\nbatches of {batch_size} images of {sizes[0]} px for the encoder and {sizes[1]} px for the decoder, "
            f"{work / 1e12:.2f} TFLOP per step; {machine(device)}"
        )
        print("matrix rate: " + ", ".join(f"{str(d)[6:]} {rate / 1e12:.2f} TFLOP/s" for d, rate in rates.items()))

        named: dict[str, tuple[Callable[[PhaseTimer], object], torch.dtype]] = {}
        variants = [("ours, float32", exact, False)]
        if mixed.amp_dtype:
            variants.append((f"ours, {str(mixed.amp_dtype)[6:]}", mixed, False))
        if choose_compile(args.compile, device):
            variants += [(f"{name}, compiled", experiment, True) for name, experiment, _ in variants]
        for name, experiment, compiled in variants:
            step, state = our_step(experiment, compiled)
            named[name] = step, experiment.amp_dtype or torch.float32
        plain, silent = plain_step(exact), PhaseTimer()
        calls: dict[str, Callable[[], object]] = {"plain, float32": plain}
        calls |= {name: partial(step, silent) for name, (step, _) in named.items()}
        seconds = take_turns(calls, args.rounds, device)

        for name, each in seconds.items():
            median, dtype = statistics.median(each), named.get(name, (None, torch.float32))[1]
            rate = work / median
            print(
                f"{name:24s} {spread(each):>42s} {batch_size / median:9.1f} images/s {rate / 1e12:7.2f} TFLOP/s "
                f"({rate / rates[dtype]:4.0%} of the matrix rate), "
                f"{ratio(seconds['plain, float32'], each)} the speed of the plain loop"
            )
        for name, (step, _) in named.items():
            timer = SynchronizedTimer(device)
            for _ in range(2):
                step(timer)
            total, phases = timer.take()
            shares = ", ".join(f"{phase} {s / 2 * 1000:.1f} ms ({s / total:.0%})" for phase, s in phases.items())
            print(f"{name:24s} time of each phase: {shares}")
        with tempfile.TemporaryDirectory() as name, CheckpointWriter(Path(name), None, Path(name, "none")) as writer:
            stalls = []
            for _ in range(2):  # the first save allocates memory that the second save uses again
                start = time.perf_counter()
                writer.save(state.state_dict())
                stalls.append(time.perf_counter() - start)
                writer.wait()
                written = time.perf_counter() - start
        print(
            f"saving a checkpoint stalls training for {stalls[0]:.2f} s the first time, then for {stalls[1]:.2f} s "
            f"({stalls[1] / 600:.2%} of the time at one checkpoint in ten minutes); the file is on the disk after "
            f"{written:.2f} s"
        )
    return 0


if __name__ == "__main__":
    run(main)
