"""Tests of checkpoints: writing, reading, digests, fallback to an older checkpoint, and unusable files."""

import errno
import hashlib
import os
import pickle
import shutil
import subprocess
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import assert_equal_states, experiment_of
from training import saving
from training.saving import CheckpointInterval
from training.state import initial_state
from utils.files import FolderError
from utils.logging import PhaseTimer
from utils.run_folder import checkpoint_writer
from utils.run_folder.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint
from utils.run_folder.checkpoint_writer import CheckpointWriter, save_checkpoint, to_host
from utils.run_folder.folder import RunFolder

CONTENTS: dict[str, Any] = {
    "model": {"w": torch.arange(30_000.0)},
    **{name: {} for name in ("ema", "optimizer", "scaler")},
    **{"tally": {}, "step": 7, "config": "seed: 0\n", "data": "abc", "statistics": [[0.5], [0.2]]},
}


def contents(step: int) -> dict[str, Any]:
    """Returns the contents of a checkpoint whose step and weights are all `step`."""
    return CONTENTS | {"step": step, "model": {"w": torch.full((30_000,), float(step))}}


def write(folder: Path, *steps: int, keep_as: str | None = None) -> None:
    """Saves one checkpoint for each of `steps`, as a run does that resumes from last.pt if it exists."""
    folder.mkdir(exist_ok=True)
    resumed_from = folder / "last.pt" if (folder / "last.pt").exists() else None
    with CheckpointWriter(folder, resumed_from, folder / "metrics.jsonl") as writer:
        for step in steps:
            writer.save(contents(step), keep_as)


def newest_step(folder: Path) -> int | None:
    """Returns the step of the newest usable checkpoint, after a check of its weights; None if there is none."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    assert torch.equal(newest[1]["model"]["w"], contents(newest[1]["step"])["model"]["w"])
    return newest[1]["step"]


def test_the_last_two_checkpoints_come_back_and_sha256sum_agrees(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    write(folder, 1, 2, keep_as="epoch_0001.pt")
    write(folder, 3)
    names = ["SHA256SUMS", "epoch_0001.pt", "last.pt", "previous.pt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [load_checkpoint(folder / name)["step"] for name in names[1:]] == [2, 3, 2]
    assert newest_step(folder) == 3
    checked = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count(": OK\n") == 3, checked


def test_what_is_saved_is_what_it_was_then(tmp_path: Path) -> None:
    """A checkpoint holds the values at the time of `save`, even if they change before it is written."""
    weights = torch.zeros(10**6)
    with CheckpointWriter(tmp_path, None, tmp_path / "none") as writer:
        writer.save(CONTENTS | {"model": {"w": weights}, "optimizer": {"groups": [{"betas": (0.9, 0.95)}]}})
        weights += 1
    saved = load_checkpoint(tmp_path / "last.pt")
    assert not saved["model"]["w"].any() and saved["optimizer"] == {"groups": [{"betas": (0.9, 0.95)}]}
    assert_equal_states(to_host(CONTENTS), CONTENTS)


@pytest.mark.parametrize("damage", ["truncated", "a byte flipped", "missing", "empty"])
def test_of_a_damaged_checkpoint_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """If last.pt is damaged or missing, previous.pt is used and a warning is logged."""
    write(tmp_path, 1, 2)
    last = tmp_path / "last.pt"
    content = bytearray(last.read_bytes())
    if damage == "missing":
        last.unlink()
    elif damage == "a byte flipped":
        for place in range(0, len(content), len(content) // 200):
            flipped = content.copy()
            flipped[place] ^= 1
            last.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=r"last.pt is damaged.*SHA256SUMS"):
                load_checkpoint(last)
    else:
        os.truncate(last, 0 if damage == "empty" else len(content) // 2)
    assert newest_step(tmp_path) == 1
    assert "Using " in caplog.text and "previous.pt of step 1 instead" in caplog.text
    assert f"last.pt{'. Using' if damage == 'missing' else ' is damaged'}" in caplog.text

    # The next save must not replace the intact previous.pt by the damaged last.pt.
    with CheckpointWriter(tmp_path, tmp_path / "previous.pt", tmp_path / "none") as writer:
        writer.save(contents(3))
    assert [load_checkpoint(tmp_path / name)["step"] for name in ("last.pt", "previous.pt")] == [3, 1]
    write(tmp_path, 4)
    assert [load_checkpoint(tmp_path / name)["step"] for name in ("last.pt", "previous.pt")] == [4, 3]


def test_checkpoints_are_kept_on_storage_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write(tmp_path, 1, keep_as="epoch_0001.pt")
    write(tmp_path, 2)
    assert [load_checkpoint(tmp_path / name)["step"] for name in ("epoch_0001.pt", "last.pt")] == [1, 2]
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=True)


def test_where_both_are_damaged_the_newest_kept_one_is_used_else_nothing(tmp_path: Path) -> None:
    """If last.pt and previous.pt are damaged, the newest intact epoch_*.pt is used.

    If no checkpoint is intact, CheckpointError is raised. If there is none at all, the result is None.
    """
    assert newest_step(tmp_path) is None
    write(tmp_path, 900, keep_as="epoch_0900.pt")
    write(tmp_path, 1000, keep_as="epoch_1000.pt")
    write(tmp_path, 10_000, keep_as="epoch_10000.pt")
    write(tmp_path, 10_001, 10_002)
    for name in ("last.pt", "previous.pt", "epoch_10000.pt"):
        os.truncate(tmp_path / name, 1000)
    assert newest_step(tmp_path) == 1000
    shutil.copy(tmp_path / "epoch_0900.pt", tmp_path / "last.pt")  # a user goes back to an earlier checkpoint
    assert newest_step(tmp_path) == 900
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last.pt is damaged"):
        newest_checkpoint(tmp_path)


def test_a_process_killed_between_any_two_changes_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed during a save leaves an intact checkpoint.

    The test counts the calls that change the disk, and simulates a kill before each of them in turn.
    """

    class Killed(BaseException):
        pass

    left = 0

    def count_down() -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count_down()
            return function(*args, **kwargs)

        return call

    reached, found = 0, [0]
    for moment in range(100):
        folder = tmp_path / str(moment)
        write(folder, 1, 2, keep_as="epoch_0001.pt")
        left = moment
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "hardlink_to"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            for name in ("fsync", "open"):
                patch.setattr(checkpoint_writer.os, name, counted(getattr(os, name)))
            try:
                write(folder, 3, keep_as="epoch_0002.pt")
            except Killed:
                reached = moment
        found.append(newest_step(folder) or 0)
        assert found[-1] in (2, 3)
        # A run that resumes from step 3 does not write epoch_0002.pt again, so this file must exist by then.
        assert found[-1] == 2 or load_checkpoint(folder / "epoch_0002.pt")["step"] == 3
        for path in folder.glob("*.pt"):
            load_checkpoint(path)
        write(folder, 4)
        assert [load_checkpoint(folder / name)["step"] for name in ("last.pt", "previous.pt")] == [4, found[-1]]
        if reached < moment:
            break
    assert reached > 8 and found == sorted(found), "the newest step must change from 2 to 3 once, and not back"


