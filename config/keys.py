"""Keys of the configs of all programs: their descriptions, digests and differences.

A `schema` is the class of a program's config. A key's name is dotted, as in training.epochs.
"""

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from config.schema import Config, RunConfig, Section


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


def nearest_key(schema: type[RunConfig], name: str) -> str | None:
    """Returns the key whose last part is spelled most like that of `name`: in the same section, else in any section."""
    section, _, last = name.rpartition(".")
    known = [dotted.rpartition(".") for dotted, _, _ in all_keys(schema)]
    known += [("", "", part) for part in schema.model_fields]
    for candidates in ([key for key in known if key[0] == section], known):
        near = difflib.get_close_matches(last, [key[2] for key in candidates], n=1)
        if near:
            return "".join(next(key for key in candidates if key[2] == near[0])).removeprefix(".")
    return None


def example_of(schema: type[RunConfig], section: str) -> str:
    """Returns a key of the section with its default, as key=default."""
    inside = (key for key in all_keys(schema) if key[0].startswith(f"{section}.") and key[1].default is not None)
    name, field, _ = next(inside)
    return f"{name}={field.default}"


def type_of(schema: type[RunConfig], name: str) -> Any:
    """Returns the type of a key or section; None if there is no such key or section."""
    found: Any = schema
    for part in name.split("."):
        fields = found.model_fields if isinstance(found, type) and issubclass(found, Section) else {}
        found = fields[part].annotation if part in fields else None
    return found


def _value(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def flat(config: RunConfig) -> dict[str, Any]:
    """Returns the value of every key by its dotted name."""
    return {name: _value(config, name) for name, _, _ in all_keys(type(config))}


def portable(config: Config) -> Config:
    """Returns the config without what belongs to one machine: it names no paths.

    Run keys get their defaults, except `sampling`, `evaluation` and `views.probe`, which describe the use of the model.
    A run key whose default would make the config invalid keeps its value.
    """
    for name, field, run in all_keys():
        if run and not name.startswith(("sampling.", "evaluation.", "views.probe.")):
            raw = config.model_dump()
            *sections, last = name.split(".")
            reduce(dict.__getitem__, sections, raw)[last] = field.default
            with suppress(ValidationError):
                config = Config.model_validate(raw)
    return config


def result_digest(config: RunConfig, without: tuple[str, ...] = (), also: str = "") -> str:
    """Returns a digest of the keys that the table of accuracies depends on, with data.root and all of `evaluation`.

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


def experiment_digest(config: RunConfig) -> str:
    """Returns a digest of all experiment keys, those that must agree when a run resumes."""
    values = {name: _value(config, name) for name, _, run in all_keys(type(config)) if not run}
    return hashlib.blake2b(yaml.safe_dump(values).encode(), digest_size=16).hexdigest()


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
