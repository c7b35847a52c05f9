"""Ablation plans: stages that compare variants of a config, their runs, and the results so far."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ablations.result_rows import append_row, read_rows
from config.errors import ConfigError
from config.reading import load_config, parse_config, parse_yaml, result_digest
from config.schema import Config

Name = Annotated[str, Field(pattern=r"^\w+$")]
Judging = Literal["all", "config"]
ControlName = Literal["simclr", "supervised"]
"""Names of the controls (ablations/controls.py)."""

CONTROL_NEEDS: dict[ControlName, str] = {"simclr": "pytorch_metric_learning"}
"""Package that a control needs in addition to requirements.txt."""
SET_BY_STAGES = ("seed=", "training.epochs=")


class Stage(BaseModel):
    """One stage of a plan: either variants of a config, each compared with the first one, or a command.

    Attributes:
        name: name of the stage, unique in its plan.
        command: command-line arguments for the Python interpreter. The command runs for at most `minutes`, and its
            output is appended to commands.txt.
        epochs, minutes, images_of: length of each run; a stage with variants gives exactly one of them. `images_of` is
            `stage/variant`: the run has the same number of epochs as that variant of an earlier stage.
        base: name of an earlier stage; its best variant is the starting point of these variants.
        seeds: seeds that each variant is trained with.
        judge_every: epochs between judgements while a run is trained, for curves; None: each run is judged once, at its
            end.
        control: objective that replaces SODA's for the encoder (ablations/controls.py); None: SODA's.
        keep: True also writes the trained encoders to files (see `write_encoder_parts`).
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
    judge_every: int | None = Field(default=None, ge=1)
    control: ControlName | None = None
    keep: bool = False
    variants: dict[Name, list[str]] = {}

    @field_validator("seeds")
    @classmethod
    def _once_each(cls, seeds: list[int]) -> list[int]:
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError("seeds are missing or repeated: give at least one seed, and each seed only once")
        return seeds

    @model_validator(mode="after")
    def _one_kind(self) -> "Stage":
        lengths = [name for name in ("epochs", "minutes", "images_of") if getattr(self, name) is not None]
        fits = len(lengths) == 1 if self.variants else lengths in ([], ["minutes"])
        if (self.command is None) != bool(self.variants) or not fits:
            raise ValueError(
                "give a stage either variants and exactly one of epochs, minutes and images_of, "
                "or a command and, if it needs a time limit, minutes"
            )
        return self


class Plan(BaseModel):
    """An ablation plan. Its most important stages come first, because the time may run out at any moment.

    Attributes:
        config: path of the config that all variants start from.
        overrides: overrides that apply to every run.
        judging: `all` judges each run under the protocols of test.py and ranks variants by the reference's two;
            `config` judges and ranks by the two protocols of the config's `evaluation` section alone, which takes less
            time.
        stages: stages in the order in which they are run.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    config: str
    overrides: list[str] = []
    judging: Judging = "all"
    stages: list[Stage] = Field(min_length=1)


def read_plan(path: Path, overrides: list[str]) -> Plan:
    """Reads and checks the plan in a file.

    Raises ConfigError if the file cannot be read, if a stage or config is not valid, or if `base` or `images_of` of a
    stage does not name an earlier stage.

    Args:
        overrides: overrides that apply to every run, in addition to those of the plan.
    """
    try:
        plan = Plan.model_validate(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    except OSError as error:
        raise ConfigError(
            f"cannot read the plan {path} ({error.strerror}): name a YAML file, such as ablations/plans/cifar10.yaml"
        ) from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a valid plan: {' '.join(str(error).split())}") from None
    plan = plan.model_copy(update={"overrides": [*plan.overrides, *overrides]})
    earlier: dict[str, Stage] = {}
    for stage in plan.stages:
        if stage.name in earlier:
            raise ConfigError(f"{path}: two stages are called {stage.name}: give each stage a different name")
        if stage.base is not None and not (stage.base in earlier and earlier[stage.base].variants):
            raise ConfigError(
                f"{path}: {stage.name} builds on {stage.base}, but no earlier stage of that name has variants: "
                "correct the key base"
            )
        if stage.images_of is not None:
            name, _, variant = stage.images_of.partition("/")
            if name not in earlier or variant not in earlier[name].variants:
                raise ConfigError(
                    f"{path}: {stage.name} trains as long as {stage.images_of}, "
                    "but no earlier stage has that variant: correct the key images_of"
                )
        earlier[stage.name] = stage
        for own in [plan.overrides, *stage.variants.values()]:
            load_config(plan.config, [*plan.overrides, *own])
            if any(override.startswith(SET_BY_STAGES) for override in own):
                raise ConfigError(
                    f"{path}: an override sets seed or training.epochs: use seeds and epochs of a stage instead"
                )
    return plan


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

    @property
    def digest(self) -> str:
        """Digest of everything that the result depends on, except the images."""
        return self._digest_with(self.config)

    def made(self, row: dict[str, Any]) -> bool:
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

    A run has one row in the file for each time that it was judged or failed. Only the last row is used. A row is
    ignored if its digest differs from that of the run in this plan.

    Args:
        path: file of the results, one JSON line each.
    """

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan, self.path = plan, path
        self.read_results()

    def read_results(self) -> None:
        """Reads the results from the file again."""
        rows = [row for row in read_rows(self.path) if isinstance(row.get("complete"), bool)]
        self._rows = {row["run"]: row for row in rows if "run" in row}

    def record(self, run: Run, result: dict[str, Any]) -> None:
        """Stores the result of a run and appends it to the file."""
        identity = {"run": run.name, "stage": run.stage.name, "variant": run.variant, "seed": run.seed}
        identity |= {"overrides": run.overrides, "digest": run.digest, "terms": run.terms}
        append_row(self.path, {**identity, **result})
        self.read_results()

    def stage(self, name: str) -> Stage:
        """Returns the plan's stage with this name."""
        return next(stage for stage in self.plan.stages if stage.name == name)

    def runs_of(self, stage: Stage) -> list[Run]:
        """Returns the runs of a stage in training order: all variants with the first seed, then with the next seed.

        Returns an empty list if a stage that this one builds on has no complete run. Raises ConfigError if the
        overrides of a variant do not give a valid config together with those of the best variants of these stages.
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
                runs.append(Run(stage, variant, seed, overrides, config, plan.judging))
        return runs

    def row_of(self, run: Run) -> dict[str, Any] | None:
        """Returns the last result of a run, complete or not; None if there is no result."""
        row = self._rows.get(run.name)
        return row if row is not None and run.made(row) else None

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
        """Returns the variant with the highest mean score over its seeds; None if no run is complete."""
        scores = {variant: statistics.mean(map(score, rows)) for variant, rows in self.complete_rows(stage).items()}
        return max(scores, key=lambda variant: scores[variant]) if scores else None


def accuracies(row: dict[str, Any]) -> tuple[float, float]:
    """Returns top-1 of k-NN and of the linear probe, in per cent.

    The protocols are the reference implementation's, or those of the config if the run was judged by them alone
    (`Plan.judging`).
    """
    named = [name for name in row["table"] if "reference's" in name] or list(row["table"])
    found = {name.split()[0]: row["table"][name]["trained"]["top1"] for name in named}
    return found["k-NN"], found["linear"]


def score(row: dict[str, Any]) -> float:
    """Returns the mean of the two `accuracies`. Variants are ranked by this score."""
    return statistics.mean(accuracies(row))
