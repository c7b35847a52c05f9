"""Draws accuracy against the number of images seen, from the results of ablations, and prints the slopes.

The results are those of stages with `judge_every`. Curves with several seeds are means over the seeds.

  python -m ablations.curves runs/cifar10_cpu/results.jsonl --out docs/curves.svg
"""

import argparse
import itertools
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablations.result_rows import RESULTS, read_rows
from ablations.runs import accuracies
from config.errors import ConfigError
from utils import cli

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = dict[int, tuple[float, float]]
"""{images seen: (k-NN, linear), top-1 in per cent}."""


def read_curves(paths: list[Path]) -> dict[str, Curve]:
    """Returns the curve of each variant, `stage, variant`, in the order of the files. Means are over seeds.

    A point of a variant needs all of its seeds. Variants with fewer than two points are left out. So are points that
    were judged by other protocols than the last point of the run.
    """
    points: dict[str, dict[int, dict[int, tuple[float, float]]]] = {}
    seeds: dict[str, set[int]] = {}
    for path in paths:
        rows = [row for row in read_rows(path) if _is_of_trained_encoder(row.get("table", {}))]
        newest = {row["run"]: row for row in rows}  # a run may have rows of an earlier config
        for row in rows:
            last = newest[row["run"]]
            if row["digest"] == last["digest"] and row["table"].keys() <= last["table"].keys():
                name = f"{row['stage']}, {row['variant']}"
                folder = path.parent.name if path.name == RESULTS else path.stem
                name = f"{folder}: {name}" if len(paths) > 1 else name
                points.setdefault(name, {}).setdefault(row["images"], {})[row["seed"]] = accuracies(row)
                seeds.setdefault(name, set()).add(row["seed"])
    curves = {}
    for name, at in points.items():
        complete = {images: found.values() for images, found in sorted(at.items()) if set(found) == seeds[name]}
        if len(complete) > 1:
            curves[name] = {
                images: (statistics.mean(knn for knn, _ in found), statistics.mean(linear for _, linear in found))
                for images, found in complete.items()
            }
    return curves


def _is_of_trained_encoder(table: dict[str, Any]) -> bool:
    kinds = {name.split()[0] for name, cells in table.items() if "trained" in cells}  # not those of ablations.floors
    return {"k-NN", "linear"} <= kinds


def gain_of_last_doubling(curve: Curve) -> tuple[float, float] | None:
    """Returns the rise of k-NN and linear, in points, from half of the last number of images to the last.

    Between two points, the accuracy is interpolated linearly in the logarithm of the number of images. Returns None if
    the curve does not reach back to half of its last number.
    """
    counts = sorted(curve)
    half = counts[-1] / 2
    before = max((count for count in counts if count <= half), default=None)
    if before is None:
        return None
    after = min(count for count in counts if count >= half)
    share = 0.0 if before == after else math.log(half / before) / math.log(after / before)
    knn, linear = (
        end - (1 - share) * low - share * high
        for low, high, end in zip(curve[before], curve[after], curve[counts[-1]], strict=True)
    )
    return knn, linear


def draw(curves: dict[str, Curve], floors: dict[str, tuple[float, float]]) -> "Figure":
    """Returns a figure with one panel for k-NN and one for the linear probe. Floors are horizontal lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for index, (axes, title) in enumerate(zip(figure.subplots(1, 2), ("k-NN", "linear probe"), strict=True)):
        for name, curve in curves.items():
            axes.plot(list(curve), [both[index] for both in curve.values()], marker="o", markersize=3, label=name)
        for (name, both), style in zip(floors.items(), itertools.cycle(("--", ":", "-."))):
            axes.axhline(both[index], color="grey", linestyle=style, label=name)
        axes.set(title=f"{title}, top-1 (%)", xlabel="images seen", xscale="log")
        first, last = min(map(min, curves.values())), max(map(max, curves.values()))
        axes.set_xticks([first * 2**i for i in range(int(math.log2(last / first)) + 1)], minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def save(curves: dict[str, Curve], path: Path, floors: dict[str, tuple[float, float]] | None = None) -> None:
    """Draws the curves into an SVG or PNG file. Equal curves give equal files.

    Args:
        floors: (k-NN, linear) of baselines, by name.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "SODA"}):
        draw(curves, floors or {}).savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


def markdown_table(curves: dict[str, Curve]) -> str:
    """Returns a table of the curves' last points and of the gain of the last doubling of the number of images."""
    lines = ["| run | images | k-NN | linear | gain of the last doubling |", "|---|---|---|---|---|"]
    for name, curve in curves.items():
        last = max(curve)
        knn, linear = curve[last]
        gain = gain_of_last_doubling(curve)
        rise = "" if gain is None else f"{gain[0]:+.1f} / {gain[1]:+.1f}"
        lines.append(f"| {name} | {last:,} | {knn:.1f} | {linear:.1f} | {rise} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.jsonl of ablations")
    parser.add_argument("--out", type=cli.path_option, required=True, help="SVG or PNG file for the figure")
    args = parser.parse_args(argv)
    with cli.gather_user_errors():
        cli.require("matplotlib")
        if args.out.suffix not in (".svg", ".png"):
            raise ConfigError(f"--out {args.out} ends in neither .svg nor .png: choose one of these endings")
        for path in args.results:
            if not path.is_file():
                raise ConfigError(f"there is no file {path}: name a results.jsonl that ablations.ablate wrote")
        curves = read_curves(args.results)
        if not curves:
            raise ConfigError(
                "no run was judged twice: name results.jsonl of an ablation whose plan has judge_every, or a file that "
                "docs.record wrote"
            )

        save(curves, args.out)
    print(markdown_table(curves))
    return 0


if __name__ == "__main__":
    cli.run(main)
