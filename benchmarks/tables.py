"""What came of an ablation, as Markdown."""

import math
import statistics
from typing import Any

from benchmarks.plan import Ablation, Stage, accuracies, score

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


def tables(ablation: Ablation) -> str:
    """A table for each stage of which anything is done.

    k-NN and linear probe are top-1 in per cent by the reference's protocol, mean ± standard deviation over seeds. A
    difference of at most two standard deviations of a run is a tie; how much runs vary is what all variants of the
    stage with several seeds say together, or else those of all stages.
    """
    rows = {stage.name: ablation.rows(stage) for stage in ablation.plan.stages}
    scores = {name: [[score(row) for row in found] for found in of.values()] for name, of in rows.items()}
    overall = pooled_deviation([group for groups in scores.values() for group in groups])
    parts = []
    for stage in ablation.plan.stages:
        own = pooled_deviation(scores[stage.name])
        body = _stage(stage, rows[stage.name], overall if own is None else own)
        parts += [part for part in (body, _unfinished(stage, ablation)) if part]
    return "".join(f"{part}\n\n" for part in parts)


def _stage(stage: Stage, rows: dict[str, list[dict[str, Any]]], deviation: float | None) -> str:
    if not rows:
        return ""
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
    where = sorted({f"{row['data']}; {row['machine']}, {row['amp']}" for found in rows.values() for row in found})
    said = [f"**{stage.name}** ({'; '.join(where)})", ""]
    return "\n".join([*said, *(f"| {' | '.join(line)} |" for line in lines), *_effects(stage, rows, deviation)])


def _unfinished(stage: Stage, ablation: Ablation) -> str:
    lines = []
    for run, row in ablation.made(stage):
        if "failed" in row:
            lines.append(f"- {run.name} failed: {row['failed']}")
        elif not row["complete"]:
            knn, linear = accuracies(row)
            lines.append(f"- {run.name} was stopped after {row['images']:,} images: {knn:.1f} / {linear:.1f}")
    return "\n".join(lines)


def pooled_deviation(groups: list[list[float]]) -> float | None:
    """Standard deviation within groups, of all groups together; None if none has two values."""
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return None
    return math.sqrt(sum((x - statistics.mean(group)) ** 2 for group in groups for x in group) / freedom)


def verdict(difference: float, deviation: float | None) -> str:
    if deviation is None:
        return f"{difference:+.1f} (one seed)"
    return f"{difference:+.1f}" + (" (tie)" if abs(difference) <= 2 * deviation else "")


def _mean(values: list[float], form: str = "{:.1f}") -> str:
    if not values:
        return ""
    spread = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + spread


def _effects(stage: Stage, rows: dict[str, list[dict[str, Any]]], deviation: float | None) -> list[str]:
    """Of each setting of a key that several variants have: their mean, less the mean of those without the key.

    Other settings of the key are left out; settings that always come together are one.
    """
    scores = {variant: [score(row) for row in found] for variant, found in rows.items()}
    having: dict[frozenset[str], list[str]] = {}
    for override in dict.fromkeys(o for variant in rows for o in stage.variants[variant]):
        having.setdefault(frozenset(v for v in rows if override in stage.variants[v]), []).append(override)
    lines = []
    for variants, overrides in having.items():
        keys = tuple(override.partition("=")[0] + "=" for override in overrides)
        without = [v for v in rows if not any(override.startswith(keys) for override in stage.variants[v])]
        if len(variants) > 1 and len(without) > 1:
            means = [statistics.mean(statistics.mean(scores[v]) for v in group) for group in (variants, without)]
            runs = [sum(len(scores[v]) for v in group) for group in (variants, without)]
            of_means = None if deviation is None else deviation * math.sqrt(sum(1 / n for n in runs))
            said = verdict(means[0] - means[1], of_means)
            lines.append(f"- `{' '.join(overrides)}`: {said}, {len(variants)} variants against {len(without)} without")
    return ["", *lines] if lines else []
