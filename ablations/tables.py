"""Markdown tables of the results of an ablation."""

import math
import statistics
from typing import Any

from ablations.plan import Stage
from ablations.runs import Ablation, accuracies, score

HEAD = [
    "variant",
    "seeds",
    "images",
    "GFLOP/image",
    "minutes",
    "images/s",
    "k-NN",
    "linear",
    "mean of k-NN and linear",
    "against the first",
]


def markdown_tables(ablation: Ablation) -> str:
    """Returns one table per stage that has a complete run, and one line per run that failed or was stopped early.

    k-NN and linear probe are top-1 accuracies in per cent (see `accuracies` for their protocols), as mean ± standard
    deviation over seeds. GFLOP/image is the work of a training step per image. Differences are those of the seeds that
    both sides have. A difference of at most two of its standard deviations is called a tie. Its standard deviation
    follows from that of single runs, pooled over the variants of the stage that have several seeds. If no variant of
    the stage has several seeds, it is pooled over the variants of all stages.
    """
    rows = {stage.name: ablation.complete_rows(stage) for stage in ablation.plan.stages}
    scores = {name: [[score(row) for row in found] for found in of.values()] for name, of in rows.items()}
    overall = pooled_deviation([group for groups in scores.values() for group in groups])
    parts = []
    for stage in ablation.plan.stages:
        own = pooled_deviation(scores[stage.name])
        complete = _stage_table(stage, rows[stage.name], overall if own is None else own)
        parts += [part for part in (complete, _incomplete_runs(stage, ablation)) if part]
    return "".join(f"{part}\n\n" for part in parts)


def _stage_table(stage: Stage, rows: dict[str, list[dict[str, Any]]], deviation: float | None) -> str:
    if not rows:
        return ""
    first = next(iter(stage.variants))
    control = {row["seed"]: score(row) for row in rows.get(first, [])}
    lines = [HEAD, ["---"] * len(HEAD)]
    for variant, found in rows.items():
        # A second look gives only some variants further seeds. Means over all seeds would compare different seeds.
        differences = [score(row) - control[row["seed"]] for row in found if row["seed"] in control]
        of_mean = deviation_of_difference(deviation, [len(differences)] * 2) if differences else None
        lines.append(
            [
                f"{variant}: {' '.join(stage.variants[variant])}" if stage.variants[variant] else variant,
                ", ".join(str(row["seed"]) for row in found),
                f"{statistics.mean(row['images'] for row in found):,.0f}",
                mean_and_deviation([row["step_gflop"] for row in found[:1] if "step_gflop" in row], "{:.2f}"),
                f"{statistics.mean(row['seconds'] for row in found) / 60:.1f}",
                mean_and_deviation([row["images_per_s"] for row in found if row["images_per_s"]], "{:,.0f}"),
                mean_and_deviation([accuracies(row)[0] for row in found]),
                mean_and_deviation([accuracies(row)[1] for row in found]),
                mean_and_deviation([score(row) for row in found]),
                "" if variant == first or not differences else verdict(statistics.mean(differences), of_mean),
            ]
        )
    conditions = sorted({f"{row['data']}; {row['machine']}, {row['amp']}" for found in rows.values() for row in found})
    title = [f"**{stage.name}** ({'; '.join(conditions)})", ""]
    return "\n".join([*title, *(f"| {' | '.join(line)} |" for line in lines), *_effects(stage, rows, deviation)])


def _incomplete_runs(stage: Stage, ablation: Ablation) -> str:
    lines = []
    for run, row in ablation.runs_with_rows(stage):
        if "failed" in row:
            lines.append(f"- {run.name} failed: {row['failed']}")
        elif not row["complete"]:
            knn, linear = accuracies(row)
            lines.append(f"- {run.name} has seen {row['images']:,} images so far: {knn:.1f} / {linear:.1f}")
    return "\n".join(lines)


def mean_and_deviation(values: list[float], form: str = "{:.1f}") -> str:
    """Returns `mean ± standard deviation`; only the mean if there is one value; "" if there is none."""
    if not values:
        return ""
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.mean(values)) + deviation


def pooled_deviation(groups: list[list[float]]) -> float | None:
    """Returns the standard deviation within groups, pooled over all groups; None if no group has two values."""
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return None
    return math.sqrt(sum((x - statistics.mean(group)) ** 2 for group in groups for x in group) / freedom)


def deviation_of_difference(deviation: float | None, runs: list[int]) -> float | None:
    """Returns the standard deviation of a difference of two means, from that of single runs; None if it is unknown.

    Args:
        runs: number of runs of each mean.
    """
    return None if deviation is None else deviation * math.sqrt(sum(1 / n for n in runs))


def verdict(difference: float, deviation: float | None) -> str:
    """Returns the difference of two means as text, marked as a tie if it is at most two of its standard deviations.

    `deviation` is None if the standard deviation is unknown.
    """
    if deviation is None:
        return f"{difference:+.1f} (one seed)"
    return f"{difference:+.1f}" + (" (tie)" if abs(difference) <= 2 * deviation else "")


def _effects(stage: Stage, rows: dict[str, list[dict[str, Any]]], deviation: float | None) -> list[str]:
    """Returns one line per setting, which compares the variants that have it with those that do not override its key.

    A setting is one override, or several overrides that always occur together. A variant that gives the key another
    value is in neither group. A setting is left out if a group has fewer than two variants.
    """
    scores = {variant: [score(row) for row in found if row["seed"] in stage.seeds] for variant, found in rows.items()}
    settings: dict[frozenset[str], list[str]] = {}  # {variants that have them: overrides}
    for override in dict.fromkeys(o for variant in rows for o in stage.variants[variant]):
        settings.setdefault(frozenset(v for v in rows if override in stage.variants[v]), []).append(override)
    lines = []
    for variants, overrides in settings.items():
        keys = tuple(override.partition("=")[0] + "=" for override in overrides)
        without = [v for v in rows if not any(override.startswith(keys) for override in stage.variants[v])]
        if len(variants) > 1 and len(without) > 1:
            means = [statistics.mean(statistics.mean(scores[v]) for v in group) for group in (variants, without)]
            runs = [sum(len(scores[v]) for v in group) for group in (variants, without)]
            comparison = verdict(means[0] - means[1], deviation_of_difference(deviation, runs))
            lines.append(
                f"- `{' '.join(overrides)}`: {comparison}, {len(variants)} variants against {len(without)} without"
            )
    return ["", *lines] if lines else []
