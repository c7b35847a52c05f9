"""Fills the tables of README.md and docs/ that are made from docs/results, and draws the learning curve.

A table is between the lines `<!--table:NAME-->` and `<!--/table-->`. NAME is a key of TABLES, or FILE/MEASURE: a
measure of the last run in a file of docs/results.

python -m docs.fill_tables
"""

import argparse
import re
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ablations import curves
from ablations.result_rows import read_rows
from ablations.tables import mean_and_deviation
from evaluation.measures.base import Measured
from utils.files import write_text

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
PAGES = (
    DOCS.parent / "README.md",
    *(DOCS / f"{name}.md" for name in ("results", "few_labels", "novel_views", "measures")),
)
CURVE = DOCS / "learning_curve.svg"
CURVES = [RESULTS / f"{name}.jsonl" for name in ("cifar10_cpu_runs", "cifar10_cpu_two_hours")]

NOT_MEASURED = "not measured"

Row = dict[str, Any]

# Variants of the screen whose overrides are long, as they are called in the table.
SCREEN_NAMES = {
    "first": "first",
    "smaller_crops": "crops from 0.08 of the area, both views",
    "plain_target": "target view without crop, flip and RandAugment",
    "decoder_32": "decoder at 32 px with 16 channels",
    "wider_encoder": "encoder of width 36, decoder with 20 channels",
    "twice_the_rate": "learning rates 2e-3",
    "no_zero_starts": "`initialization=torch` (no layers that start at zero)",
    "more_noise": "timesteps by log-SNR: logit-normal, mean -1, standard deviation 1.5",
    "grey": "greyscale with probability 0.1, both views",
    "latent_256_plain_target": "latent of 256 and plain target",
    "latent_256_plain_target_v": "latent of 256, plain target and v",
    "latent_512_plain_target": "latent of 512 and plain target",
}

# Variants of the runs on CPU cores, by stage and variant.
RUN_NAMES = {
    ("train", "run"): "SODA, {of} epochs",
    ("hour", "soda"): "SODA, {of} epochs",
    ("reference", "recipe"): "the reference's recipe at this width",
    ("simclr", "simclr"): "SimCLR",
    ("supervised", "supervised"): "supervised",
}


def recorded(name: str) -> list[Row]:
    """Returns the rows of a file in docs/results: the last one for each run and number of images."""
    return list({(row["run"], row["images"]): row for row in read_rows(RESULTS / f"{name}.jsonl")}.values())


def last_of(rows: Iterable[Row]) -> list[Row]:
    """Returns the last row of each run."""
    return list({row["run"]: row for row in rows}.values())


def accuracy(row: Row, kind: str, which: str = "top1", encoder: str = "trained") -> float:
    """Returns an accuracy of a row under its first protocol of this kind ("k-NN" or "linear")."""
    return next(float(cells[encoder][which]) for name, cells in row["table"].items() if name.split()[0] == kind)


def both(rows: list[Row], which: str = "top1", encoder: str = "trained", middle: Any = None) -> str:
    """Returns k-NN / linear probe of rows, as `mean ± standard deviation`, or as the middle that is given."""
    values = [[accuracy(row, kind, which, encoder) for row in rows] for kind in ("k-NN", "linear")]
    return " / ".join(f"{middle(found):.1f}" if middle else mean_and_deviation(found) for found in values)


def beside_baselines(rows: list[Row], middle: Any = None) -> str:
    """Returns k-NN / linear probe of rows, with those of the baselines that all rows have."""
    cells = set.intersection(*(set(next(iter(row["table"].values()))) for row in rows))
    baselines = [name for name in ("untrained", "raw pixels") if name in cells]
    others = [f"{name} {both(rows, encoder=name, middle=middle)}" for name in baselines]
    found = both(rows, middle=middle)
    return f"{found} ({'; '.join(others)})" if others else found


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    """Returns a table in Markdown."""
    rows = [f"| {' | '.join(line)} |".replace("  ", " ") for line in (head, *lines)]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])


