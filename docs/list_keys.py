"""Writes docs/config.md, the list of all keys of the configs, from their schemas.

python -m docs.list_keys
"""

import argparse
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml

from config.finetune_schema import FinetuneConfig
from config.keys import all_keys
from config.schema import Config, RunConfig
from config.yaml_text import takes_text

HEADER = """\
# Keys of the configs

Written by `python -m docs.list_keys` from `config/schema.py` and `config/finetune_schema.py`. Each key can be set in a
config file or on the command line, as `training.epochs=200`. A run that resumes must have the same values, except those
of keys marked *, and `training.epochs`, which may change if the learning rate allows it.
"""


def kind_of(annotation: Any) -> str:
    """Returns a short description of the type of a key."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(inside[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in _choices(annotation))
    if origin in (Union, UnionType):
        return " or ".join("null" if each is NoneType else kind_of(each) for each in inside)
    if origin is list:
        return f"list of {kind_of(inside[0])}"
    names = {bool: "true or false", int: "integer", float: "number"}
    return "text" if takes_text(annotation) else names[annotation]


def _choices(annotation: Any) -> list[str]:
    """Returns the words of a Literal, which may contain other Literals."""
    return [choice for each in get_args(annotation) for choice in (_choices(each) if get_origin(each) else [each])]


def limits_of(field: Any) -> str:
    """Returns the limits of a number or of a length, such as `> 0, <= 1`."""
    found = []
    for bound in (*field.metadata, *_inner_metadata(field.annotation)):
        for kind, sign, name in (
            (annotated_types.Ge, ">=", "ge"),
            (annotated_types.Gt, ">", "gt"),
            (annotated_types.Le, "<=", "le"),
            (annotated_types.Lt, "<", "lt"),
            (annotated_types.MultipleOf, "multiple of", "multiple_of"),
        ):
            if isinstance(bound, kind):
                found.append(f"{sign} {getattr(bound, name):g}")
    return ", ".join(dict.fromkeys(found))


def _inner_metadata(annotation: Any) -> list[Any]:
    """Returns the bounds inside an annotation: those of the items of a list, or of a value that may be null."""
    found = list(getattr(annotation, "__metadata__", ()))
    for field_info in list(found):
        found += getattr(field_info, "metadata", [])
    return found + [bound for inside in get_args(annotation) if inside is not NoneType for bound in _bounds(inside)]


def _bounds(annotation: Any) -> list[Any]:
    return _inner_metadata(annotation) if get_origin(annotation) in (Annotated, list, Union, UnionType) else []


def table(schema: type[RunConfig], without: type[RunConfig] | None = None) -> list[str]:
    """Returns the lines of a table of a schema's keys.

    Args:
        without: schema whose keys are left out if they are the same.
    """
    known = (
        {name: (str(field.annotation), field.default, field.description) for name, field, _ in all_keys(without)}
        if without
        else {}
    )
    lines = ["| key | type | limits | default | meaning |", "|---|---|---|---|---|"]
    for name, field, run in all_keys(schema):
        if known.get(name) == (str(field.annotation), field.default, field.description):
            continue
        default = yaml.safe_dump(field.default, default_flow_style=True).removesuffix("\n...\n").strip()
        cells = (
            f"`{name}`{' *' if run else ''}",
            kind_of(field.annotation),
            limits_of(field),
            f"`{default}`",
            field.description,
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def page() -> str:
    """Returns the text of docs/config.md."""
    parts = [HEADER, "## train.py, test.py, sample.py and embed.py\n", *table(Config), "\n## finetune.py\n"]
    parts += ["Keys that differ from those above. The sections `data`, `encoder` and `distributed` are the same.\n"]
    return "\n".join([*parts, *table(FinetuneConfig, without=Config), ""])


def main(argv: list[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("config.md"), help="file to write")
    parser.parse_args(argv).out.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
