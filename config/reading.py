"""Functions that read, override and check configs.

Each function works for the configs of all programs. A `schema` is the class of a program's config.
"""

import difflib
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from config.errors import ConfigError
from config.finetune_schema import FinetuneConfig
from config.keys import example_of, nearest_key, type_of
from config.schema import Config, RunConfig
from config.yaml_text import parse_yaml, takes_text

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=RunConfig)

MAX_PLACES = 3  # number of overrides that a message names

COMMAND_LINE = "the command line"


def _explain(schema: type[RunConfig], error: ValidationError, where: str, changes: Mapping[str, str]) -> str:
    """Returns all errors in a config with their places, in one line.

    Args:
        where: origin of the config.
        changes: place of each override, by its key.
    """
    by_place: dict[str, list[str]] = {}
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
        if item["type"] == "extra_forbidden":
            near = nearest_key(schema, name)
            hint = f"did you mean {near}?" if near else f"`{schema.program} --help` lists the keys"
            message = f"unknown key {name}: {hint}"
        elif item["type"] == "value_error":
            message = ": ".join(filter(None, [name, str(item["ctx"]["error"])]))
        elif item["type"] == "model_type":
            message = f"{name} is a section, not a value: set its keys, as in {example_of(schema, name)}"
        else:
            message = f"{name}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"
        if name:
            related = [key for key in changes if f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.")]
            place = changes[related[-1]] if related else where
        else:  # several keys contradict each other
            related = [key for key in changes if re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", message)]
            places = [changes[key] for key in related or changes]
            if len(places) > MAX_PLACES:
                places = [places[0].partition(" (")[0]]  # the command line, without its overrides
            place = " and ".join([where, *places])
        by_place.setdefault(place, []).append(message)
    return "; ".join(f"{place}: {'; '.join(dict.fromkeys(messages))}" for place, messages in by_place.items())


def _validate(schema: type[C], raw: dict[str, Any], where: str, changes: Mapping[str, str] = MappingProxyType({})) -> C:
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(schema, error, where, changes)) from None


def _check_program(schema: type[RunConfig], raw: dict[str, Any], where: str, overrides: Collection[str] = ()) -> None:
    """Raises ConfigError if the keys `raw` of a config file are those of another program than that of `schema`."""
    for other in (Config, FinetuneConfig):
        foreign = [name for name in other.model_fields if name in raw and name not in schema.model_fields]
        if foreign:
            raise ConfigError(
                f"{where} is for {other.program}, because it has the key {foreign[0]}: run {other.program} with it, or "
                f"give {schema.program} another one"
            )
    given = [*raw, *(override.partition("=")[0] for override in overrides)]
    if schema.marker and schema.marker not in given:
        raise ConfigError(
            f"{where} is not for {schema.program}, because it has no key {schema.marker}: add this key, or give "
            f"{schema.program} another one"
        )


def _unshared(node: Any) -> Any:
    """Returns a copy that shares no sections through YAML aliases, so that an override changes only one section."""
    return {name: _unshared(value) for name, value in node.items()} if isinstance(node, dict) else node


def load_config(path: str | Path, overrides: list[str] | None = None, place: str = COMMAND_LINE) -> Config:
    """Returns the config of train.py in a YAML file, as `load` does."""
    return load(Config, path, overrides, place)


def load(schema: type[C], path: str | Path, overrides: list[str] | None = None, place: str = COMMAND_LINE) -> C:
    """Returns the config in a YAML file, with `key=value` overrides applied.

    Raises ConfigError if the file cannot be read, if it is for another program, or if a key or value is wrong.

    Args:
        place: origin of the overrides, for the error message.
    """
    path = Path(path)
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"), str(path), schema)
    except FileNotFoundError:
        there = {file.stem: str(file) for file in sorted(Path("config").glob("*.yaml"))}
        near = difflib.get_close_matches(path.stem, there, n=1)
        listing = f": choose one of {', '.join(there.values())}" if there else ""
        advice = f": did you mean {there[near[0]]}?" if near else listing
        raise ConfigError(f"no config file {path}{advice}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a config file: it needs lines of the form `key: value`")
    _check_program(schema, raw, str(path), overrides or ())
    try:
        raw = _unshared(raw)
    except RecursionError:
        raise ConfigError(f"{path} has a YAML alias that refers to itself: remove it") from None
    config = _override(schema, raw, overrides or [], str(path), place)
    if config.output_dir:
        return config
    return _validate(schema, config.model_dump() | {"output_dir": str(_run_folder(path) / config.run_name)}, str(path))


def _run_folder(config: Path) -> Path:
    r"""Returns the default output_dir of a config file. Bytes of its name that are not text are written as \xe9."""
    name = os.fsencode(config.stem.strip(".") or "run").decode(sys.getfilesystemencoding(), "backslashreplace")
    folder = Path("runs") / name
    if config.stem.strip(".") not in ("", name):
        logger.info("output_dir is %s, because the name of the config file is not valid text", folder)
    return folder


def override(config: C, overrides: list[str], where: str) -> C:
    """Returns a copy of `config` with `key=value` overrides applied. Raises ConfigError if one of them is wrong.

    Args:
        where: origin of `config`, for the error message.
    """
    schema = type(config)
    return _override(schema, parse_yaml(config.to_yaml(), where, schema), overrides, where, COMMAND_LINE)


def _override(schema: type[C], raw: dict[str, Any], overrides: list[str], where: str, place: str) -> C:
    changes = {}
    for change in overrides:
        name, separator, value = change.partition("=")
        changes[name] = here = f"{place} ({ascii(change)[1:-1] if not change.isprintable() else change})"
        if not separator or not name:
            raise ConfigError(f"{here}: overrides are written key=value, as in training.epochs=2")
        *sections, last = name.split(".")
        target = raw
        for section in sections:
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):
                raise ConfigError(
                    f"{here}: unknown key {name}: {section} is not a section ({schema.program} --help lists the keys)"
                )
        target[last] = _parse_value(value, here, type_of(schema, name))
    return _validate(schema, raw, where, changes)


def _parse_value(typed: str, where: str, value_type: Any) -> Any:
    """Returns the value of a type that a command line gives. Text is taken as it is typed."""
    if not takes_text(value_type):
        return parse_yaml(typed, where, value_type)
    return None if typed == "null" and NoneType in get_args(value_type) else typed


def to_words(values: dict[str, Any]) -> str:
    """Returns {key: value} of a config of train.py as arguments of a command, key=value, quoted for a shell."""
    words = {
        name: value if takes_text(type_of(Config, name)) and value is not None else json.dumps(value)
        for name, value in values.items()
    }
    return " ".join(shlex.quote(f"{name}={word}") for name, word in words.items())


def parse_config(text: str, where: str) -> Config:
    """Returns the config of train.py in a YAML text, as `parse` does."""
    return parse(Config, text, where)


def parse(schema: type[C], text: str, where: str) -> C:
    """Returns the config in a YAML text that `to_yaml` wrote, for example in a checkpoint.

    Raises ConfigError if the text is for another program, or if a key or value is wrong.

    Args:
        where: origin of the text, for the error message.
    """
    raw = parse_yaml(text, where, schema)
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} is not a config: it needs lines of the form `key: value`")
    keys = set(raw)
    for other in (Config, FinetuneConfig):
        if keys <= other.model_fields.keys() and not keys <= schema.model_fields.keys():
            raise ConfigError(f"{where} belongs to {other.program}: use a file of {schema.program}")
    return _validate(schema, raw, where)
