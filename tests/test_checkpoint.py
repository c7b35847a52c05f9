import os
import pickle
from pathlib import Path

import pytest
import torch

from utils import checkpoint as module
from utils.checkpoint import CheckpointError, CheckpointInterval, load_checkpoint, save_checkpoint

STATE = {"model": {"w": torch.arange(3.0)}, "ema": {}, "optimizer": {}, "scaler": {}, "step": 7}


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(path, STATE, "seed: 0\n", "abc")
    loaded = load_checkpoint(path)
    assert loaded["step"] == 7 and loaded["config"] == "seed: 0\n" and loaded["data"] == "abc"
    assert torch.equal(loaded["model"]["w"], torch.arange(3.0))
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE, "", "abc")

    def fail_midway(state: object, file) -> None:  # type: ignore[no-untyped-def]
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module.torch, "save", fail_midway)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {**STATE, "step": 8}, "", "abc")
    assert load_checkpoint(path)["step"] == 7


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "another", "malicious", "malicious pickle"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    if kind == "truncated":
        save_checkpoint(path, STATE, "", "abc")
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "another":
        torch.save({"weights": torch.zeros(2)}, path)
    elif kind == "malicious":
        torch.save({**STATE, "config": Malicious()}, path)
    elif kind == "malicious pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, epochs = CheckpointInterval("3 steps", 10), CheckpointInterval("2 epochs", 10)
    assert [s for s in range(1, 10) if steps.due(s)] == [3, 6, 9]
    assert [s for s in range(1, 50) if epochs.due(s)] == [20, 40]
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    minutes = CheckpointInterval("2 minutes", 10)
    assert not minutes.due(1)
    now = 219.0
    assert not minutes.due(2)
    now = 220.0
    assert minutes.due(3) and not minutes.due(4)
