"""Ablation plans: YAML files with stages that compare variants of a config."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from config.errors import ConfigError
from config.reading import load_config
from config.yaml_text import parse_yaml

Name = Annotated[str, Field(pattern=r"^\w+$")]
Judging = Literal["all", "config"]
OVERRIDES = "an override of the plan"  # place of a wrong key, for error messages
SET_BY_STAGES = ("seed=", "training.epochs=")


def _once_each(seeds: list[int]) -> list[int]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError("seeds are missing or repeated: give at least one seed, and each seed only once")
    return seeds


Seeds = Annotated[list[Annotated[int, Field(ge=0)]], AfterValidator(_once_each)]


class SecondLook(BaseModel):
    """Further seeds for the best variants of a stage.

    Attributes:
        seeds: seeds that these variants are trained with, in addition to those of the stage.
        within: points between the best variant's score and the lowest score that counts, after the stage's own seeds.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    seeds: Seeds
    within: float = Field(ge=0)


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
        again: further seeds for the best variants, when all variants have been trained with `seeds`; None: none.
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
    seeds: Seeds = [0]
    again: SecondLook | None = None
    judge_every: int | None = Field(default=None, ge=1)
    control: str | None = None
    keep: bool = False
    variants: dict[Name, list[str]] = {}

    @model_validator(mode="after")
    def _one_kind(self) -> "Stage":
        lengths = [name for name in ("epochs", "minutes", "images_of") if getattr(self, name) is not None]
        fits = len(lengths) == 1 if self.variants else lengths in ([], ["minutes"])
        if (self.command is None) != bool(self.variants) or not fits:
            raise ValueError(
                "give a stage either variants and exactly one of epochs, minutes and images_of, "
                "or a command and, if it needs a time limit, minutes"
            )
        if self.again:
            _once_each([*self.seeds, *self.again.seeds])
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

    Raises ConfigError if the file cannot be read, if a stage or config is not valid, if `base` or `images_of` of a
    stage does not name an earlier stage, or if a control would ignore a key of its config.

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
            load_config(plan.config, [*plan.overrides, *own], OVERRIDES)
            if any(override.startswith(SET_BY_STAGES) for override in own):
                raise ConfigError(
                    f"{path}: an override sets seed or training.epochs: use seeds and epochs of a stage instead"
                )
    _check_controls(plan, path)
    return plan


def _check_controls(plan: Plan, path: Path) -> None:
    """Raises ConfigError if a stage names no control, or if a control would ignore a key of its config."""
    controls = [(stage, stage.control) for stage in plan.stages if stage.control]
    if not controls:
        return
    from ablations.controls import check_control  # imports torch, so all other mistakes are reported before

    common = load_config(plan.config, plan.overrides, OVERRIDES)
    for stage, control in controls:
        for variant, own in stage.variants.items():
            try:
                check_control(control, load_config(plan.config, [*plan.overrides, *own], OVERRIDES), common)
            except ConfigError as error:
                raise ConfigError(f"{path}, {stage.name}/{variant}: {error}") from None
