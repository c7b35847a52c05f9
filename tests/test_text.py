"""Checks of docstrings and help texts: public definitions have a docstring, and no text begins like a fragment."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from config.finetune_schema import FinetuneConfig
from config.keys import all_keys
from config.schema import Config
from tests.conftest import ROOT
from tests.test_scripts import FLOORS

FRAGMENT = re.compile(r"(what|of|whether|which|how|where|by|in what)\b", re.IGNORECASE)
MEANINGS = {"key", "option", "number"}  # calls whose second argument describes a setting to the user

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Found:
    """A module, class or function.

    Attributes:
        place: path of the module and names of the definitions, separated by colons.
        docstring: None if there is none.
        public: True if it is not inside a function, and if no name in its place begins with an underscore.
        bases: last part of the name of each base class.
    """

    place: str
    docstring: str | None
    public: bool = True
    bases: list[str] = field(default_factory=list)


def definitions(tree: ast.AST, place: str, public: bool = True) -> Iterator[Found]:
    """Yields all classes and functions below `tree`."""
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, Definition):
            yield from definitions(child, place, public)
            continue
        inner, shown = f"{place}:{child.name}", public and not child.name.startswith("_")
        bases = [re.sub(r"\[.*", "", ast.unparse(base)).split(".")[-1] for base in getattr(child, "bases", [])]
        yield Found(inner, ast.get_docstring(child), shown, bases)
        yield from definitions(child, inner, shown and isinstance(child, ast.ClassDef))


def help_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields line and beginning of the texts that users read in `--help`.

    They are the `help` arguments of calls, and the meanings of config keys and options. A text may be put together by
    `+`. For a text that does not begin with a string, its source code is yielded.
    """
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        texts = [keyword.value for keyword in call.keywords if keyword.arg == "help"]
        if isinstance(call.func, ast.Name) and call.func.id in MEANINGS:
            texts += call.args[1:2]
        for text in texts:
            first: ast.expr = text
            while isinstance(first, ast.BinOp | ast.JoinedStr):
                first = first.left if isinstance(first, ast.BinOp) else first.values[0]
            is_text = isinstance(first, ast.Constant) and isinstance(first.value, str)
            yield text.lineno, str(first.value) if is_text else ast.unparse(text)  # type: ignore[attr-defined]


def is_documented(owner: Found, name: str, found: dict[str, Found]) -> bool:
    """Returns True if the class `owner` or one of its base classes documents the method `name`.

    A base class is known by its name only, so it may be in any module.
    """
    method = found.get(f"{owner.place}:{name}")
    if method and method.docstring:
        return True
    bases = [each for each in found.values() if each.place.split(":")[-1] in owner.bases]
    return any(is_documented(base, name, found) for base in bases)


def defects(sources: dict[str, str]) -> list[str]:
    """Returns the violations in `sources`, {path: source text}: missing docstrings, and texts that are fragments.

    Tests need no docstring, because their names say what they test. Empty modules need none.
    """
    trees = {path: ast.parse(source) for path, source in sources.items() if source.strip()}
    modules = [Found(path, ast.get_docstring(tree)) for path, tree in trees.items()]
    found = [each for path, tree in trees.items() for each in definitions(tree, path)]
    by_place = {each.place: each for each in found}
    missing = []
    for each in [*modules, *found]:
        owner, _, name = each.place.rpartition(":")
        is_test = owner.startswith("tests/") and name.startswith("test_")
        inherits = owner in by_place and is_documented(by_place[owner], name, by_place)
        if each.public and not (each.docstring or inherits or is_test):
            missing.append(f"{each.place} has no docstring")
    texts = [(each.place, each.docstring) for each in [*modules, *found] if each.docstring]
    texts += [(f"{path}:{line}", text) for path, tree in trees.items() for line, text in help_texts(tree)]
    return missing + [f"{place} begins with {text[:20]!r}" for place, text in texts if FRAGMENT.match(text)]


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("x = 1", "m.py has"),
        ('"""Docs."""\ndef f(): ...', "m.py:f has"),
        ('"""Docs."""\ndef test_f(): ...', "m.py:test_f has"),
        ('"""Docs."""\nclass C: ...', "m.py:C has"),
        ('"""Docs."""\nclass C:\n    """Docs."""\n    def f(self): ...', "m.py:C:f has"),
        ('"""Docs."""\nclass C(nn.Module):\n    """Docs."""\n    def forward(self): ...', "m.py:C:forward has"),
        ('"""Docs."""\nif x:\n    def f(): ...', "m.py:f has"),
        ('"""Docs."""\nclass C:\n    """Docs."""\n    class D: ...', "m.py:C:D has"),
        ('"""What it is."""', "m.py begins"),
        ('"""Docs."""\ndef _f():\n    def g():\n        """\n        Of all."""', "m.py:_f:g begins"),
        ('"""Docs."""\nkey(1, "whether it runs")', "m.py:2 begins"),
        ('"""Docs."""\nadd("--x", help=f"by {y}")', "m.py:2 begins"),
        ('"""Docs."""\nadd("--x", help="how it " + (y if z else ""))', "m.py:2 begins"),
    ],
)
def test_each_defect_is_found(source: str, place: str) -> None:
    (defect,) = defects({"m.py": source})
    assert defect.startswith(place)


def test_what_may_go_without_a_docstring_and_how_a_text_may_begin() -> None:
    interface = '"""Docs."""\nclass A:\n    """Docs."""\n    def f(self):\n        """Offers a result."""\n'
    implementations = 'class B(m.A[int]):\n    """Docs."""\n    def f(self): ...\nclass _C(B):\n    def f(self): ...\n'
    nested = "def _g():\n    def h(): ...\n"
    test = '"""Docs."""\ndef test_f(): ...\n'
    sources = {"m.py": interface + implementations + nested, "empty.py": "\n", "tests/test_m.py": test}
    assert defects(sources) == []


def test_every_module_is_documented_in_sentences() -> None:
    folders = {*FLOORS, "docs", "tests"}  # other folders may hold the user's data
    paths = [path for name in folders for path in (ROOT / name).rglob("*.py")] + list(ROOT.glob("*.py"))
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    assert len(sources) > 100
    assert defects(sources) == []


def test_the_meaning_of_every_key_is_read() -> None:
    sources = [(ROOT / "config" / name).read_text() for name in ("schema.py", "finetune_schema.py")]
    meanings = {text for source in sources for _, text in help_texts(ast.parse(source))}
    assert meanings == {field.description for schema in (Config, FinetuneConfig) for _, field, _ in all_keys(schema)}
