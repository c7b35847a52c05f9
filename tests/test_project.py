"""Metadata of the project: requirement files, version, and an installation beside other packages."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def required(name: str) -> list[str]:
    """Returns the requirements in a file, without comments and other files."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("-r ")]


def test_requirements_are_the_same_in_all_files() -> None:
    project = PROJECT["project"]
    assert project["dependencies"] == required("requirements.txt")
    extras = project["optional-dependencies"]
    assert extras == {"extra": required("requirements-extra.txt"), "dev": required("requirements-dev.txt")}
    locked = dict(line.split("==") for line in required("requirements.lock"))
    direct = {re.split(r"[><=]", line)[0] for line in required("requirements.txt")}
    assert direct <= locked.keys() and len(locked) > len(direct)


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_project_installs_no_module() -> None:
    assert PROJECT["tool"]["setuptools"] == {"packages": [], "py-modules": []}


def test_the_code_runs_where_another_package_is_called_datasets(tmp_path: Path) -> None:
    """From the checkout, `datasets` is this repository's. Elsewhere, it is another package, such as Hugging Face's."""
    other = tmp_path / "site" / "datasets"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("OTHER = True\n")
    code = "import datasets; print(getattr(datasets, 'OTHER', False))"
    for folder, expected in ((ROOT, "False"), (tmp_path, "True")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected
