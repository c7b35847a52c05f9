"""Fills the tables of README.md and docs/ that are made from docs/results, and draws the learning curve.

A table is between the lines `<!--table:NAME-->` and `<!--/table-->`. NAME is a key of TABLES, or FILE/MEASURE: a
measure of the last run in a file of docs/results.

python -m docs.fill_tables
"""

import argparse
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ablations import curves
from ablations.runs import accuracies, score
from ablations.tables import mean_and_deviation
from docs import cifar10_tables
from docs.rows import NOT_MEASURED, against_first, beside_baselines, by_variant, last_of, markdown, recorded
from evaluation.measures.base import Measured
from utils.files import write_text

DOCS = Path(__file__).parent
PAGES = (
    DOCS.parent / "README.md",
    *(DOCS / f"{name}.md" for name in ("results", "few_labels", "novel_views", "measures")),
)
CURVE = DOCS / "learning_curve.svg"


def readme() -> str:
    """Returns the table of results of README.md."""
    digits = [row for row in recorded("digits") if row["complete"]]
    lines = [["digits", NOT_MEASURED, "`make train`"]]
    if digits:
        minutes = statistics.median(row["seconds"] for row in digits) / 60
        seeds = f"median of {len(digits)} seeds" if len(digits) > 1 else "one seed"
        how = f"{seeds}, {minutes:.0f} minutes{' each' * (len(digits) > 1)} on a CPU core: `make train`"
        lines = [["digits", beside_baselines(digits, statistics.median), how]]
    runs = [row for row in recorded("cifar10_cpu_runs") if (row["stage"], row["variant"]) == ("hour", "soda")]
    lines.append(cifar10_tables.readme_line(runs, "cifar10_cpu.yaml"))
    if long := recorded("cifar10_cpu_long"):
        lines.append(cifar10_tables.readme_line(long, "cifar10_cpu_long.yaml"))
    for data, command, reference in (
        ("CIFAR-10, the full recipe", "cifar10.yaml --use_amp", "80.4 / 80.0"),
        ("CIFAR-10, 50 epochs of batches of 256", "cifar10.yaml training.epochs=50 training.batch_size=256", ""),
        ("CIFAR-100", "cifar100.yaml --use_amp", "51.4 / 54.9"),
        ("Tiny-ImageNet", "tiny.yaml --use_amp data.root=data", "34.8 / 38.2"),
    ):
        found = f"{NOT_MEASURED}{reference and f' (reference: {reference})'}"
        lines.append([data, found, f"`python train.py --config config/{command}`"])
    return markdown(["data", "k-NN / linear probe", "how"], lines)


def few_labels(name: str) -> str:
    """Returns the table of methods with few labels of a file of results. Differences are paired by split."""
    top1: dict[tuple[int, str, str], dict[int, float]] = {}
    for row in last_of(recorded(name)):
        (cells,) = row["table"].values()
        top1.setdefault((row["labels"], row["variant"], row["start"]), {})[row["split"]] = cells["EMA"]["top1"]

    def difference(one: dict[int, float], other: dict[int, float]) -> str:
        paired = [one[split] - other[split] for split in one if split in other]
        deviation = f" ± {statistics.stdev(paired):.1f}" if len(paired) > 1 else ""
        return f"{round(statistics.mean(paired), 1) + 0.0:+.1f}{deviation}" if paired else ""

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
    return markdown([*head, "gain over the probe (both from the encoder)"], lines) if lines else f"{NOT_MEASURED}."


def variants(name: str) -> str:
    """Returns the table of the variants of a stage of an ablation, each against the first, over the same seeds."""
    groups = by_variant(recorded(name))
    if not groups:
        return f"{NOT_MEASURED}."
    differences = against_first(groups)
    lines = []
    for variant, rows in groups.items():
        both = zip(*(accuracies(row) for row in rows), strict=True)
        lines.append(
            [
                *(variant.replace("_", " "), str(len(rows)), f"{rows[0]['images']:,}"),
                *(mean_and_deviation(list(values)) for values in both),
                mean_and_deviation([score(row) for row in rows]),
                differences[variant],
            ]
        )
    head = ["variant", "seeds", "images", "k-NN", "linear", "mean of k-NN and linear", "against the first"]
    return markdown(head, lines)


def measure(path: str) -> str:
    """Returns the table of FILE/MEASURE, with the protocol below it, or "not measured" if it was not recorded."""
    name, _, kind = path.partition("/")
    rows = [row for row in recorded(name) if kind in row.get("measures", {})]
    if not rows:
        return f"{NOT_MEASURED}."
    found = Measured(**rows[-1]["measures"][kind])
    head, *lines = found.lines
    return f"{markdown(head, lines)}\n\nProtocol: {found.protocol}."


TABLES: dict[str, Callable[[], str]] = {
    "readme": readme,
    "cifar10_cpu_screen": cifar10_tables.screen,
    "cifar10_cpu_ties": cifar10_tables.screen_ties,
    "cifar10_cpu_runs": cifar10_tables.runs,
    "cifar10_cpu_slopes": cifar10_tables.slopes,
    "cifar10_floors": cifar10_tables.floor_line,
    "controls": cifar10_tables.controls,
    "drl_digits": partial(variants, "drl_digits"),
    "drl_fashion_mnist": partial(variants, "drl_fashion_mnist"),
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
    # All tables and the curve are made before a page is written, so that no page is changed if one cannot be made.
    texts = {page: filled(page.read_text(encoding="utf-8")) for page in PAGES}
    drawn, floors = cifar10_tables.named_curves(), cifar10_tables.floors()
    curves.save(drawn, curve, floors)
    for page, text in texts.items():
        write_text(page, text)


if __name__ == "__main__":
    main()
