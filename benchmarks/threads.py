"""Speed of training on a CPU by number of threads and OpenMP wait policy, on an idle machine and beside a busy process.

Each setting trains in a process of its own, because OpenMP reads its policy when torch is imported. In each round, all
settings are measured in a random order. The busy process multiplies matrices with one thread. In the first setting,
OMP_WAIT_POLICY is not set. "as train.py" is the setting that train.py chooses by itself.

  python -m benchmarks.threads --rounds 2          # twelve minutes on two CPU cores
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product

from config.reading import load_config
from utils.cli import run

NARROW = [
    *("data.name=digits", "data.image_size=32", "encoder.width=32", "decoder.model_channels=32"),
    *("decoder.channel_mult=[1,2,2]", "decoder.num_res_blocks=1", "decoder.attn_resolutions=[]", "decoder.dropout=0"),
    *("diffusion.schedule=inverted_cosine", "training.batch_size=128"),
]
MODELS = {"digits": ("config/digits.yaml", []), "narrow CIFAR-10": ("config/cifar10.yaml", NARROW)}
ALL_THREADS = {"OMP_NUM_THREADS": str(os.cpu_count())}
NO_POLICY = "all threads, no policy"
SETTINGS: dict[str, dict[str, str]] = {
    NO_POLICY: ALL_THREADS,
    "all threads, passive": ALL_THREADS,
    "one thread, passive": {"OMP_NUM_THREADS": "1"},
    "as train.py": {},
}
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
BUSY = "import torch; torch.set_num_threads(1); a = torch.randn(1000, 1000)\nwhile True: a @ a"


def images_per_s(model: str, seconds: float) -> float:
    """Trains a model in this process for some seconds and returns its speed. Two warm-up steps are not counted."""
    from experiment.opening import open_experiment
    from training.state import initial_state
    from training.step import train_step, training_pixels
    from utils.logging import PhaseTimer

    path, overrides = MODELS[model]
    experiment = open_experiment(load_config(path, [*overrides, "device=cpu", "training.epochs=100000"]))
    state, timer = initial_state(experiment), PhaseTimer()
    pixels = training_pixels(experiment, 0)
    for _ in range(2):
        train_step(experiment, state, pixels, timer)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        train_step(experiment, state, pixels, timer)
    return (state.step - 2) * experiment.config.training.batch_size / (time.perf_counter() - start)


@contextmanager
def busy_process() -> Iterator[None]:
    """Runs a process that keeps one core busy inside the context."""
    other = subprocess.Popen([sys.executable, "-c", BUSY], env=PLAIN)
    try:
        yield
    finally:
        other.kill()
        other.wait()


def measure(model: str, setting: str, seconds: float) -> float:
    """Returns `images_per_s` of a new process with this setting."""
    # The package sets the passive policy when it is imported. A torch that was imported before has no policy.
    first = "import torch; " if setting == NO_POLICY else ""
    program = f"{first}from benchmarks.threads import images_per_s; print(images_per_s({model!r}, {seconds}))"
    environment = PLAIN | SETTINGS[setting]
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main() -> int:
    """Runs the benchmark and prints a table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=8, help="seconds of training per measurement; default: %(default)s"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models; default: all")
    args = parser.parse_args()

    found: dict[tuple[str, str, bool], list[float]] = {}
    order = random.Random(0)
    for _, model, busy in product(range(args.rounds), args.models, (False, True)):
        for setting in order.sample(list(SETTINGS), len(SETTINGS)):
            with busy_process() if busy else nullcontext():
                speed = measure(model, setting, args.seconds)
            found.setdefault((model, setting, busy), []).append(speed)

    from benchmarks.measure import machine
    from utils.device import choose_device

    print(f"images/s, median of {args.rounds}; {machine(choose_device('cpu'))}")
    print("In brackets: relative to the model's first setting on the idle machine.")
    print("| model | threads | idle | beside a busy process |")
    print("|---|---|---|---|")
    for model in args.models:
        first = statistics.median(found[model, next(iter(SETTINGS)), False])
        for setting in SETTINGS:
            speeds = [statistics.median(found[model, setting, busy]) for busy in (False, True)]
            cells = (f"{speed:.0f} ({speed / first:.0%})" for speed in speeds)
            print(f"| {model} | {setting} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    run(main)
