"""Rows of docs/results, their accuracies as text, and tables in Markdown."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ablations.result_rows import read_rows
from ablations.runs import score
from ablations.tables import deviation_of_difference, mean_and_deviation, pooled_deviation, verdict

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"
BASELINES = ("untrained", "raw pixels")

Row = dict[str, Any]


def recorded(name: str) -> list[Row]:
    """Returns the rows of a file in docs/results: the last one for each run and number of images."""
    return list({(row["run"], row.get("images")): row for row in read_rows(RESULTS / f"{name}.jsonl")}.values())


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


def by_variant(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Returns the last rows of the complete runs of an ablation, by variant."""
    groups: dict[str, list[Row]] = {}
    for row in last_of(rows):
        if row["complete"]:
            groups.setdefault(row["variant"], []).append(row)
    return groups


def against_first(groups: dict[str, list[Row]], others: Iterable[list[Row]] = ()) -> dict[str, str]:
    """Returns the difference of each variant from the first one, over the seeds that both have; of the first, "".

    Differences are those of the mean of k-NN and linear probe. Ties are marked, by the standard deviation of single
    runs that is pooled over all variants, and over `others`: groups of runs that differ only in the seed.
    """
    deviation = pooled_deviation([[score(row) for row in rows] for rows in (*groups.values(), *others)])
    found: dict[str, str] = {}
    for variant, rows in groups.items():
        first = {row["seed"]: score(row) for row in next(iter(groups.values()))} if found else {}
        gains = [score(row) - first[row["seed"]] for row in rows if row["seed"] in first]
        of_mean = deviation_of_difference(deviation, [len(gains)] * 2) if gains else None
        found[variant] = verdict(statistics.mean(gains), of_mean) if gains else ""
    return found


def beside_baselines(rows: list[Row], middle: Any = None) -> str:
    """Returns k-NN / linear probe of rows, with those of the baselines that all rows have."""
    cells = set.intersection(*(set(next(iter(row["table"].values()))) for row in rows))
    baselines = [name for name in BASELINES if name in cells]
    others = [f"{name} {both(rows, encoder=name, middle=middle)}" for name in baselines]
    found = both(rows, middle=middle)
    return f"{found} ({'; '.join(others)})" if others else found


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    """Returns a table in Markdown."""
    rows = [f"| {' | '.join(line)} |".replace("  ", " ") for line in (head, *lines)]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])
