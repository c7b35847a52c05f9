"""The real scripts, launched as a user launches them; and rules that hold for the whole source."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT, digits_args, launch

PACKAGES = ("model", "datasets", "evaluation", "utils")


def test_train_then_test(tmp_path: Path) -> None:
    args = digits_args(tmp_path / "run")
    trained = launch("train.py", *args)
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"k-NN k=20 .* (\d+\.\d / \d+\.\d\s*){3}", trained.stdout)
    for path in ("checkpoints/last.pt", "samples/epoch_0001.png", "tensorboard"):
        assert str(tmp_path / "run" / path) in trained.stdout
    assert "img/s" in trained.stderr and "loss=" in trained.stderr
    judged = launch("test.py", *args)
    assert judged.returncode == 0, judged.stderr
    assert judged.stdout.count("k-NN k=") >= 5 and judged.stdout.count("linear 15 epochs") >= 3


def test_dry_run_prints_config_size_and_work(tmp_path: Path) -> None:
    done = launch("train.py", "--config", "config/cifar10.yaml", "--dry-run", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "encoder_lr: 0.0008" in done.stdout
    assert "11,234,496 parameters, 1.111 GFLOP" in done.stdout and "39,595,139 parameters, 12.451 GFLOP" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "status"), [(("train.py", "--help"), 0), (("test.py", "--config", "config/cifar10.yaml", "seeed=1"), 2)]
)
def test_help_and_config_errors_do_not_wait_for_torch(args: tuple[str, ...], status: int) -> None:
    done = launch("-X", "importtime", *args)
    assert done.returncode == status
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "pydantic" in imported and not {"torch", "numpy", "torchvision"} & imported
    if status:
        said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert said == ["error: config/cifar10.yaml: unknown key seeed: did you mean seed?"]
    else:
        assert "training.batch_size=512" in done.stdout and "--dry-run" in done.stdout


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    others = {*PACKAGES, "training", "train", "test"} - {package}
    for path in (ROOT / package).glob("*.py"):
        assert not imports(path) & others, path


@pytest.mark.parametrize("package", ["model", "datasets"])
def test_model_and_data_sets_know_nothing_of_how_they_are_run(package: str) -> None:
    for path in (ROOT / package).glob("*.py"):
        assert not re.search(r"torch\.distributed|os\.environ|\.cuda\(|(?<![\w.])print\(", path.read_text()), path
