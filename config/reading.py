"""Functions that read, override, check and compare configs.

Each function works for the configs of all programs. A `schema` is the class of a program's config.
"""

import difflib
import hashlib
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import reduce
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from config.errors import ConfigError
from config.finetune_schema import FinetuneConfig
from config.schema import Config, RunConfig, Section

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=RunConfig)

MAX_PLACES = 3  # number of overrides that a message names

INT, FLOAT, BOOL, NULL, TEXT, TIMESTAMP, MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null", "str", "timestamp", "merge")
)


COMMAND_LINE = "the command line"


class _Loader(yaml.SafeLoader):
    """SafeLoader whose numbers are decimal and whose keys are text. It raises ConfigError if a key is given twice.

    YAML 1.1 reads 010 as 8, 1:30 as 90, 2026-11-25 as a date, and 1e-4 as text. Here, 010 is 10, 1e-4 is a number, and
    the other two are text. YAML 1.1 also reads the keys `on` and `no` as true and false.
    """

    # For each first character of a value, (tag, pattern) of the types that the value may have.
    yaml_implicit_resolvers = {  # noqa: RUF012 (as in yaml)
        first: [(tag, pattern) for tag, pattern in types if tag not in (INT, FLOAT, TIMESTAMP)]
        for first, types in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Returns the next mapping. Merges are still separate entries here, so they count as no repetition."""
        node = super().compose_mapping_node(anchor)
        node.value = [
            (_as_text(name) if name.tag in (INT, FLOAT, BOOL, NULL) else name, value) for name, value in node.value
        ]
        names = [name.value for name, _ in node.value if name.tag != MERGE]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: key {name!r} is given twice: remove one of them")
        return node


_Loader.add_implicit_resolver(INT, re.compile(r"^[-+]?[0-9]+(_[0-9]+)*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    FLOAT, re.compile(r"^[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"), list("-+.0123456789")
)
_Loader.add_constructor(INT, lambda _, node: int(node.value))
_Loader.add_constructor(FLOAT, lambda _, node: float(node.value))


def parse_yaml(text: str, where: str, value_type: Any = Any) -> Any:
    """Returns the plain values in a YAML text. Numbers are decimal, as 010 (ten) and 1e-4.

    Raises ConfigError if the text is not valid YAML or gives a key twice.

    Args:
        where: origin of the text, for the error message.
        value_type: type of the value. If it is a section of the config, keys that take text keep values that look like
            numbers as they are written, as in `output_dir: 010`.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(_with_text(node, value_type))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # RecursionError: deep nesting
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}, {error}") from None


def _with_text(node: yaml.Node, value_type: Any) -> yaml.Node:
    """Returns a YAML node, or text in its place if it is a number or a bool and the type `value_type` takes text.

    Changes the values of a mapping in the same way if `value_type` is a section.
    """
    is_section = isinstance(value_type, type) and issubclass(value_type, Section)
    if is_section and isinstance(node, yaml.MappingNode):
        types = {name: field.annotation for name, field in value_type.model_fields.items()} | {"<<": value_type}
        node.value = [(name, _with_text(value, types.get(str(name.value)))) for name, value in node.value]
    elif is_section and isinstance(node, yaml.SequenceNode):  # sections to merge
        node.value = [_with_text(each, value_type) for each in node.value]
    elif node.tag in (INT, FLOAT, BOOL) and takes_text(value_type):
        return _as_text(node)
    return node


def _as_text(node: yaml.Node) -> yaml.ScalarNode:
    return yaml.ScalarNode(TEXT, node.value, node.start_mark, node.end_mark)


def takes_text(value_type: Any) -> bool:
    """Returns True if values of this type are text, or one of several words, or either of these or null."""
    origin, inside = get_origin(value_type), get_args(value_type)
    if origin is Literal:
        return all(isinstance(choice, str) for choice in inside)
    if origin is Annotated:
        return takes_text(inside[0])
    if origin in (Union, UnionType):
        return all(takes_text(each) for each in inside if each is not NoneType)
    return value_type is str


