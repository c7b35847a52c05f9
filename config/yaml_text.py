"""Reading of YAML texts into plain values."""

import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from config.errors import ConfigError
from config.schema import Section

INT, FLOAT, BOOL, NULL, TEXT, TIMESTAMP, MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null", "str", "timestamp", "merge")
)


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
