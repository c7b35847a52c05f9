"""The plan of an ablation: stages of variants of a config, the runs that they make, and the results so far."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ablations.result_rows import append_row, read_rows
from config.errors import ConfigError
from config.reading import load_config, parse_yaml, result_digest
from config.schema import Config

Name = Annotated[str, Field(pattern=r"^\w+$")]
SET_BY_STAGES = ("seed=", "training.epochs=")


class Stage(BaseModel):
    """Variants to compare, the first of them with each of the others; or a command.

    Attributes:
        command: arguments of Python, for at most `minutes`; its output goes to commands.txt.
        epochs, minutes, images_of: length of each run, given in one of three ways. `images_of` names a stage and a
            variant, `stage/variant`, whose number of epochs is taken.
        base: the stage whose best variant these variants change.
        keep: keep the encoders.
        variants: {name: overrides, as on the command line}.
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
        lengths = [name for name in ("epochs", "minutes", "images_of") if getattr(self, name) is not None]
        fits = len(lengths) == 1 if self.variants else lengths in ([], ["minutes"])
        if (self.command is None) != bool(self.variants) or not fits:
            raise ValueError("a stage has variants and one of epochs, minutes and images_of; or a command")
        return self


class Plan(BaseModel):
    """Stages, the most important first, since the time may end after any of them.

    Attributes:
        config: path of the config that all variants start from.
        overrides: overrides of every run.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    config: str
    overrides: list[str] = []
    stages: list[Stage] = Field(min_length=1)


def read_plan(path: Path, overrides: list[str]) -> Plan:
    """The plan in a file, with further `overrides` of every run; raises ConfigError.

    `base` and `images_of` of a stage name earlier stages.
    """
    try:
        plan = Plan.model_validate(parse_yaml(path.read_text(), str(path)))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no plan: {' '.join(str(error).split())}") from None
    plan = plan.model_copy(update={"overrides": [*plan.overrides, *overrides]})
    earlier: dict[str, Stage] = {}
    for stage in plan.stages:
        if stage.name in earlier:
            raise ConfigError(f"{path}: two stages are called {stage.name}")
        if stage.base is not None and not (stage.base in earlier and earlier[stage.base].variants):
            raise ConfigError(f"{path}: {stage.name} builds on {stage.base}, no stage of variants before it")
        if stage.images_of is not None:
            name, _, variant = stage.images_of.partition("/")
            if name not in earlier or variant not in earlier[name].variants:
                raise ConfigError(f"{path}: {stage.name} trains as long as {stage.images_of}, which is not before it")
        earlier[stage.name] = stage
        for own in [plan.overrides, *stage.variants.values()]:
            load_config(plan.config, [*plan.overrides, *own])
            if any(override.startswith(SET_BY_STAGES) for override in own):
                raise ConfigError(f"{path}: {stage.name} decides on seeds and epochs by its own keys, not by overrides")
    return plan


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
        overrides: those of the base and of the variant, without the plan's own.
        config: complete but for the number of epochs.
    """

    stage: Stage
    variant: str
    seed: int
    overrides: list[str]
    config: Config

    @property
    def name(self) -> str:
        return f"{self.stage.name}-{self.variant}-{self.seed}"

    @property
    def digest(self) -> str:
        """Digest of all that the result depends on, except the images."""
        stage = self.stage
        length = f"{stage.epochs} {stage.minutes} {stage.images_of}"
        return result_digest(self.config, without=("data.root", "training.epochs"), also=length)


class Ablation:
    """A plan and the results of its runs so far.

    A run may have several rows in the file, one for each time that it was judged; the last one counts. Rows whose
    digest is not that of the run in the present plan are ignored.

    Args:
        path: file of JSON lines.
    """

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan, self.path = plan, path
        rows = [row for row in read_rows(path) if isinstance(row.get("complete"), bool)]
        self._rows = {row["run"]: row for row in rows if "run" in row}

    def record(self, run: Run, result: dict[str, Any]) -> None:
        """Write the result of a run to the file, at once."""
        identity = {"run": run.name, "stage": run.stage.name, "variant": run.variant, "seed": run.seed}
        self._rows[run.name] = {**identity, "overrides": run.overrides, "digest": run.digest, **result}
        append_row(self.path, self._rows[run.name])

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.plan.stages if stage.name == name)

    def runs_of(self, stage: Stage) -> list[Run]:
        """Runs of a stage in the order in which they are made: all variants with the first seed, then with the next.

        Empty if no run of a stage that it builds on is complete. Raises ConfigError if a variant's overrides do not
        go together with those of the best variant of that stage.
        """
        inherited: list[str] = []
        base = stage.base
        while base is not None:
            base_stage = self.stage(base)
            best = self.best_variant(base_stage)
            if best is None:
                return []
            inherited, base = [*base_stage.variants[best], *inherited], base_stage.base
        plan, runs = self.plan, []
        for seed in stage.seeds:
            for variant, own in stage.variants.items():
                overrides = [*inherited, *own]
                config = load_config(plan.config, [*plan.overrides, *overrides, f"seed={seed}"])
                runs.append(Run(stage, variant, seed, overrides, config))
        return runs

    def row_of(self, run: Run) -> dict[str, Any] | None:
        """Last result of a run, complete or not."""
        row = self._rows.get(run.name)
        return row if row is not None and row["digest"] == run.digest else None

    def runs_with_rows(self, stage: Stage) -> list[tuple[Run, dict[str, Any]]]:
        """Runs that have a result, with it; empty if the stage's overrides do not go together."""
        try:
            return [(run, row) for run in self.runs_of(stage) if (row := self.row_of(run))]
        except ConfigError:
            return []

    def complete_rows(self, stage: Stage) -> dict[str, list[dict[str, Any]]]:
        """Results of complete runs by variant, over seeds."""
        found: dict[str, list[dict[str, Any]]] = {}
        for _, row in self.runs_with_rows(stage):
            if row["complete"]:
                found.setdefault(row["variant"], []).append(row)
        return found

    def best_variant(self, stage: Stage) -> str | None:
        """The variant with the highest mean score; None if no run is complete."""
        scores = {variant: statistics.mean(map(score, rows)) for variant, rows in self.complete_rows(stage).items()}
        return max(scores, key=lambda variant: scores[variant]) if scores else None


def reference_accuracies(row: dict[str, Any]) -> tuple[float, float]:
    """Top-1 of k-NN and linear probe under the reference implementation's own protocol, in per cent."""
    found = {name.split()[0]: cells["trained"]["top1"] for name, cells in row["table"].items() if "reference's" in name}
    return found["k-NN"], found["linear"]


def score(row: dict[str, Any]) -> float:
    """Mean of the two accuracies, by which variants are ranked."""
    return statistics.mean(reference_accuracies(row))
