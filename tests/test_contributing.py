"""The examples in CONTRIBUTING.md: each is applied to a copy of the repository, and its command is run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY_RUN

EXAMPLES = re.findall(
    r"^### (.+?)\n.*?```diff\n(.*?)```\n\n```bash\n(.*?)\n```", (ROOT / "CONTRIBUTING.md").read_text(), re.S | re.M
)
EXPECTED = {
    "A noise schedule": "schedule: sigmoid",
    "An encoder": "architecture: convnet",
    "A data set": "name: stripes",
    "A loss term": '"variance"',
    "A protocol": "nearest class mean, unit pooled",
    "A picture": "halfway.png",
}


def test_there_are_six_examples_that_can_be_applied() -> None:
    assert [name for name, *_ in EXAMPLES] == list(EXPECTED)
    for _, diff, _ in EXAMPLES:
        subprocess.run(["git", "apply", "--check", "--unidiff-zero", "-"], cwd=ROOT, input=diff, text=True, check=True)


@pytest.mark.long
@pytest.mark.parametrize(("name", "diff", "command"), EXAMPLES, ids=lambda value: value.replace(" ", "_")[:20])
def test_an_example_runs_as_printed(name: str, diff: str, command: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for folder in ("config", "model", "datasets", "utils", "experiment", "evaluation", "training", "analysis"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, copy)
    subprocess.run(["git", "apply", "--unidiff-zero", "-"], cwd=copy, input=diff, text=True, check=True)

    def run(*words: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
        line = [sys.executable, *words]
        done = subprocess.run(line, cwd=copy, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    program, *words = shlex.split(command)[1:]
    said = "" if program == "train.py" else run("train.py", "--config", "config/digits.yaml", *TINY_RUN)
    said += run(program, *words, *TINY_RUN)
    said += (copy / "runs" / "digits" / "config.yaml").read_text()
    said += (copy / "runs" / "digits" / "metrics.jsonl").read_text()
    assert EXPECTED[name] in said
