"""The plan of an ablation: stages of variants of a config, and what has come of them so far."""

import json
import statistics
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from utils.config import Config, ConfigError
from utils.config_file import load_config, parse_yaml, result_digest

Name = Annotated[str, Field(pattern=r"^\w+$")]
OF_THE_RUN = ("seed=", "training.epochs=")  # which stages decide


class Stage(BaseModel):
    """Variants that are compared with each other, the first of them with all others; or a command.

    Attributes:
        command: arguments of Python, for at most `minutes`; what it prints goes to `commands.txt`.
        epochs, minutes, images_of: how long each run trains; the last names a stage and a variant, `stage/variant`.
        base: the stage whose best variant these variants change.
        keep: whether the encoders are worth keeping.
        variants: name -> overrides, as on the command line.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    name: Name
    command: str | None = None
    epochs: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    images_of: str | None = None
    base: str | None = None
    seeds: list[Annotated[int, Field(ge=0)]] = [0]
    keep: bool = False
    variants: dict[Name, list[str]] = {}

    @field_validator("seeds")
    @classmethod
    def _once_each(cls, seeds: list[int]) -> list[int]:
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError("give at least one seed, and each once")
        return seeds

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
    stages: list[Stage] = Field(min_length=1)


def read_plan(path: Path, more: list[str]) -> Plan:
    """The plan in a file, with the overrides `more` for all runs; raises ConfigError.

    A stage builds on stages before it only.
    """
    try:
        plan = Plan.model_validate(parse_yaml(path.read_text(), str(path)))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no plan: {' '.join(str(error).split())}") from None
    plan = plan.model_copy(update={"overrides": [*plan.overrides, *more]})
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
        for overrides in [plan.overrides, *stage.variants.values()]:
            load_config(plan.config, [*plan.overrides, *overrides])
            if any(override.startswith(OF_THE_RUN) for override in overrides):
                raise ConfigError(f"{path}: {stage.name} decides on seeds and epochs by its own keys, not by overrides")
    return plan


@dataclass(frozen=True)
class Run:
    """One variant with one seed; `config` holds everything but the number of epochs."""

    stage: Stage
    variant: str
    seed: int
    overrides: list[str]  # those of the base and of the variant
    config: Config

    @property
    def name(self) -> str:
        return f"{self.stage.name}-{self.variant}-{self.seed}"

    @property
    def digest(self) -> str:
        """Of all that its result depends on, but for the images."""
        stage = self.stage
        budget = f"{stage.epochs} {stage.minutes} {stage.images_of}"
        return result_digest(self.config, without=("data.root", "training.epochs"), also=budget)


class Ablation:
    """A plan and its results: JSON lines, one for each time that a run was judged, of which the last counts.

    A result that does not belong to the run as the plan has it now is passed over.
    """

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan, self.path = plan, path
        self._rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with suppress(ValueError, KeyError, TypeError):  # a line that a crash cut short
                row = json.loads(line)
                if isinstance(row["digest"], str) and isinstance(row["complete"], bool):
                    self._rows[row["run"]] = row

    def add(self, run: Run, row: dict[str, Any]) -> None:
        """Written the moment that it is there, on a line of its own even after one that was cut short."""
        what = {"run": run.name, "stage": run.stage.name, "variant": run.variant, "seed": run.seed}
        self._rows[run.name] = {**what, "overrides": run.overrides, "digest": run.digest, **row}
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with open(self.path, "a") as file:
            file.write(("" if whole else "\n") + json.dumps(self._rows[run.name]) + "\n")

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.plan.stages if stage.name == name)

    def runs(self, stage: Stage) -> list[Run]:
        """In the order in which they are made: all variants with the first seed, then with the next.

        Empty where nothing has come of a stage that they build on. Raises ConfigError where a variant does not go with
        the best of that stage.
        """
        inherited: list[str] = []
        base = stage.base
        while base is not None:
            before = self.stage(base)
            best = self.best(before)
            if best is None:
                return []
            inherited, base = [*before.variants[best], *inherited], before.base
        plan, runs = self.plan, []
        for seed in stage.seeds:
            for variant, overrides in stage.variants.items():
                mine = [*inherited, *overrides]
                config = load_config(plan.config, [*plan.overrides, *mine, f"seed={seed}"])
                runs.append(Run(stage, variant, seed, mine, config))
        return runs

    def row(self, run: Run) -> dict[str, Any] | None:
        """What came of it last, finished or not."""
        row = self._rows.get(run.name)
        return row if row is not None and row["digest"] == run.digest else None

    def rows(self, stage: Stage) -> dict[str, list[dict[str, Any]]]:
        """Of each variant, over seeds, what came to its end."""
        found: dict[str, list[dict[str, Any]]] = {}
        for _, row in self.made(stage):
            if row["complete"]:
                found.setdefault(row["variant"], []).append(row)
        return found

    def made(self, stage: Stage) -> list[tuple[Run, dict[str, Any]]]:
        """The runs of which there is anything to say; none of a stage that cannot be made."""
        try:
            return [(run, row) for run in self.runs(stage) if (row := self.row(run))]
        except ConfigError:
            return []

    def best(self, stage: Stage) -> str | None:
        """The variant with the highest score, over those that have any."""
        scores = {variant: statistics.mean(map(score, rows)) for variant, rows in self.rows(stage).items()}
        return max(scores, key=lambda variant: scores[variant]) if scores else None


def accuracies(row: dict[str, Any]) -> tuple[float, float]:
    """Top-1 of k-NN and linear probe under the reference's own protocol, in per cent."""
    found = {name.split()[0]: cells["trained"]["top1"] for name, cells in row["table"].items() if "reference's" in name}
    return found["k-NN"], found["linear"]


def score(row: dict[str, Any]) -> float:
    """What variants are ranked by: the mean of the two."""
    return statistics.mean(accuracies(row))
