"""Functions that read, override, check and compare configs."""

import difflib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from config.errors import ConfigError
from config.schema import Config, Section


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 does. It raises ConfigError if a key is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [self.construct_object(name) for name, _ in node.value if name.tag != "tag:yaml.org,2002:merge"]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: key {name!r} is given twice: remove one of them")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """Returns the plain values in a YAML text. Numbers such as 1e-4 are read as in YAML 1.2.

    Raises ConfigError if the text is not valid YAML or gives a key twice.

    Args:
        where: origin of the text, for the error message.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 0x_; RecursionError: deep nesting
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}, {error}") from None


def all_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yields (dotted name, pydantic field, True for a run key) of every key, in the order of the schema."""
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from all_keys(annotation, f"{prefix}{name}.")
        else:
            extra: Any = field.json_schema_extra
            yield prefix + name, field, section.all_run or extra["run"]


def describe_keys() -> str:
    """Returns a text for `--help`, one line per key: default, a * if it may change on resume, meaning."""
    lines = ["config keys, as key=default (train.py can resume a run with another value of a key marked *):"]
    for name, field, run in all_keys():
        default = yaml.safe_dump(field.default, default_flow_style=True).removesuffix("\n...\n").strip()
        choices = f" ({' | '.join(get_args(field.annotation))})" if get_origin(field.annotation) is Literal else ""
        lines.append(f"  {name}={default}{' *' if run else ''}  {field.description}{choices}")
    return "\n".join(lines)


def _nearest_key(name: str) -> str | None:
    """Returns the key whose last part is spelled most like that of `name`: in the same section, else in any section."""
    section, _, last = name.rpartition(".")
    known = [dotted.rpartition(".") for dotted, _, _ in all_keys()]
    known += [("", "", part) for part in Config.model_fields]
    for candidates in ([key for key in known if key[0] == section], known):
        near = difflib.get_close_matches(last, [key[2] for key in candidates], n=1)
        if near:
            return "".join(next(key for key in candidates if key[2] == near[0])).removeprefix(".")
    return None


def _an_example(section: str) -> str:
    """Returns a key of the section with its default, as key=default."""
    name, field, _ = next(key for key in all_keys() if key[0].startswith(f"{section}."))
    return f"{name}={field.default}"


def _explain(error: ValidationError) -> str:
    messages = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"] if not isinstance(part, int))
        if item["type"] == "extra_forbidden":
            near = _nearest_key(name)
            hint = f"did you mean {near}?" if near else "`train.py --help` lists the keys"
            messages.append(f"unknown key {name}: {hint}")
        elif item["type"] == "value_error":
            messages.append(": ".join(filter(None, [name, str(item["ctx"]["error"])])))
        elif item["type"] == "model_type":
            messages.append(f"{name} is a section, not a value: set its keys, as in {_an_example(name)}")
        else:
            messages.append(f"{name}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}")
    return "; ".join(dict.fromkeys(messages))


def _validate(raw: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from None


def _unshared(node: Any) -> Any:
    """Returns a copy that shares no sections through YAML aliases, so that an override changes only one section."""
    return {name: _unshared(value) for name, value in node.items()} if isinstance(node, dict) else node


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Returns the config in a YAML file, with `key=value` overrides applied.

    Raises ConfigError if the file cannot be read, or if a key or value is wrong.
    """
    path = Path(path)
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        there = ", ".join(sorted(str(p) for p in Path("config").glob("*.yaml")))
        raise ConfigError(f"no config file {path}" + (f": choose one of {there}" if there else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a config file: it needs lines of the form `key: value`")
    try:
        raw = _unshared(raw)
    except RecursionError:
        raise ConfigError(f"{path} has a YAML alias that refers to itself: remove it") from None
    config = _override(raw, overrides or [], str(path))
    if not config.output_dir:
        config = config.model_copy(update={"output_dir": str(Path("runs") / (path.stem.strip(".") or "run"))})
    return config


def override(config: Config, overrides: list[str], where: str) -> Config:
    """Returns a copy of `config` with `key=value` overrides applied. Raises ConfigError if one of them is wrong.

    Args:
        where: origin of `config`, for the error message.
    """
    return _override(parse_yaml(config.to_yaml(), where), overrides, where)


def _override(raw: dict[str, Any], overrides: list[str], where: str) -> Config:
    for change in overrides:
        name, separator, value = change.partition("=")
        if not separator or not name:
            raise ConfigError(f"cannot read {change!r}: overrides are written key=value, as in training.epochs=2")
        *sections, last = name.split(".")
        target = raw
        for section in sections:
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):
                raise ConfigError(f"unknown key {name}: {section} is not a section (train.py --help lists the keys)")
        target[last] = parse_yaml(value, f"the value of {name}")
    return _validate(raw, where)


def parse_config(text: str, where: str) -> Config:
    """Returns the config in a YAML text that `Config.to_yaml` wrote, for example in a checkpoint.

    Raises ConfigError if a key or value is wrong.

    Args:
        where: origin of the text, for the error message.
    """
    return _validate(parse_yaml(text, where), where)


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def flat(config: Config) -> dict[str, Any]:
    """Returns the value of every key by its dotted name."""
    return {name: _value(config, name) for name, _, _ in all_keys()}


def result_digest(config: Config, without: tuple[str, ...] = (), also: str = "") -> str:
    """Returns a digest of all keys that the table of accuracies depends on, including data.root.

    Keys that have their default value are left out, so that results stay valid when the schema gets a new key.

    Args:
        without: names of keys that are left out.
        also: text that the digest includes as well.
    """
    judged_by = ("data.root", "views.probe.", "evaluation.", "training.micro_batch_size")
    kept = {name for name, _, run in all_keys() if not run or name.startswith(judged_by)}.difference(without)
    defaults = flat(Config())
    values = {name: value for name, value in flat(config).items() if name in kept and value != defaults.get(name)}
    return hashlib.blake2b((yaml.safe_dump(values) + also).encode(), digest_size=16).hexdigest()


def differences(
    old: Config, new: Config, *, run: bool, prefixes: tuple[str, ...] = ("",)
) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (old value, new value)} of the keys that differ.

    Args:
        run: True compares the run keys, False the experiment keys.
        prefixes: only keys whose names begin with one of them are compared.
    """
    return {
        name: (_value(old, name), _value(new, name))
        for name, _, is_run in all_keys()
        if name.startswith(prefixes) and is_run == run and _value(old, name) != _value(new, name)
    }
