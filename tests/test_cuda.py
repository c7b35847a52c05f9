"""What only a CUDA GPU can show."""

from pathlib import Path

import pytest
import torch

from tests import processes
from tests.conftest import TWO_PROCESSES, launch
from tests.test_distributed import assert_like_torch, relative_error
from training.step import train_step, training_pixels
from utils.logging import PhaseTimer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_two_processes_share_a_gpu(tmp_path: Path) -> None:
    """DDP, BatchNorm and EMA through gloo, against one process on the same GPU and against torch's BatchNorm."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    done = launch(*TWO_PROCESSES, "-m", "tests.processes", "cuda", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    one = processes.on_cuda(tmp_path / "one")
    for rank in (0, 1):
        two = torch.load(tmp_path / "two" / f"rank{rank}.pt")
        assert two["training"]["losses"] == pytest.approx(one["training"]["losses"], rel=1e-4)
        for kind in ("gradients", "buffers"):
            for name, value in one["training"][kind].items():
                assert relative_error(two["training"][kind][name], value) < 1e-4, name
        assert two["training"]["EMA is the same everywhere"]
        assert_like_torch(two["batch norms"], "cuda")


def test_a_step_in_mixed_precision_never_waits_for_the_gpu(tmp_path: Path) -> None:
    experiment, state = processes.prepare(tmp_path, "device=cuda", "training.use_amp=true")
    if experiment.amp_dtype != torch.bfloat16:
        pytest.skip("fp16 needs a scaler, which looks at the gradients")
    pixels, timer = training_pixels(experiment, 0), PhaseTimer()
    losses = [train_step(experiment, state, pixels, timer)[0] for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses += [train_step(experiment, state, pixels, timer)[0] for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all() and losses[-1] < losses[0]