def test_a_save_that_fails_leaves_the_last_ones_and_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that fails raises FolderError and leaves the earlier checkpoints unchanged."""
    write(tmp_path, 1, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full = OSError(28, "No space left on device")

    class Full(checkpoint_writer._HashedFile):
        def write(self, data: Any) -> int:
            self.error = full
            raise full

    def fail(*args: Any) -> None:
        raise full

    for target, name, value in ((checkpoint_writer, "_HashedFile", Full), (checkpoint_writer.os, "fsync", fail)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            with pytest.raises(FolderError, match=r"No space left on device.*start again"):
                write(tmp_path, 3)
            with CheckpointWriter(tmp_path, tmp_path / "last.pt", tmp_path / "none") as writer:
                writer.save(contents(3))
                while writer._writing is not None and not writer._writing.done():
                    pass
                with pytest.raises(FolderError):
                    writer.check()
                writer.check()  # the error is raised only once
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    shutil.rmtree(tmp_path)
    with (
        pytest.raises(FolderError, match="No such file"),
        CheckpointWriter(tmp_path, tmp_path / "last.pt", tmp_path / "none") as writer,
    ):
        writer.save(contents(3))
    assert not tmp_path.exists(), "a missing folder must not be created again: its disk may come back"


class Malicious:
    """Object that creates the folder `owned` when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    "kind", ["missing", "truncated", "shorter", "text", "another", "malicious", "malicious pickle"]
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    if kind == "truncated":
        save_checkpoint(path, CONTENTS)
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "shorter":  # torch then seeks to a place before the start, which is an OSError
        save_checkpoint(path, CONTENTS | {"ema": {"model": {"weight": torch.zeros(100_000)}}})
        os.truncate(path, 5000)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "another":
        torch.save({"weights": torch.zeros(2)}, path)
    elif kind == "malicious":
        torch.save({**CONTENTS, "config": Malicious()}, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (tmp_path / "SHA256SUMS").write_text(f"{digest}  last.pt\n")  # an attacker can write both files
    elif kind == "malicious pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert kind not in ("truncated", "shorter") or "cannot be read as a checkpoint (" in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_without_a_checksum_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "sub" / "mine.pt", CONTENTS)
    alone = tmp_path / "sub" / "mine.pt"
    assert_equal_states(load_checkpoint(alone), CONTENTS | {"sha256": sha256(alone.read_bytes()).hexdigest()})


def test_checkpoints_are_due_by_steps_epochs_or_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, epochs = CheckpointInterval("3 steps", 10), CheckpointInterval("2 epochs", 10)
    assert [s for s in range(1, 10) if steps.due(s)] == [3, 6, 9]
    assert [s for s in range(1, 50) if epochs.due(s)] == [20, 40]
    now = 100.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    minutes = CheckpointInterval("2 minutes", 10)
    assert not steps.overdue() and not any(minutes.due(s) for s in range(10))
    assert not minutes.overdue()
    now = 219.0
    assert not minutes.overdue()
    now = 220.0
    assert minutes.overdue() and not minutes.overdue()


def test_a_lost_peer_does_not_cost_the_checkpoint_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is completed even if the last collective of training fails while the thread is still writing."""
    experiment = experiment_of(tmp_path)
    state, folder = initial_state(experiment), RunFolder(experiment.config)
    (tmp_path / "checkpoints").mkdir()
    write_slowly = CheckpointWriter._write

    def write(*args: Any) -> None:
        time.sleep(0.5)
        write_slowly(*args)

    def lost() -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(CheckpointWriter, "_write", write)
    with (
        pytest.raises(RuntimeError, match="closed by peer"),
        saving.Saver(experiment, state, folder, PhaseTimer()) as saver,
    ):
        saver.save()
        monkeypatch.setattr(saver._delayed_max, "wait", lost)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == 0