def readme() -> str:
    """Returns the table of results of README.md."""
    digits = [row for row in recorded("digits") if row["complete"]]
    lines = [["digits", NOT_MEASURED, "`make train`", ""]]
    if digits:
        minutes = statistics.median(row["seconds"] for row in digits) / 60
        seeds = f"median of {len(digits)} seeds" if len(digits) > 1 else "one seed"
        how = f"{seeds}, {minutes:.0f} minutes{' each' * (len(digits) > 1)} on a CPU core: `make train`"
        lines = [["digits", beside_baselines(digits, statistics.median), how, ""]]
    runs = [row for row in recorded("cifar10_cpu_runs") if row["variant"] == "soda"] + recorded("cifar10_cpu_two_hours")
    newest = max(runs, key=lambda row: row["images"])
    same = [row for row in runs if (row["images"], row["of_epochs"]) == (newest["images"], newest["of_epochs"])]
    done = "" if newest["complete"] else f"{newest['epochs']:g} of "
    lines.append(
        [
            f"CIFAR-10 (JPEG copy), a narrow model, {done}{newest['of_epochs']} epochs",
            beside_baselines(same),
            f"{'one seed' if len(same) == 1 else f'{len(same)} seeds'}, {newest['seconds'] / 60:.0f} minutes on busy "
            f"CPU cores: `cifar10_cpu.yaml training.epochs={newest['of_epochs']}`, "
            "[results](docs/results.md#cifar-10-on-cpu-cores)",
            "",
        ]
    )
    for data, command, reference in (
        ("CIFAR-10", "cifar10.yaml --use_amp", "80.4 / 80.0"),
        ("CIFAR-10, 50 epochs of batches of 256", "cifar10.yaml training.epochs=50 training.batch_size=256", ""),
        ("CIFAR-100", "cifar100.yaml --use_amp", "51.4 / 54.9"),
        ("Tiny-ImageNet", "tiny.yaml --use_amp data.root=data", "34.8 / 38.2"),
    ):
        lines.append([data, NOT_MEASURED, f"`python train.py --config config/{command}`", reference])
    return markdown(["data", "this repository", "how", "reference, 800 epochs"], lines)


def score(row: Row) -> float:
    """Returns the mean of the accuracies of k-NN and of the linear probe, by which the screen on CIFAR-10 is judged."""
    return statistics.mean(accuracy(row, kind) for kind in ("k-NN", "linear"))


def screened() -> dict[str, list[Row]]:
    """Returns the last rows of the runs of the screen on CIFAR-10, by variant."""
    groups: dict[str, list[Row]] = {}
    for row in last_of(recorded("cifar10_cpu_screen")):
        groups.setdefault(row["variant"], []).append(row)
    return groups


