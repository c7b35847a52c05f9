"""Draws the noise schedules as docs/schedules.svg, and prints the numbers of docs/schedules.md.

python -m docs.draw_schedules
"""

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from config.schema import Diffusion
from model.diffusion import SCHEDULES
from model.names import Schedule

SHARES = [0.05, 0.1, 0.25, 0.5, 0.75, 0.9]
LABELS: dict[Schedule, str] = {
    "linear": "linear (DDPM)",
    "cosine": "cosine (Nichol & Dhariwal)",
    "inverted_cosine": "inverted cosine (SODA)",
    "linear_alphas_cumprod": "linear in alphas_cumprod (l-DAE)",
    "geometric": "geometric in sigma (NCSN)",
}


def draw(curves: dict[Schedule, torch.Tensor]) -> Figure:
    """Returns a figure of `curves`, alphas_cumprod (T,) float64 per schedule, and of their log-SNR."""
    steps = len(curves["linear"])
    time = (torch.arange(steps) + 0.5) / steps
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        left.plot(time, curve, label=LABELS.get(name, name))
        right.plot(time, (curve / (1 - curve)).log())
    left.set(title="alphas_cumprod: remaining fraction of the image's variance")
    right.set(title="log-SNR = log(alphas_cumprod / (1 - alphas_cumprod))", ylim=(-15, 12))
    for axes in (left, right):
        axes.set(xlabel="(t + 1/2) / T", xlim=(0, 1))
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    last = curves["inverted_cosine"][-1].item()
    right.annotate(
        f"inverted cosine at T-1:\namplitude {math.sqrt(last):.3f}, log-SNR {math.log(last / (1 - last)):.1f}",
        xy=(1, math.log(last / (1 - last))),
        xytext=(0.33, -12),
        arrowprops={"arrowstyle": "->"},
    )
    return figure


def main(argv: list[str] | None = None) -> None:
    """Draws the figure with the arguments `argv` (None: those of the command line), and prints the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_name("schedules.svg"),
        help="SVG file for the figure; default: %(default)s",
    )
    args = parser.parse_args(argv)
    settings = Diffusion().model_dump(exclude={"schedule", "prediction"})
    curves: dict[Schedule, torch.Tensor] = {name: make(**settings) for name, make in SCHEDULES.items()}
    matplotlib.rcParams["svg.hashsalt"] = "SODA"  # makes the file reproducible
    draw(curves).savefig(args.out, dpi=100, metadata={"Date": None} if args.out.suffix == ".svg" else None)

    print(f"| (t + 1/2) / T | {' | '.join(f'{u:g}' for u in SHARES)} | amplitude at T-1 | log-SNR at T-1 |")
    print(f"| {' | '.join(['---'] * (len(SHARES) + 3))} |")
    for name, curve in curves.items():
        # No timestep has (t + 1/2) / T = u: the cell is the mean of the two nearest timesteps.
        cells = [f"{curve[round(u * len(curve)) - 1 :][:2].mean().item():.3g}" for u in SHARES]
        last = curve[-1].item()
        print(f"| `{name}` | {' | '.join(cells)} | {math.sqrt(last):.4f} | {math.log(last / (1 - last)):.1f} |")
    # An image with all values equal to b is b sqrt(3 size^2) times a vector of length 1. Projected on this vector,
    # standard normal noise has standard deviation 1.
    last = curves["inverted_cosine"][-1].item()
    for size in (8, 32, 64):
        shift = 0.5 * math.sqrt(3 * size**2) * math.sqrt(last / (1 - last))
        print(
            f"inverted cosine, {size} px: at T-1, an image with all values 0.5 shifts the mean "
            f"by {shift:.1f} standard deviations"
        )


if __name__ == "__main__":
    main()
