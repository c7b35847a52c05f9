"""Cost of config keys in a training step: variants of our step take turns in one run.

Each argument is one variant: an override, or several with blanks between them. The table gives the time of a step and
the FLOPs of the model, both relative to the step without the override. The two ratios are equal if the time grows in
proportion to the FLOPs.

  python -m benchmarks.variants --batch_size 32                             # the overrides in LEVERS
  python -m benchmarks.variants --config config/digits.yaml "encoder.width=32 encoder.latent_dim=8" decoder.dropout=0.5
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.measure import machine, spread, take_turns
from benchmarks.step import our_step, synthetic
from experiment.models import build_on_meta, pass_flops
from utils.cli import run
from utils.logging import PhaseTimer

LEVERS = [
    "diffusion.prediction=v",
    "training.min_snr_gamma=5",
    "training.timesteps.sampling=log_snr",
    "training.timesteps.sampling=adaptive",
    "training.terms.reconstruction=0.1",
    "views.source.blur_probability=0.5",
    "views.num_sources=2",
    "decoder.image_size=16",
]


def main() -> int:
    """Runs the benchmark and prints a table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        default="config/cifar10.yaml",
        help="YAML file of the experiment; its data set is not used; default: %(default)s",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="global batch size; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each variant; default: %(default)s")
    parser.add_argument(
        "--always",
        nargs="+",
        default=[],
        metavar="key=value",
        help="overrides of all variants; put the variants before this option",
    )
    parser.add_argument(
        "variants",
        nargs="*",
        metavar="key=value",
        help="variants to measure, each with one or several overrides in quotes; default: the list LEVERS in this "
        "file, for images of 32 px",
    )
    args = parser.parse_intermixed_args()

    calls: dict[str, Callable[[], object]] = {}
    flops: dict[str, float] = {}
    for name in ["none", *(args.variants or LEVERS)]:
        experiment = synthetic(args.config, args.batch_size, [*args.always, *([] if name == "none" else name.split())])
        if name == "none":
            threads = torch.get_num_threads()
        flops[name] = pass_flops(experiment.config, build_on_meta(experiment.config))[-1]
        step, _ = our_step(experiment, compiled=False)
        calls[name] = partial(step, PhaseTimer())
    torch.set_num_threads(threads)  # a variant may have chosen another number
    seconds = take_turns(calls, args.rounds, experiment.device)

    print(f"{args.config}, batches of {args.batch_size}; {machine(experiment.device)}")
    print("| variant | time of a step | time relative to none (range over rounds) | FLOPs relative to none |")
    print("|---|---|---|---|")
    for name, each in seconds.items():
        ratios = [mine / plain for mine, plain in zip(each, seconds["none"], strict=True)]
        middle = f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| `{name}` | {spread(each).strip()} | {middle} | {flops[name] / flops['none']:.3f} |")
    return 0


if __name__ == "__main__":
    run(main)