def all_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yields (dotted name, pydantic field, True for a run key) of every key, in the order of the schema."""
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from all_keys(annotation, f"{prefix}{name}.")
        else:
            extra: Any = field.json_schema_extra
            yield prefix + name, field, section.all_run or extra["run"]


def describe_keys(schema: type[RunConfig] = Config) -> str:
    """Returns a text for `--help`, one line per key: default, a * if it may change on resume, meaning."""
    lines = [f"config keys, as key=default ({schema.program} can resume a run with another value of a key marked *):"]
    for name, field, run in all_keys(schema):
        default = yaml.safe_dump(field.default, default_flow_style=True).removesuffix("\n...\n").strip()
        choices = f" ({' | '.join(get_args(field.annotation))})" if get_origin(field.annotation) is Literal else ""
        lines.append(f"  {name}={default}{' *' if run else ''}  {field.description}{choices}")
    return "\n".join(lines)


def _nearest_key(schema: type[RunConfig], name: str) -> str | None:
    """Returns the key whose last part is spelled most like that of `name`: in the same section, else in any section."""
    section, _, last = name.rpartition(".")
    known = [dotted.rpartition(".") for dotted, _, _ in all_keys(schema)]
    known += [("", "", part) for part in schema.model_fields]
    for candidates in ([key for key in known if key[0] == section], known):
        near = difflib.get_close_matches(last, [key[2] for key in candidates], n=1)
        if near:
            return "".join(next(key for key in candidates if key[2] == near[0])).removeprefix(".")
    return None


def _an_example(schema: type[RunConfig], section: str) -> str:
    """Returns a key of the section with its default, as key=default."""
    name, field, _ = next(key for key in all_keys(schema) if key[0].startswith(f"{section}."))
    return f"{name}={field.default}"


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
            near = _nearest_key(schema, name)
            hint = f"did you mean {near}?" if near else f"`{schema.program} --help` lists the keys"
            message = f"unknown key {name}: {hint}"
        elif item["type"] == "value_error":
            message = ": ".join(filter(None, [name, str(item["ctx"]["error"])]))
        elif item["type"] == "model_type":
            message = f"{name} is a section, not a value: set its keys, as in {_an_example(schema, name)}"
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


def _check_program(schema: type[RunConfig], raw: dict[str, Any], where: str) -> None:
    """Raises ConfigError if the keys `raw` of a config are those of another program than that of `schema`."""
    for other in (Config, FinetuneConfig):
        foreign = [name for name in other.model_fields if name in raw and name not in schema.model_fields]
        if foreign:
            raise ConfigError(
                f"{where} is for {other.program}, because it has the key {foreign[0]}: run {other.program} with it, or "
                f"give {schema.program} another one"
            )
    if schema.marker and schema.marker not in raw:
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
        there = ", ".join(sorted(str(p) for p in Path("config").glob("*.yaml")))
        raise ConfigError(f"no config file {path}" + (f": choose one of {there}" if there else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a config file: it needs lines of the form `key: value`")
    _check_program(schema, raw, str(path))
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
        target[last] = _parse_value(value, here, _type_of(schema, name))
    return _validate(schema, raw, where, changes)


def _type_of(schema: type[RunConfig], name: str) -> Any:
    """Returns the type of a key or section; None if there is no such key or section."""
    found: Any = schema
    for part in name.split("."):
        fields = found.model_fields if isinstance(found, type) and issubclass(found, Section) else {}
        found = fields[part].annotation if part in fields else None
    return found


def _parse_value(typed: str, where: str, value_type: Any) -> Any:
    """Returns the value of a type that a command line gives. Text is taken as it is typed."""
    if not takes_text(value_type):
        return parse_yaml(typed, where, value_type)
    return None if typed == "null" and NoneType in get_args(value_type) else typed


def to_words(values: dict[str, Any], schema: type[RunConfig] = Config) -> str:
    """Returns {key: value} as arguments of a command, key=value, quoted for a shell."""
    words = {
        name: value if takes_text(_type_of(schema, name)) and value is not None else json.dumps(value)
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
    if isinstance(raw, dict):
        _check_program(schema, raw, where)
    return _validate(schema, raw, where)


def _value(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def flat(config: RunConfig) -> dict[str, Any]:
    """Returns the value of every key by its dotted name."""
    return {name: _value(config, name) for name, _, _ in all_keys(type(config))}


def without_run_keys(config: Config) -> Config:
    """Returns the config with the default of every run key: it defines the same experiment and names no paths.

    A run key keeps its value if its default contradicts an experiment key. `sampling.num_sampling_steps` does so if
    there are few timesteps.
    """
    for name, field, run in all_keys():
        if run:
            raw = config.model_dump()
            *sections, last = name.split(".")
            reduce(dict.__getitem__, sections, raw)[last] = field.default
            with suppress(ValidationError):
                config = Config.model_validate(raw)
    return config


def result_digest(config: RunConfig, without: tuple[str, ...] = (), also: str = "") -> str:
    """Returns a digest of all keys that the table of accuracies depends on, including data.root.

    Args:
        without: names of keys that are left out.
        also: text that the digest includes as well.
    """
    judged_by = (
        *("data.root", "data.labels", "encoder.weights", "decoder.weights"),
        *("views.probe.", "evaluation.", "training.micro_batch_size", "labelled", "unlabelled"),
    )
    keys = all_keys(type(config))
    kept = {name for name, _, run in keys if not run or name.startswith(judged_by)}.difference(without)
    values = {name: value for name, value in flat(config).items() if name in kept}
    return hashlib.blake2b((yaml.safe_dump(values) + also).encode(), digest_size=16).hexdigest()


def differences(
    old: RunConfig, new: RunConfig, *, run: bool, prefixes: tuple[str, ...] = ("",)
) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (old value, new value)} of the keys of `old` that differ in `new`.

    Args:
        run: True compares the run keys, False the experiment keys.
        prefixes: only keys whose names begin with one of them are compared.
    """
    return {
        name: (_value(old, name), _value(new, name))
        for name, _, is_run in all_keys(type(old))
        if name.startswith(prefixes) and is_run == run and _value(old, name) != _value(new, name)
    }
