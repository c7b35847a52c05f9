"""Tests that need a CUDA GPU."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import embed as embed_program
import sample as sample_program
import train as train_program
from datasets.decoding import decode_batches
from datasets.listing import Listing
from tests import processes
from tests.conftest import TWO_PROCESSES, assert_equal_states, digits_args, launch
from tests.test_distributed import assert_like_torch, relative_error
from tests.test_step import LEVERS, with_nan_at
from training.step import train_step, training_pixels
from utils.device import choose_compile
from utils.logging import PhaseTimer
from utils.run_folder.checkpoint import load_checkpoint
from utils.run_folder.checkpoint_writer import CheckpointWriter, to_host

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_two_processes_share_a_gpu(tmp_path: Path) -> None:
    """Two processes that share a GPU through gloo train like one process.

    Their BatchNorm agrees with torch's BatchNorm, and their EMA is the same on both ranks.
    """
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    done = launch(*TWO_PROCESSES, "-m", "tests.processes", "cuda", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    one = processes.on_cuda(tmp_path / "one")
    for rank in (0, 1):
        two = torch.load(tmp_path / "two" / f"rank{rank}.pt")
        assert two["training"]["losses"] == pytest.approx(one["training"]["losses"], rel=1e-4)
        assert two["compiled"]["losses"] == pytest.approx(one["training"]["losses"], rel=3e-4)
        for kind in ("gradients", "buffers"):
            for name, value in one["training"][kind].items():
                assert relative_error(two["training"][kind][name], value) < 1e-4, name
        assert two["frozen encoder"]["losses"] == pytest.approx(one["frozen encoder"]["losses"], rel=1e-4)
        assert two["training"]["EMA is the same everywhere"]
        assert_like_torch(two["batch norms"], "cuda")


@pytest.mark.parametrize("settings", [(), LEVERS], ids=["default", "levers"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_in_mixed_precision_never_waits_for_the_gpu(
    tmp_path: Path, compiled: bool, settings: tuple[str, ...]
) -> None:
    experiment, state = processes.prepare(tmp_path, "device=cuda", "training.use_amp=true", *settings)
    if experiment.amp_dtype != torch.bfloat16:
        pytest.skip("fp16 needs a gradient scaler, which synchronises with the GPU")
    if compiled:
        if not choose_compile(True, experiment.device):
            pytest.skip("this machine cannot compile the model")
        state.soda.compile()
    pixels, timer = training_pixels(experiment, 0), PhaseTimer()
    losses = [train_step(experiment, state, pixels, timer)[0] for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses += [train_step(experiment, state, pixels, timer)[0] for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all() and losses[-1] < losses[0]


def test_a_step_that_is_not_finite_changes_nothing_on_the_gpu_and_waits_for_nothing(tmp_path: Path) -> None:
    experiment, state = processes.prepare(tmp_path, "device=cuda")
    experiment = with_nan_at(experiment, 4)
    pixels, timer = training_pixels(experiment, 0), PhaseTimer()
    for step in range(7):
        before = to_host(state.state_dict())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            _, grad_norm = train_step(experiment, state, pixels, timer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        after = state.state_dict()
        assert grad_norm.isfinite() == (step != 4)
        changed = not torch.equal(before["model"]["encoder.fc.weight"], after["model"]["encoder.fc.weight"].cpu())
        assert changed == (step != 4)
        if step == 4:
            for part in ("model", "optimizer"):
                assert_equal_states(to_host(after[part]), before[part], part)
            assert state.ema.step.device.type == "cpu" and after["ema"]["model"]["encoder.fc.weight"].isfinite().all()
    assert state.tally.take().skipped == 1


def test_a_checkpoint_comes_from_the_gpu_whole(tmp_path: Path) -> None:
    """A checkpoint copied through pinned memory is correct, although the next step changes the weights meanwhile."""
    experiment, state = processes.prepare(tmp_path, "device=cuda")
    pixels = training_pixels(experiment, 0)
    with CheckpointWriter(tmp_path, None, tmp_path / "none") as writer:
        for _ in range(3):
            train_step(experiment, state, pixels, PhaseTimer())
            expected = copy.deepcopy(state.state_dict())
            writer.save(state.state_dict() | {"config": "", "data": "", "statistics": []})
            train_step(experiment, state, pixels, PhaseTimer())
    saved = load_checkpoint(tmp_path / "last.pt")
    for part in ("model", "ema", "optimizer", "tally", "step"):
        assert_equal_states(saved[part], to_host(expected[part]), part)


def test_streamed_images_are_pinned(tmp_path: Path) -> None:
    for index in range(4):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
    listing = Listing(tmp_path, [f"{index}.png" for index in range(4)], None, [])
    (pixels,) = decode_batches(listing, 8, [range(4)], num_workers=2, pin_memory=True)
    assert pixels.is_pinned() and pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_images_lie_on_the_gpu_or_are_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are kept on the GPU if they fit there. If not, batches come from pinned host memory."""
    near, _ = processes.prepare(tmp_path, "device=cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    far, _ = processes.prepare(tmp_path, "device=cuda")
    here, there = next(training_pixels(near, 0)), next(training_pixels(far, 0))
    assert isinstance(here, torch.Tensor) and isinstance(there, torch.Tensor)
    assert here.is_cuda and there.is_pinned() and torch.equal(here.cpu(), there)
    assert near.data_digest == far.data_digest


def test_pictures_and_features_on_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = digits_args(tmp_path / "run", "device=cuda", "decoder.modulation=sectioned", "training.compile=false")
    assert train_program.main(args) == 0
    for name in ("interpolate", "directions", "arithmetic", "mix", "generate", "nearest"):
        assert sample_program.main([name, *args]) == 0
        assert (tmp_path / "run" / "pictures" / f"{name}.png").stat().st_size > 1000
    for device in ("cuda", "cpu"):
        assert (
            embed_program.main([*args, "--split", "test", "--out", str(tmp_path / f"{device}.npz"), f"device={device}"])
            == 0
        )
    there, here = np.load(tmp_path / "cuda.npz"), np.load(tmp_path / "cpu.npz")
    np.testing.assert_allclose(there["z"], here["z"], atol=0.02 * np.abs(here["z"]).max())  # CUDA uses TensorFloat-32
