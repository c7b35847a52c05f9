"""Tests that checkpoints, configs and archives from others are only read, and never executed."""

import pickle
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import CIFAR10

import test as judge_program
import train as train_program
from config.reading import load_config
from datasets.images import DatasetError
from datasets.sources import load_cifar
from tests.conftest import ROOT, digits_args
from tests.test_checkpoint import Malicious

FEW = ("sampling.num_images=0",)


def source_files() -> list[Path]:
    """Returns all source files except the tests."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return [*ROOT.glob("*.py"), *(path for f in folders if f.name != "tests" for path in f.rglob("*.py"))]


def test_nothing_is_loaded_that_could_execute_something() -> None:
    forbidden = r"pickle\.loads?\(|allow_pickle|yaml\.(unsafe_|full_)?load\((?!text, Loader=_Loader\))"
    forbidden += r"|weights_only=False|(?<![\w.])(eval|exec)\(|shell=True|os\.system|extractall|trust_remote_code"
    assert len(source_files()) > 80
    for path in source_files():
        text = path.read_text()
        assert not re.search(forbidden, text), path
        assert text.count("torch.load(") == text.count("weights_only=True"), path


def test_a_cifar_that_is_not_cifar_is_neither_unpickled_nor_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision unpickles only files with the digests that it knows, and refuses other files and archives."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "data" / CIFAR10.base_folder
    base.mkdir(parents=True)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], "")):
        (base / name).write_bytes(pickle.dumps(Malicious()))
    (tmp_path / "evil").write_text("evil")

    def download(url: str, path: Any, *rest: Any) -> None:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "evil", arcname="../escaped")

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **keys: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", download)
    with pytest.raises(DatasetError, match=r"CIFAR-10 is not in .* could not be downloaded .*orrupt"):
        load_cifar(tmp_path / "data", 32, 10)
    assert not list(tmp_path.rglob("owned")) and not list(tmp_path.rglob("escaped"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of one epoch on digits, with a checkpoint that has no checksum."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert train_program.main(digits_args(run, *FEW)) == 0
    (run / "checkpoints" / "SHA256SUMS").unlink()
    return run


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("seed: !!python/object/apply:os.mkdir [owned]", "is not valid YAML"),
        ("\0", "is not valid YAML"),
        ("output_dir: ../elsewhere", ""),
    ],
)
def test_the_config_in_a_checkpoint_is_data(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: str,
    said: str,
) -> None:
    here = tmp_path / "here"  # so that ../elsewhere is inside tmp_path, too
    here.mkdir()
    monkeypatch.chdir(here)
    run = tmp_path / "work" / "run"
    args = digits_args(run, *FEW)
    shutil.copytree(trained, run)
    saved = torch.load(run / "checkpoints" / "last.pt")
    if not said:
        config = saved["config"].replace(f"output_dir: {trained}", config)
        assert config != saved["config"]
    torch.save(saved | {"config": config}, run / "checkpoints" / "last.pt")
    for program, options in ((train_program, []), (judge_program, ["--protocols", "config"])):
        if said:
            with pytest.raises(SystemExit, match="2"):
                program.main([*args, "training.epochs=2", *options])
            assert said in capsys.readouterr().err
        else:
            assert program.main([*args, "training.epochs=2", *options]) == 0
    assert not list(tmp_path.rglob("owned")) and not list(tmp_path.rglob("elsewhere"))


@pytest.mark.parametrize("name", ["..evil.yaml", "...yaml", "a b.yaml"])
def test_what_a_run_is_called_stays_in_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    """The default run folder is directly inside runs/, even if the name of the config file begins with dots."""
    (tmp_path / name).write_text((ROOT / "config" / "digits.yaml").read_text())
    assert Path(load_config(tmp_path / name).output_dir).resolve().parent == Path("runs").resolve()