def controls() -> str:
    """Returns the lines of README.md that compare the runs of equal length, and the noise schedules, paired by seed."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in recorded("cifar10_cpu_runs"):
        if row["complete"]:
            runs.setdefault((row["stage"], row["variant"]), []).append(row)
    found = [f"{run_name(kind, rows[0]['of_epochs'])}: {both(rows)}" for kind, rows in runs.items()]
    groups = screened()
    linear = {row["seed"]: score(row) for row in groups["linear"]}
    gains = [score(row) - linear[row["seed"]] for row in groups["first"] if row["seed"] in linear]
    seeds = "1 seed" if len(gains) == 1 else f"{len(gains)} seeds"
    return (
        f"{'; '.join(found)}.\nThe paper's [noise schedule](docs/schedules.md) alone brings "
        f"{mean_and_deviation(gains)} points\n(mean of both) in one epoch ({seeds})."
    )


def screen() -> str:
    """Returns the table of the screen on CIFAR-10. The best variant is bold."""
    groups = screened()
    first = {row["seed"]: score(row) for row in groups["first"]}
    best = max(groups, key=lambda variant: statistics.mean(map(score, groups[variant])))
    lines = []
    for variant, rows in groups.items():
        name = SCREEN_NAMES.get(variant) or f"`{' '.join(rows[0]['overrides'])}`"
        gains = [score(row) - first[row["seed"]] for row in rows if row["seed"] in first]
        lines.append(
            [
                f"**{name}**" if variant == best else name,
                f"{rows[0]['images']:,}",
                f"{rows[0]['step_gflop']:.2f}",
                *(mean_and_deviation([accuracy(row, kind) for row in rows]) for kind in ("k-NN", "linear")),
                mean_and_deviation([score(row) for row in rows]),
                "" if variant == "first" else f"{statistics.mean(gains):+.1f}",
            ]
        )
    head = ["variant", "images", "GFLOP per image", "k-NN", "linear", "mean of k-NN and linear", "against the first"]
    return markdown(head, lines)


def run_name(kind: tuple[str, str], of_epochs: int | None) -> str:
    """Returns the name of a run on CPU cores, by its stage and variant."""
    return RUN_NAMES.get(kind, ", ".join(kind)).format(of=of_epochs)


def runs() -> str:
    """Returns the table of the runs on CPU cores: each evaluation, as the mean over seeds."""
    groups: dict[tuple[str, str], dict[tuple[int, float], list[Row]]] = {kind: {} for kind in RUN_NAMES}
    for row in recorded("cifar10_cpu_two_hours") + recorded("cifar10_cpu_runs"):
        of_kind = groups.setdefault((row["stage"], row["variant"]), {})
        of_kind.setdefault((row["of_epochs"], row["epochs"]), []).append(row)
    lines = []
    for kind, points in groups.items():
        for (of_epochs, epochs), rows in sorted(points.items()):
            name = run_name(kind, of_epochs)
            seeds = f"{len(rows)} seed{'s' if len(rows) > 1 else ''}"
            lines.append([f"{name}, after {epochs:g}", seeds, f"{rows[0]['images']:,}", both(rows), both(rows, "top3")])
        if not points:
            lines.append([run_name(kind, None), "", "", NOT_MEASURED, ""])
    return markdown(["run", "seeds", "images", "top-1", "top-3"], lines)


def few_labels(name: str) -> str:
    """Returns the table of methods with few labels of a file of results. Differences are paired by split."""
    top1: dict[tuple[int, str, str], dict[int, float]] = {}
    for row in last_of(recorded(name)):
        (cells,) = row["table"].values()
        top1.setdefault((row["labels"], row["variant"], row["start"]), {})[row["split"]] = cells["EMA"]["top1"]

    def difference(one: dict[int, float], other: dict[int, float]) -> str:
        paired = [one[split] - other[split] for split in one if split in other]
        deviation = f" ± {statistics.stdev(paired):.1f}" if len(paired) > 1 else ""
        return f"{statistics.mean(paired):+.1f}{deviation}" if paired else ""

    lines = []
    for labels in sorted({labels for labels, *_ in top1}, reverse=True):
        for method in ("probe", "finetune", "laplacenet"):
            ours, scratch = (top1.get((labels, method, start), {}) for start in ("encoder", "scratch"))
            common = ours.keys() & scratch.keys()
            if not common:
                continue
            ours, scratch = ({split: each[split] for split in sorted(common)} for each in (ours, scratch))
            probe = top1.get((labels, "probe", "encoder"), {})
            lines.append(
                [
                    *(str(labels), method, str(len(common))),
                    *(mean_and_deviation(list(each.values())) for each in (ours, scratch)),
                    difference(ours, scratch),
                    "" if method == "probe" else difference(ours, probe),
                ]
            )
    head = ["labels", "method", "splits", "from the encoder", "from scratch", "encoder minus scratch"]
    return markdown([*head, "minus probe, from the encoder"], lines) if lines else f"{NOT_MEASURED}."


def measure(path: str) -> str:
    """Returns the table of FILE/MEASURE, with the protocol below it, or "not measured" if it was not recorded."""
    name, _, kind = path.partition("/")
    rows = [row for row in recorded(name) if kind in row.get("measures", {})]
    if not rows:
        return f"{NOT_MEASURED}."
    found = Measured(**rows[-1]["measures"][kind])
    head, *lines = found.lines
    return f"{markdown(head, lines)}\n\nProtocol: {found.protocol}."


def named_curves() -> dict[str, curves.Curve]:
    """Returns the curves of the runs on CPU cores, with the names that they have in the table."""
    names = {
        f"{path.stem}: {row['stage']}, {row['variant']}": run_name((row["stage"], row["variant"]), row["of_epochs"])
        for path in CURVES
        for row in recorded(path.stem)
    }
    return {names[name]: curve for name, curve in curves.read_curves(CURVES).items()}


def learning_curve() -> str:
    """Returns the line of README.md that shows the learning curve."""
    if not named_curves():
        return f"Learning curve: {NOT_MEASURED}."
    return f"![CIFAR-10: accuracy by images seen](docs/{CURVE.name})"


TABLES: dict[str, Callable[[], str]] = {
    "readme": readme,
    "learning_curve": learning_curve,
    "cifar10_cpu_screen": screen,
    "cifar10_cpu_runs": runs,
    "controls": controls,
    "digits_few_labels": partial(few_labels, "digits_few_labels"),
    "cifar10_few_labels": partial(few_labels, "cifar10_few_labels"),
}
"""Function that makes each table, by the name in its marker."""


def filled(page: str) -> str:
    """Returns the text of a page with its tables filled."""
    return re.sub(
        r"(<!--table:([\w/]+)-->\n).*?(<!--/table-->)",
        lambda found: f"{found[1]}{measure(found[2]) if '/' in found[2] else TABLES[found[2]]()}\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


def main(argv: list[str] | None = None) -> None:
    """Fills the pages and draws the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", type=Path, default=CURVE, help="SVG file for the learning curve")
    curve = parser.parse_args(argv).curve
    for page in PAGES:
        write_text(page, filled(page.read_text(encoding="utf-8")))
    found = named_curves()
    if found:
        curves.save(found, curve)


if __name__ == "__main__":
    main()
