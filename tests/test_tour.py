"""The commands of docs/tour.md and the lines of docs/using.md, run as printed in a copy of the repository."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

TOUR = (ROOT / "docs" / "tour.md").read_text()
COMMANDS = [command for command in re.findall(r"```bash\n(.*?)```", TOUR, re.DOTALL) if "pip install" not in command]
USING = (ROOT / "docs" / "using.md").read_text()
EMBED = re.findall(r"python embed.py .* (?:--export encoder.onnx|--out (?:train|test).npz)\n", USING)
LINES = ["from PIL import Image", 'Image.open("photos/flower_000.png").save("photo.jpg")']
LINES += re.findall(r"```python\n(.*?)```", USING, re.DOTALL)
LINES += ['assert [name[:6] for name in most_alike] == ["china_"] * 6', "assert z.shape == (1, 512)"]
LINES += ["assert 0.9 < accuracy <= 1"]


@pytest.mark.long
def test_the_tour_runs_as_printed(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "runs", "data", "tests")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    (copy / "using.py").write_text("\n".join(LINES))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", "\n".join([*COMMANDS, *EMBED, "python using.py"])],
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
    assert right > 240, "a classifier that learns nothing is right for half of the images"
