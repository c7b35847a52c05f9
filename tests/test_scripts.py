"""Tests of the scripts, launched in the same way as by a user, and of rules for the whole source code."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

import test as judge_program
import train as train_program
from tests.conftest import ROOT, TWO_PROCESSES, digits_args, launch, write_images

COMMANDS = ("train", "finetune", "test", "sample", "embed")
FLOORS = [  # a folder imports only from itself and from the folders after it; the commands import from all
    *("ablations", "benchmarks", "analysis", "transfer", "training", "evaluation", "experiment"),
    *("datasets", "utils", "config", "model"),
]


@pytest.mark.long
def test_a_run_by_two_processes_is_resumed_by_one(tmp_path: Path) -> None:
    """A run is started by two processes and resumed by one. Its losses equal those of a run by one process."""
    write_images(tmp_path / "photos", train_a=100, train_b=100, test_a=20, test_b=20)
    settings = (
        *("data.name=folder", f"data.root={tmp_path / 'photos'}", f"data.cache_dir={tmp_path / 'cache'}"),
        *("decoder.dropout=0.0", "optimizer.encoder_lr=1e-4", "optimizer.decoder_lr=1e-4", "training.log_every=1"),
        *("training.epochs=4", "evaluation.every=4"),
    )
    args = digits_args(tmp_path / "run", *settings)
    trained = launch(*TWO_PROCESSES, "train.py", *args)
    assert trained.returncode == 0, trained.stderr
    assert "2 processes: 32 images of each batch per process, gradients reduced by gloo" in trained.stderr

    resumed = launch("train.py", *args, "training.epochs=8")
    assert resumed.returncode == 0, resumed.stderr
    assert "img/s" in resumed.stderr and "loss=" in resumed.stderr and "at step 12 of 24" in resumed.stderr
    for done, epoch in ((trained, 4), (resumed, 8)):
        assert len(re.findall(r"k-NN k=20 .* (?:\d+\.\d / \d+\.\d\s*){3}", done.stdout)) == 1
        for path in ("checkpoints/last.pt", f"samples/epoch_{epoch:04d}.png", "tensorboard"):
            assert str(tmp_path / "run" / path) in done.stdout
    assert train_program.main([*digits_args(tmp_path / "alone", *settings), "training.epochs=8"]) == 0
    losses = {}
    for run in ("run", "alone"):
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        losses[run] = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses["run"]) == 24 and losses["run"] == pytest.approx(losses["alone"], rel=1e-6)


@pytest.mark.long
def test_two_processes_print_the_table_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """test.py prints the same table if torch.distributed.launch starts it in two processes."""
    args = digits_args(tmp_path / "run")
    assert train_program.main(args) == 0
    judged = launch("-m", "torch.distributed.launch", "--nproc_per_node=2", "test.py", *args)
    assert judged.returncode == 0, judged.stderr
    capsys.readouterr()
    assert judge_program.main(args) == 0
    assert judged.stdout == capsys.readouterr().out
    assert judged.stdout.count("k-NN k=") >= 5 and judged.stdout.count("linear 15 epochs") >= 3


def test_make_starts_as_many_processes_as_it_is_told(tmp_path: Path) -> None:
    for nproc, expected in (("1", "bin/python train.py"), ("4", "torchrun --standalone --nproc_per_node=4 train.py")):
        command = ["make", "-n", "train", f"NPROC={nproc}", "CONFIG=config/cifar10.yaml", "ARGS=--use_amp"]
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f"{expected} --config config/cifar10.yaml --use_amp" in shown and "test.py" not in shown


def test_make_train_ends_with_a_report_of_the_digits() -> None:
    for words, expected in (
        ([], "test.py --config config/digits.yaml  --report"),
        (["ARGS=training.epochs=2"], "test.py --config config/digits.yaml training.epochs=2 --report"),
        (["CONFIG=config/cifar10.yaml", "REPORT=1"], "test.py --config config/cifar10.yaml  --report"),
        (["ARGS=--dry-run"], None),
    ):
        shown = subprocess.run(
            ["make", "-n", "train", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        last = [line for line in shown.splitlines() if ".py --config" in line][-1]
        assert last.endswith(expected) if expected else "train.py" in last


def test_dry_run_prints_config_size_and_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "config" / "cifar10.yaml")
    assert train_program.main(["--config", config, "--dry-run", f"output_dir={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    assert "encoder_lr: 0.0008" in printed
    assert "11,234,496 parameters, 1.111 GFLOP" in printed and "39,595,139 parameters, 12.45 GFLOP" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (("train.py", "--help"), 0),
        (("finetune.py", "--config", "config/cifar10.yaml"), 2),
        (("test.py", "--config", "config/cifar10.yaml", "seeed=1"), 2),
        (("sample.py", "nearest", "--config", "config/cifar10.yaml", "seeed=1"), 2),
        (("embed.py", "--config", "config/cifar10.yaml", "--split", "test", "seeed=1"), 2),
    ],
)
def test_help_and_config_errors_do_not_wait_for_torch(args: tuple[str, ...], status: int) -> None:
    done = launch("-X", "importtime", *args)
    assert done.returncode == status
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "pydantic" in imported and not {"torch", "numpy", "torchvision"} & imported
    if status:
        said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        command_line = "error: the command line (seeed=1): unknown key seeed: did you mean seed?"
        assert said == [command_line] if "seeed=1" in args else said[0].startswith("error: config/cifar10.yaml")
    else:
        assert "training.batch_size=512" in done.stdout and "--dry-run" in done.stdout


def imports(path: Path) -> set[str]:
    """Returns the top-level packages that a source file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    return {module.split(".")[0] for module in modules}


def opens_text_without_encoding(call: ast.Call) -> bool:
    """Returns True for `open` in text mode, `read_text` and `write_text` without an encoding."""
    if isinstance(call.func, ast.Name) and call.func.id == "open":
        is_text = not any(isinstance(word, ast.Constant) and "b" in str(word.value) for word in call.args[1:2])
    else:
        is_text = isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text")
    return is_text and not any(keyword.arg == "encoding" for keyword in call.keywords)


def test_text_files_have_an_encoding() -> None:
    """Without one, Windows and ASCII systems read and write other bytes. The tests themselves are excepted."""
    for path in (*ROOT.glob("*.py"), *(path for floor in [*FLOORS, "docs"] for path in (ROOT / floor).rglob("*.py"))):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [f"{path}:{call.lineno}" for call in calls if opens_text_without_encoding(call)]


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_the_floors(floor: str) -> None:
    below = FLOORS[FLOORS.index(floor) :]
    above = {*FLOORS, *COMMANDS} - {*below}
    paths = list((ROOT / floor).rglob("*.py"))
    assert paths
    for path in paths:
        assert not imports(path) & above, path


def test_pictures_are_imported_by_those_who_show_them_alone() -> None:
    """Programs that use a trained model import `analysis`. train.py does not, nor do ablations and benchmarks."""
    for name in COMMANDS:
        assert ("analysis" in imports(ROOT / f"{name}.py")) == (name != "train"), name
    for path in (path for floor in ("ablations", "benchmarks") for path in (ROOT / floor).glob("*.py")):
        assert "analysis" not in imports(path), path


@pytest.mark.parametrize("package", ["model", "datasets"])
def test_model_and_data_sets_know_nothing_of_how_they_are_run(package: str) -> None:
    """`model` and `datasets` use no torch.distributed, environment variables, `.cuda()` or `print`."""
    for path in (ROOT / package).rglob("*.py"):
        assert not re.search(r"torch\.distributed|os\.environ|\.cuda\(|(?<![\w.])print\(", path.read_text()), path
