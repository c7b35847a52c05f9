"""Runs of an ablation plan, and their results so far."""

import re
import statistics
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ablations.plan import OVERRIDES, Judging, Plan, Stage
from ablations.result_rows import append_row, read_rows
from config.errors import ConfigError
from config.keys import differences, result_digest
from config.reading import load_config, parse_config
from config.schema import Config


@dataclass(frozen=True)
class Run:
    """One variant trained with one seed.

    Attributes:
        overrides: overrides of the base stages and of the variant, without those of the plan.
        config: config of the run, except for its number of epochs, which the driver sets later.
        judging: that of the plan.
    """

    stage: Stage
    variant: str
    seed: int
    overrides: list[str]
    config: Config
    judging: Judging

    @property
    def name(self) -> str:
        """Name of the run: stage, variant and seed."""
        return f"{self.stage.name}-{self.variant}-{self.seed}"

    @property
    def terms(self) -> str:
        """Everything that the result depends on, except the config and the images: length, protocols and objective."""
        stage = self.stage
        terms = f"{stage.epochs} {stage.minutes} {stage.images_of}"
        if self.judging != "all":
            terms += f" judged by {self.judging}"
        return terms if stage.control is None else f"{terms} control {stage.control}"

    @cached_property
    def digest(self) -> str:
        """Digest of everything that the result depends on, except the images."""
        return self._digest_with(self.config)

    @property
    def identity(self) -> dict[str, str]:
        """Entries of a row by which `is_result` recognises the run, besides the config."""
        return {"digest": self.digest, "terms": self.terms}

    def is_result(self, row: dict[str, Any]) -> bool:
        """Returns True if `row` is a result of this run.

        If the schema has got new keys since then, the config of the row has their default values.
        """
        if row["digest"] == self.digest:
            return True
        if row.get("terms") != self.terms or "config" not in row:
            return False
        try:
            return self._digest_with(parse_config(row["config"], "the config of a result")) == self.digest
        except ConfigError:
            return False

    def _digest_with(self, config: Config) -> str:
        return result_digest(config, without=("data.root", "data.labels", "training.epochs"), also=self.terms)


