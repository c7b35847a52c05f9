"""What came of an ablation, as Markdown."""

import math
import statistics
from typing import Any

from benchmarks.plan import Plan, Results, Stage, accuracies, score

HEAD = [
    "variant",
    "seeds",
    "images",
    "minutes",
    "images/s",
    "k-NN",
    "linear",
    "mean of both",
    "against the first",
]


def tables(plan: Plan, results: Results) -> str:
    """A table for each stage of which anything is done.

    k-NN and linear probe are top-1 in per cent by the reference's protocol, mean ± standard deviation over seeds. A
    difference of less than two standard deviations of a run is a tie; how much runs vary is what all variants of the
    stage with several seeds say together, or else those of all stages.
    """
    rows = {s.name: {v: found for v in s.variants if (found := results.of(s.name, v))} for s in plan.stages}
    scores = {name: [[score(row) for row in found] for found in of.values()] for name, of in rows.items()}
    overall = pooled_deviation([group for groups in scores.values() for group in groups])
    parts = []
    for stage in plan.stages:
        if rows[stage.name]:
            own = pooled_deviation(scores[stage.name])
            parts.append(_stage(stage, rows[stage.name], overall if own is None else own))
    return "\n\n".join(parts) + "\n"


def _stage(stage: Stage, rows: dict[str, list[dict[str, Any]]], deviation: float | None) -> str:
    first = next(iter(stage.variants))
    control = statistics.mean(map(score, rows[first])) if first in rows else None
    lines = [HEAD, ["---"] * len(HEAD)]
    for variant, found in rows.items():
        mean = statistics.mean(map(score, found))
        lines.append(
            [
                f"{variant}: {' '.join(stage.variants[variant])}" if stage.variants[variant] else variant,
                ", ".join(str(row["seed"]) for row in found),
                f"{statistics.mean(row['images'] for row in found):,.0f}",
                f"{statistics.mean(row['seconds'] for row in found) / 60:.1f}",
                _mean([row["images_per_s"] for row in found if row["images_per_s"]], "{:,.0f}"),
                _mean([accuracies(row)[0] for row in found]),
                _mean([accuracies(row)[1] for row in found]),
                _mean([score(row) for row in found]),
                "" if variant == first or control is None else verdict(mean - control, deviation),
            ]
        )
    machines = sorted({f"{row['machine']}, {row['amp']}" for found in rows.values() for row in found})
    said = [f"**{stage.name}** ({'; '.join(machines)})", ""]
    return "\n".join([*said, *(f"| {' | '.join(line)} |" for line in lines), *_effects(stage, rows)])


def pooled_deviation(groups: list[list[float]]) -> float | None:
    """Standard deviation within groups, of all groups together; None if none has two values."""
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return None
    return math.sqrt(sum((x - statistics.mean(group)) ** 2 for group in groups for x in group) / freedom)


def verdict(difference: float, deviation: float | None) -> str:
    if deviation is None:
        return f"{difference:+.1f} (one seed)"
    return f"{difference:+.1f}" + (" (tie)" if abs(difference) < 2 * deviation else "")


def _mean(values: list[float], form: str = "{:.1f}") -> str:
    if not values:
        return ""
    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + spread


def _effects(stage: Stage, rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Of each override that several variants have and several have not: mean with it less mean without."""
    scores = {variant: statistics.mean(map(score, found)) for variant, found in rows.items()}
    lines = []
    for override in dict.fromkeys(o for variant in rows for o in stage.variants[variant]):
        with_it = [scores[v] for v in rows if override in stage.variants[v]]
        without = [scores[v] for v in rows if override not in stage.variants[v]]
        if len(with_it) > 1 and len(without) > 1:
            effect = statistics.mean(with_it) - statistics.mean(without)
            lines.append(f"- `{override}`: {effect:+.1f} on average ({len(with_it)} variants with it)")
    return ["", *lines] if lines else []
