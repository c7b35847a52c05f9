"""The plan of an ablation: stages of variants of a config, and what has come of them so far."""

import json
import statistics
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from utils.config import Config, ConfigError
from utils.config_file import load_config


class Stage(BaseModel):
    """Variants that are compared with each other, the first of them with all others; or a command.

    Attributes:
        command: arguments of Python, for at most `minutes`; what it prints is kept in `<name>.txt`.
        epochs, minutes, images_of: how long each run trains; the last names a stage and a variant, `stage/variant`.
        base: the stage whose best variant these variants change.
        keep: whether the encoders are worth keeping.
        variants: name -> overrides, as on the command line.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(pattern=r"^[\w-]+$")
    command: str | None = None
    epochs: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    images_of: str | None = None
    base: str | None = None
    seeds: list[int] = [0]
    keep: bool = False
    variants: dict[str, list[str]] = {}

    @model_validator(mode="after")
    def _one_kind(self) -> "Stage":
        budgets = [name for name in ("epochs", "minutes", "images_of") if getattr(self, name) is not None]
        fits = len(budgets) == 1 if self.variants else budgets in ([], ["minutes"])
        if (self.command is None) != bool(self.variants) or not fits:
            raise ValueError("a stage has variants and one of epochs, minutes and images_of; or a command")
        return self


class Plan(BaseModel):
    """Stages in the order of their worth.

    Attributes:
        config: path of the config that variants differ from.
        overrides: of all runs.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    config: str
    overrides: list[str] = []
    stages: list[Stage]


def read_plan(path: Path, more: list[str]) -> Plan:
    """The plan in a file, whose variants load with the overrides `more`; raises ConfigError.

    A stage builds on stages before it only.
    """
    try:
        plan = Plan.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{path} is no plan: {' '.join(str(error).split())}") from None
    before: dict[str, Stage] = {}
    for stage in plan.stages:
        if stage.name in before:
            raise ConfigError(f"{path}: two stages are called {stage.name}")
        if stage.base is not None and not (stage.base in before and before[stage.base].variants):
            raise ConfigError(f"{path}: {stage.name} builds on {stage.base}, no stage of variants before it")
        if stage.images_of is not None:
            name, _, variant = stage.images_of.partition("/")
            if name not in before or variant not in before[name].variants:
                raise ConfigError(f"{path}: {stage.name} trains as long as {stage.images_of}, which is not before it")
        before[stage.name] = stage
        for overrides in stage.variants.values():
            load_config(plan.config, [*plan.overrides, *overrides, *more])
    return plan


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    stage: Stage
    variant: str
    seed: int
    overrides: list[str]  # those of the base and of the variant

    @property
    def name(self) -> str:
        return f"{self.stage.name}-{self.variant}-{self.seed}"


class Results:
    """JSON lines, one for each time that a run was judged; the last of a run counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(ValueError, KeyError, TypeError):  # a line that a crash cut short
                row = json.loads(line)
                self.rows[row["run"]] = row

    def add(self, run: Run, row: dict[str, Any]) -> None:
        """Written the moment that it is there, on a line of its own even after one that was cut short."""
        what = {"run": run.name, "stage": run.stage.name, "variant": run.variant, "seed": run.seed}
        self.rows[run.name] = {**what, "overrides": run.overrides, **row}
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with open(self.path, "a") as file:
            file.write(("" if whole else "\n") + json.dumps(self.rows[run.name]) + "\n")

    def finished(self, run: Run) -> bool:
        """Whether it has come to its end, as it would be made now."""
        row = self.rows.get(run.name)
        return row is not None and row["complete"] and row["overrides"] == run.overrides

    def of(self, stage: str, variant: str) -> list[dict[str, Any]]:
        """Over seeds, those that came to their end."""
        rows = (row for row in self.rows.values() if (row["stage"], row["variant"]) == (stage, variant))
        return [row for row in rows if row["complete"]]

    def best(self, stage: Stage) -> str | None:
        """The variant with the highest score, over those that have any."""
        scored = {v: statistics.mean(map(score, rows)) for v in stage.variants if (rows := self.of(stage.name, v))}
        return max(scored, key=lambda variant: scored[variant]) if scored else None


def accuracies(row: dict[str, Any]) -> tuple[float, float]:
    """Top-1 of k-NN and linear probe under the reference's own protocol, in per cent."""
    found = {name.split()[0]: cells["trained"]["top1"] for name, cells in row["table"].items() if "reference's" in name}
    return found["k-NN"], found["linear"]


def score(row: dict[str, Any]) -> float:
    """What variants are ranked by: the mean of the two."""
    return statistics.mean(accuracies(row))


def runs_of(stage: Stage, plan: Plan, results: Results) -> Iterator[Run]:
    """In the order in which they are made: all variants with the first seed, then with the next.

    None if nothing has come of a stage that they build on.
    """
    inherited: list[str] = []
    base = stage.base
    while base is not None:
        before = next(s for s in plan.stages if s.name == base)
        best = results.best(before)
        if best is None:
            return
        inherited, base = [*before.variants[best], *inherited], before.base
    for seed in stage.seeds:
        for variant, overrides in stage.variants.items():
            yield Run(stage, variant, seed, [*inherited, *overrides])


def config_of(run: Run, plan: Plan, more: list[str], epochs: int) -> Config:
    return load_config(
        plan.config, [*plan.overrides, *run.overrides, *more, f"seed={run.seed}", f"training.epochs={epochs}"]
    )