class Ablation:
    """A plan and the results of its runs so far.

    A run has one row in the file for each time that it was judged or failed. Only the last of them is used. A row is
    ignored if its digest differs from that of the run in this plan, so that plans may share a file.

    Args:
        path: file of the results, one JSON line each.
    """

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan, self.path = plan, path
        self._configs: dict[tuple[str, ...], Config] = {}
        self.read_results()

    def read_results(self) -> None:
        """Reads the results from the file again."""
        self._rows: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(self.path):
            if "run" in row and isinstance(row.get("complete"), bool):
                self._rows.setdefault(row["run"], []).append(row)

    def record(self, run: Run, result: dict[str, Any]) -> None:
        """Stores the result of a run and appends it to the file."""
        identity = {"run": run.name, "stage": run.stage.name, "variant": run.variant, "seed": run.seed}
        append_row(self.path, {**identity, "overrides": run.overrides, **run.identity, **result})
        self.read_results()

    def stage(self, name: str) -> Stage:
        """Returns the plan's stage with this name."""
        return next(stage for stage in self.plan.stages if stage.name == name)

    def first_runs_of(self, stage: Stage) -> list[Run]:
        """Returns the runs of a stage without its second look, in training order: all variants seed by seed.

        Returns an empty list if a stage that this one builds on has no complete run. Raises ConfigError if the
        overrides of a variant do not give a valid config together with those of the best variants of these stages.
        """
        return self._runs_with(stage, stage.seeds, list(stage.variants))

    def runs_of(self, stage: Stage) -> list[Run]:
        """Returns the runs of a stage that are known so far, as `first_runs_of`, followed by those of its second look.

        The runs of the second look are known when all others are complete or have failed.
        """
        first = self.first_runs_of(stage)
        rows = [(run, self.row_of(run)) for run in first]
        if not stage.again or not all(row and (row["complete"] or "failed" in row) for _, row in rows):
            return first
        scores: dict[str, list[float]] = {}
        for run, row in rows:
            if row and row["complete"]:
                scores.setdefault(run.variant, []).append(score(row))
        means = {variant: statistics.mean(of_variant) for variant, of_variant in scores.items()}
        lowest = max(means.values(), default=0.0) - stage.again.within
        return first + self._runs_with(stage, stage.again.seeds, [name for name in means if means[name] >= lowest])

    def _runs_with(self, stage: Stage, seeds: list[int], variants: list[str]) -> list[Run]:
        inherited: list[str] = []
        base = stage.base
        while base is not None:
            base_stage = self.stage(base)
            best = self.best_variant(base_stage)
            if best is None:
                return []
            inherited, base = [*base_stage.variants[best], *inherited], base_stage.base
        plan, runs = self.plan, []
        for seed in seeds:
            for variant in variants:
                overrides = [*inherited, *stage.variants[variant]]
                runs.append(
                    Run(stage, variant, seed, overrides, self._config(*overrides, f"seed={seed}"), plan.judging)
                )
        return runs

    def _config(self, *overrides: str) -> Config:
        if overrides not in self._configs:
            self._configs[overrides] = load_config(self.plan.config, [*self.plan.overrides, *overrides], OVERRIDES)
        return self._configs[overrides]

    def runs_needed_by(self, stage: Stage) -> list[Run]:
        """Returns the runs of earlier stages that must be complete before a stage is trained.

        These are all runs of the stage that `base` names, and those of the variant that `images_of` names.
        """
        needed: list[Run] = []
        with suppress(ConfigError):  # has been reported for the earlier stage
            if stage.base is not None:
                needed += self.runs_of(self.stage(stage.base))
            if stage.images_of is not None:
                name, _, variant = stage.images_of.partition("/")
                needed += [run for run in self.runs_of(self.stage(name)) if run.variant == variant]
        return needed

    def row_of(self, run: Run) -> dict[str, Any] | None:
        """Returns the last result of a run, complete or not; None if there is no result.

        If the run is as long as another run (`images_of`), its complete results count while they have the length of the
        other run, also after a failure.
        """
        rows = [row for row in reversed(self._rows.get(run.name, [])) if run.is_result(row)]
        if run.stage.images_of:
            complete = [row for row in rows if row["complete"]]
            epochs = self.epochs_of_reference_run(run.stage) if complete else None
            as_long = [row for row in complete if round(row["epochs"]) == epochs]
            rows = as_long + [row for row in rows if not row["complete"]]
        return rows[0] if rows else None

    def epochs_of_reference_run(self, stage: Stage) -> int | None:
        """Returns the number of epochs of the run that `images_of` of a stage names; None if that is not complete."""
        assert stage.images_of is not None
        name, _, variant = stage.images_of.partition("/")
        rows = self.complete_rows(self.stage(name)).get(variant)
        return max(1, round(rows[0]["epochs"])) if rows else None

    def results_on_other_images(self, run: Run, data_digest: str) -> list[str]:
        """Returns the names of runs in the plan whose training images differ from those of `run`.

        Runs with other experiment keys in the section `data` are ignored, because their images differ on purpose.
        """
        return [
            other.name
            for stage in self.plan.stages
            for other, row in self.runs_with_rows(stage)
            if row.get("data_digest", data_digest) != data_digest
            and not differences(other.config, run.config, run=False, prefixes=("data.",))
        ]

    def is_complete(self, run: Run) -> bool:
        """Returns True if a run has been trained to its end and judged."""
        row = self.row_of(run)
        return row is not None and row["complete"]

    def num_failures(self, run: Run) -> int:
        """Returns the number of failures of a run."""
        return sum("failed" in row and run.is_result(row) for row in self._rows.get(run.name, []))

    def runs_with_rows(self, stage: Stage) -> list[tuple[Run, dict[str, Any]]]:
        """Returns (run, last result) for each run with a result; an empty list if a config in the stage is invalid."""
        try:
            return [(run, row) for run in self.runs_of(stage) if (row := self.row_of(run))]
        except ConfigError:
            return []

    def complete_rows(self, stage: Stage) -> dict[str, list[dict[str, Any]]]:
        """Returns {variant: results of its complete runs, one per seed}."""
        found: dict[str, list[dict[str, Any]]] = {}
        for _, row in self.runs_with_rows(stage):
            if row["complete"]:
                found.setdefault(row["variant"], []).append(row)
        return found

    def best_variant(self, stage: Stage) -> str | None:
        """Returns the variant with the highest mean score over its seeds; None if no run is complete.

        After a second look, only the variants of that look can be the best: the others have fewer seeds.
        """
        rows = self.complete_rows(stage)
        most = max(map(len, rows.values()), default=0) if stage.again else 0
        scores = {variant: statistics.mean(map(score, each)) for variant, each in rows.items() if len(each) >= most}
        return max(scores, key=lambda variant: scores[variant]) if scores else None


def accuracies(row: dict[str, Any]) -> tuple[float, float]:
    """Returns top-1 of k-NN and of the linear probe, in per cent.

    The protocols are the reference implementation's, or those of the config if the run was judged by them alone
    (`Plan.judging`). For a time-dependent encoder, each is that of the best judged timestep.
    """
    named = [name for name in row["table"] if "reference's" in name] or list(row["table"])

    def best(kind: str) -> float:
        of_kind = {name: re.sub(r"@\d+", "", name) for name in named if name.split()[0] == kind}
        first = next(iter(of_kind.values()))
        return max(row["table"][name]["trained"]["top1"] for name, text in of_kind.items() if text == first)

    return best("k-NN"), best("linear")


def score(row: dict[str, Any]) -> float:
    """Returns the mean of the two `accuracies`. Variants are ranked by this score."""
    return statistics.mean(accuracies(row))
