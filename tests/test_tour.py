"""The commands of docs/tour.md, run as printed in a copy of the repository."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, launch

TOUR = (ROOT / "docs" / "tour.md").read_text()
COMMANDS = [command for command in re.findall(r"```bash\n(.*?)```", TOUR, re.DOTALL) if not command.startswith("pip ")]
(MODEL,) = re.findall(r"^MODEL=(.+)$", TOUR, re.MULTILINE)


def stand_in(path: Path, folder: Path) -> None:
    """Exports a checkpoint of the published encoder's architecture that has hardly been trained."""
    assert launch("-m", "docs.tour_photos", str(folder / "photos")).returncode == 0
    settings = [
        "data.name=folder",
        f"data.root={folder / 'photos'}",
        f"data.cache_dir={folder / 'cache'}",
        "device=cpu",
    ]
    settings += ["training.epochs=1", "training.batch_size=64", "sampling.num_images=0"]
    for command in (
        ["train.py", "--config", "config/cifar10_cpu.yaml", *settings, f"output_dir={folder / 'run'}"],
        ["embed.py", "--checkpoint", str(folder / "run" / "checkpoints" / "last.pt"), "--export", str(path)],
    ):
        done = launch(*command)
        assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_tour_runs_as_printed(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "runs", "data", "tests")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    if not (ROOT / MODEL).exists():
        (copy / MODEL).parent.mkdir(exist_ok=True)
        stand_in(copy / MODEL, tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", "\n".join(COMMANDS)],
        cwd=copy,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "k-NN k=20 uniform, unit z, bank: clean" in done.stdout
    for name in ("runs/digits/report.html", "similar.png", "photos.npz"):
        assert (copy / name).stat().st_size > 10_000, name
    assert len((copy / "labels.csv").read_text().splitlines()) == 50
    rows = list(csv.DictReader((copy / "runs" / "tour" / "predictions" / "photos.csv").open()))
    assert len(rows) == 320
    right = sum(row["file"].startswith(row["class"]) for row in rows)
    assert right > 200, "a classifier that learns nothing is right for half of the images"
