"""Rows of docs/results, their accuracies as text, and tables in Markdown."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ablations.result_rows import read_rows
from ablations.tables import mean_and_deviation

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"

Row = dict[str, Any]


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
