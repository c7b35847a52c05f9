"""Fixtures and helpers that several tests share."""

import os
import re

# Set before torch, numpy and scikit-learn are imported, because they read it then. Networks this small are faster on
# one thread, and much faster if other programs use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from config.reading import load_config
from experiment.batch import Batch, draw_batch, read_pixels
from experiment.opening import open_experiment
from experiment.timesteps import make_sampler
from model.build import build_soda
from model.soda import SODA

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

TINY_MODEL = [
    "encoder.width=4",
    "encoder.latent_dim=8",
    "decoder.model_channels=8",
    "decoder.channel_mult=[1,2]",
    "decoder.num_res_blocks=1",
    "decoder.attn_resolutions=[4]",
    "decoder.dropout=0.1",
]
# A run on digits: 22 steps per epoch, about one second.
TINY_RUN = [
    *TINY_MODEL,
    "device=cpu",
    "data.image_size=8",
    "training.batch_size=64",
    "training.epochs=1",
    "training.log_every=5",
    "optimizer.warmup_epochs=0.1",
    "evaluation.probe.epochs=1",
    "evaluation.probe.batch_size=256",
    "sampling.num_images=4",
    "sampling.num_sampling_steps=2",
]


def digits_args(folder: Path, *overrides: str) -> list[str]:
    """Returns arguments of train.py and test.py for a tiny run on digits in `folder`. Later overrides win."""
    return ["--config", str(ROOT / "config" / "digits.yaml"), *TINY_RUN, f"output_dir={folder}", *overrides]


def pytest_configure() -> None:
    """Removes the variables of launchers, which some clusters set, so that the tests are a single process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def launch(*args: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs `python args` in a new process. Each launch takes seconds, so few tests use it."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def launch_two(*args: str) -> None:
    """Runs `python args` in two processes of a process group, without torchrun, whose own start also takes seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        processes = [
            subprocess.Popen(
                [sys.executable, *args],
                cwd=ROOT,
                env={**os.environ, **group, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=printed,
                stderr=printed,
            )
            for rank in (0, 1)
        ]
        try:
            statuses = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        printed.seek(0)
        assert statuses == [0, 0], printed.read()


def wait_for(done: Callable[[], Any], seconds: float = 120) -> None:
    """Waits until `done()` is true. Fails after `seconds`."""
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)


def experiment_of(tmp_path: Path, *overrides: str) -> Any:
    """Returns the opened experiment of a tiny run on digits."""
    _, path, *rest = digits_args(tmp_path, *overrides)
    return open_experiment(load_config(path, rest))


def batch_of(experiment: Any, step: int, positions: range) -> Batch:
    """Returns the samples at `positions` of the global batch of `step`."""
    (pixels,) = read_pixels(experiment, [(step, positions)])
    sampler = make_sampler(experiment.config.training.timesteps, experiment.diffusion, experiment.device)
    return draw_batch(experiment, pixels, step, positions, sampler)


def small_soda(width: int = 4, **decoder: Any) -> SODA:
    """Returns a small SODA for images of 8 px, with a latent of 8 dimensions and no dropout.

    All parameters of the decoder are random, because layers that start at zero would hide errors.
    """
    torch.manual_seed(0)
    encoder = {"architecture": "resnet18", "stem": "small", "width": width, "latent_dim": 8}
    sizes = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4]}
    soda = build_soda(8, encoder, {**sizes, "num_head_channels": None, "dropout": 0.0, **decoder})
    with torch.no_grad():
        for parameter in soda.decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return soda.eval()


@pytest.fixture
def tiny_soda() -> SODA:
    """A small SODA with shared modulation."""
    return small_soda()


@pytest.fixture
def sectioned_soda() -> SODA:
    """A small SODA whose latent has sections of 3, 3 and 2 dimensions."""
    return small_soda(modulation="sectioned")


def undocumented_tags(folder: Path) -> list[str]:
    """Returns the tags in TensorBoard's files of a run that are missing in the table of docs/training.md."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard")).Reload().Tags()
    page = (ROOT / "docs" / "training.md").read_text()
    rows = [
        tag
        for line in page.splitlines()
        if line.startswith("| `")
        for tag in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    patterns = [re.sub(r"<[^>]+>", ".+", re.escape(tag)) for tag in rows]
    shown = [tag for kind in ("scalars", "images", "histograms", "tensors") for tag in found[kind]]
    own = [tag.removesuffix("/text_summary") for tag in shown if not tag.startswith(("_hparams_", "custom_scalars"))]
    assert "at_a_glance/loss" in own
    return [tag for tag in own if not any(re.fullmatch(pattern, tag) for pattern in patterns)]


def assert_equal_states(a: Any, b: Any, where: str = "") -> None:
    """Asserts that two nested states of tensors and plain values are equal.

    Args:
        where: path of the values in the state, for the error message.
    """
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            assert_equal_states(a[name], b[name], f"{where}/{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_states(x, y, f"{where}/{index}")
    else:
        assert a == b, where


def write_images(root: Path, seed: int = 0, **counts: int) -> Path:
    """Writes random images of 8 x 8 pixels into folders below `root`, and returns `root`.

    train_a=2 writes `root`/train/a/0.png and `root`/train/a/1.png. flat=1 writes `root`/0.png.
    """
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        inside = root if name == "flat" else root.joinpath(*name.split("_"))
        inside.mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(inside / f"{index}.png")
    return root


def last(folder: Path) -> dict[str, Any]:
    """Returns the contents of the run's last checkpoint."""
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Function that writes a text to a config file and returns the path."""

    def _write(text: str) -> Path:
        path = tmp_path / "experiment.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two classes of two objects each, seen from six sides."""
    from tests.posed import write_objects

    return write_objects(tmp_path_factory.mktemp("objects"))
