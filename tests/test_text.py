"""Checks of docstrings and help texts: public definitions have a docstring, and no text begins like a fragment."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from config.reading import all_keys
from tests.conftest import ROOT
from tests.test_scripts import FLOORS

FRAGMENT = re.compile(r"(what|of|whether|which|how|where|by|in what)\b", re.IGNORECASE)
MEANINGS = {"key", "option", "number"}  # calls whose second argument describes a setting to the user

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Found:
    """A definition or a help text of a module: its place, and its text (None: there is none)."""

    place: str
    text: str | None


def definitions(tree: ast.AST, place: str, public: bool = True) -> Iterator[tuple[Found, bool]]:
    """Yields all definitions below `tree`, each with True if it is public.

    A definition is public if it is not inside a function, and if no name in its place begins with an underscore.
    """
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, Definition):
            yield from definitions(child, place, public)
            continue
        inner, shown = f"{place}:{child.name}", public and not child.name.startswith("_")
        yield Found(inner, ast.get_docstring(child)), shown
        yield from definitions(child, inner, shown and isinstance(child, ast.ClassDef))


def help_texts(tree: ast.AST, place: str) -> Iterator[Found]:
    """Yields the texts that users read in `--help`: the `help` arguments of calls, and the meanings of config keys."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        texts = [keyword.value for keyword in call.keywords if keyword.arg == "help"]
        if isinstance(call.func, ast.Name) and call.func.id in MEANINGS:
            texts += call.args[1:2]
        for text in texts:
            first = text.values[0] if isinstance(text, ast.JoinedStr) else text
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Found(f"{place}:{text.lineno}", first.value)


def defects(sources: dict[str, str]) -> list[str]:
    """Returns the violations in `sources`, {path: source text}: missing docstrings, and texts that are fragments.

    A method needs no docstring if a class documents a method of the same name, because it may implement that interface.
    Tests need no docstring, because their names say what they test. Empty modules need none.
    """
    trees = {path: ast.parse(source) for path, source in sources.items() if source.strip()}
    found = [(Found(path, ast.get_docstring(tree)), True) for path, tree in trees.items()]
    found += [each for path, tree in trees.items() for each in definitions(tree, path)]
    contracts = {each.place.split(":")[2] for each, _ in found if each.text and each.place.count(":") == 2}
    texts = [each for each, _ in found] + [each for path, tree in trees.items() for each in help_texts(tree, path)]
    missing = []
    for each, public in found:
        name = each.place.split(":")[-1]
        implements = each.place.count(":") == 2 and name in contracts
        if public and each.text is None and not implements and not name.startswith("test_"):
            missing.append(f"{each.place} has no docstring")
    written = ((each.place, each.text) for each in texts if each.text)
    return missing + [f"{place} begins with {text[:20]!r}" for place, text in written if FRAGMENT.match(text)]


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("x = 1", "m.py has"),
        ('"""Docs."""\ndef f(): ...', "m.py:f has"),
        ('"""Docs."""\nclass C: ...', "m.py:C has"),
        ('"""Docs."""\nclass C:\n    """Docs."""\n    def f(self): ...', "m.py:C:f has"),
        ('"""Docs."""\nif x:\n    def f(): ...', "m.py:f has"),
        ('"""What it is."""', "m.py begins"),
        ('"""Docs."""\nclass C:\n    """Docs."""\n    class D: ...', "m.py:C:D has"),
        ('"""Docs."""\ndef _f():\n    def g():\n        """\n        Of all."""', "m.py:_f:g begins"),
        ('"""Docs."""\nkey(1, "whether it runs")', "m.py:2 begins"),
        ('"""Docs."""\nadd("--x", help=f"by {y}")', "m.py:2 begins"),
    ],
)
def test_each_defect_is_found(source: str, place: str) -> None:
    (defect,) = defects({"m.py": source})
    assert defect.startswith(place)


def test_what_may_go_without_a_docstring_and_how_a_text_may_begin() -> None:
    contract = '"""Docs."""\nclass A:\n    """Docs."""\n    def f(self):\n        """Offers a result."""\n'
    implementation = 'class B:\n    """Docs."""\n    def f(self): ...\n'
    assert (
        defects(
            {"m.py": contract + implementation + "def _g():\n    def h(): ...\ndef test_i(): ...\n", "empty.py": "\n"}
        )
        == []
    )


def test_every_module_is_documented_in_sentences() -> None:
    folders = {*FLOORS, "docs", "tests"}  # other folders may hold the user's data
    paths = [path for name in folders for path in (ROOT / name).rglob("*.py")] + list(ROOT.glob("*.py"))
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    assert len(sources) > 100
    assert defects(sources) == []


def test_the_meaning_of_every_key_is_read() -> None:
    meanings = help_texts(ast.parse((ROOT / "config" / "schema.py").read_text()), "config/schema.py")
    assert {each.text for each in meanings} == {field.description for _, field, _ in all_keys()}
