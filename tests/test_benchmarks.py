"""The benchmarks, launched as users launch them, with the smallest settings."""

import re

import pytest

from tests.conftest import launch

# Arguments, and a pattern of the line with the result.
COMMANDS = {
    "evaluation": (
        "--bank 2000 --dim 16 --queries 200 --rounds 1",
        r"^ours is [\d.]+ times .* as fast as scikit-learn$",
    ),
    "step": ("--config config/digits.yaml --batch_sizes 16 --rounds 1", r"^ours, float32 .* images/s .* times"),
    "streaming": ("--image_size 16 --batch_size 8 --workers 1 --rounds 1", r"^threads .* times .* the speed of one"),
    "threads": ("--models digits --rounds 1 --seconds 0.2", r"as train.py .*\d"),
    "variants": (
        "--config config/digits.yaml --batch_size 16 --rounds 1 seed=1",
        r"^\| `seed=1` \| .* ms .* \| 1.000 \|$",
    ),
    "views": ("--batch_size 8 --rounds 1", r"^in one batch is [\d.]+ times .* as fast as one by one$"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_its_result(name: str) -> None:
    words, result = COMMANDS[name]
    done = launch("-m", f"benchmarks.{name}", *words.split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(result, done.stdout, re.MULTILINE), done.stdout
