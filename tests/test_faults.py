"""Tests of faults during a run. docs/reliability.md lists the guarantees. Slower tests are in test_endurance.py."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import test as judge_program
import train as train_program
from tests.conftest import ROOT, TWO_PROCESSES, assert_equal_states, digits_args, last, wait_for
from training import loop
from utils import signals
from utils.device import OutOfMemoryError, memory_for
from utils.distributed.collectives import SharedError
from utils.files import FolderError, lock_file, replacing, write_text
from utils.run_folder.checkpoint import newest_checkpoint
from utils.run_folder.run_log import RunLog

SETTINGS = (  # 22 steps, all of them in the warm-up
    "optimizer.warmup_epochs=1",
    "training.checkpoint_every=6 steps",
    "sampling.num_images=0",
)


def args_for(folder: Path, *overrides: str) -> list[str]:
    """Returns the arguments of a short run on digits in `folder`."""
    return digits_args(folder, *SETTINGS, *overrides)


def losses(folder: Path) -> list[tuple[int, float]]:
    """Returns (step, loss) of every training report, in order."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train_program.main(args_for(folder)) == 0
    return folder


def assert_ends_like(folder: Path, other: Path) -> None:
    """Checks that two runs end with the same state, bit for bit, and with the same reports."""
    for part in ("model", "ema", "optimizer", "tally", "step"):
        assert_equal_states(last(folder)[part], last(other)[part], part)
    assert losses(folder) == losses(other)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Signal handlers of the programs, installed in this process as if it had been started with nohup."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    forget_signals(monkeypatch)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.watch()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def forget_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resets the signal state to that of a new process."""
    monkeypatch.setattr(signals, "_received", 0)
    monkeypatch.setattr(signals, "_deferring", False)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Calls `act` just before the training step at which `state.step` is `step`."""
    train_step = loop.train_step

    def hooked(experiment: Any, state: Any, *rest: Any) -> Any:
        if state.step == step:
            act()
        return train_step(experiment, state, *rest)

    monkeypatch.setattr(loop, "train_step", hooked)


def test_a_signal_saves_and_the_same_command_goes_on(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: None
) -> None:
    for number, step in ((signal.SIGTERM, 10), (signal.SIGINT, 11), (signal.SIGUSR1, 21)):
        with monkeypatch.context() as patch:
            at_step(patch, step, partial(os.kill, os.getpid(), number))
            with pytest.raises(signals.Stopped) as stopped:
                train_program.main(args_for(tmp_path))
        assert stopped.value.code == 75 and f"at step {step + 1}, state saved" in stopped.value.message
        assert last(tmp_path)["step"] == step + 1
        forget_signals(monkeypatch)
    assert train_program.main(args_for(tmp_path)) == 0
    assert_ends_like(tmp_path, undisturbed)


def test_a_second_interrupt_ends_a_process_that_hangs() -> None:
    script = (
        "import hashlib; from utils import signals; signals.watch()\n"
        "with signals.deferred():\n"
        "    print(1, flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # minutes in C code, where Python handles no signal
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stdout.readline()
        for number in (signal.SIGINT, signal.SIGHUP):
            running.send_signal(number)
            time.sleep(0.3)
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=10) == 130


def test_a_signal_during_an_evaluation_ends_it_at_once(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: None
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("training.evaluating.judge", lambda *args: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(signals.Stopped):
            train_program.main(args_for(tmp_path, "training.checkpoint_every=60 minutes"))
    assert last(tmp_path)["step"] == 22, "the state must be saved before the evaluation"
    forget_signals(monkeypatch)
    assert train_program.main(args_for(tmp_path)) == 0
    assert_ends_like(tmp_path, undisturbed)
    assert '"evaluation"' in (tmp_path / "metrics.jsonl").read_text().splitlines()[-1], (
        "the interrupted evaluation must run again"
    )


def test_a_signal_while_the_images_are_opened_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: None
) -> None:
    from experiment import opening

    monkeypatch.setattr(opening, "build_dataset", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(signals.Stopped):
        train_program.main(args_for(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_smaller_micro_batch_goes_on_with_the_run(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, watched: None
) -> None:
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        at_step(patch, 11, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(signals.Stopped):
            train_program.main(args_for(tmp_path))
    forget_signals(monkeypatch)
    assert train_program.main(args_for(tmp_path, "training.micro_batch_size=16")) == 0
    assert "training.micro_batch_size was None and is now 16" in caplog.text
    assert "BatchNorm normalises over 16 images at a time" in caplog.text
    assert losses(tmp_path)[:2] == losses(undisturbed)[:2]
    assert dict(losses(tmp_path)) == pytest.approx(dict(losses(undisturbed)), rel=0.05), (
        "only the batch size of BatchNorm may change the losses"
    )


def test_a_full_disk_ends_the_run_with_a_line(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the disk is full, the run ends with one error line. It resumes once there is room.

    The room is too small first for a checkpoint, then for a report. A limit on the size of files stands for the full
    disk. `capsys` keeps the progress bar out of files, so that the limit does not affect it.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (100_000, 10):
        try:
            with monkeypatch.context() as patch:
                at_step(patch, 14, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, limits[1])))
                with pytest.raises(FolderError) as failure:
                    train_program.main(args_for(tmp_path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        error = str(failure.value)
        assert error.startswith("cannot write to") and "File too large" in error and error.endswith("start again")
        assert last(tmp_path)["step"] == 12 and not list((tmp_path / "checkpoints").glob("*.partial"))
    assert train_program.main(args_for(tmp_path)) == 0
    assert_ends_like(tmp_path, undisturbed)


@pytest.mark.long
def test_a_folder_that_is_lost_ends_the_run_and_is_not_made_anew(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, away = tmp_path / "run", tmp_path / "away"
    with monkeypatch.context() as patch:
        at_step(patch, 15, lambda: run.rename(away))
        with pytest.raises(FolderError, match=f"cannot write to {run}"):
            train_program.main(args_for(run))
    assert not run.exists()
    away.rename(run)
    assert train_program.main(args_for(run)) == 0
    assert_ends_like(run, undisturbed)


def test_a_folder_in_use_is_refused_and_a_dead_run_leaves_no_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import sys, time; from pathlib import Path; from utils.files import lock_file\n"
        "lock = lock_file(Path(sys.argv[1])); print(1, flush=True); "
        "time.sleep(60)"
    )
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", script, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(SystemExit, match="2"):
            train_program.main(args_for(tmp_path / "run"))
        assert f"is in use by process {other.pid} on" in capsys.readouterr().err
        other.kill()
        other.wait()
    with lock_file(tmp_path / "run" / ".lock"):
        pass


@pytest.mark.parametrize("failing", ["add_scalar", "flush", "add_text", "add_image", "__init__", "close"])
def test_reports_go_on_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    def fail(*args: Any, **keys: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, failing, fail)
    with RunLog(tmp_path, 0) as log:
        log.text("config", "text", 0)
        log.image("grid", 1, torch.zeros(3, 4, 4, dtype=torch.uint8))
        for step in (1, 2):
            log.report("train", step, {"loss": 0.5})
    assert losses(tmp_path) == [(1, 0.5), (2, 0.5)]
    assert caplog.text.count("TensorBoard failed") == 1


def test_tensorboard_whose_files_go_bad_never_stops_training(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Training continues if TensorBoard's writer thread dies because its folder has been removed."""
    at_step(monkeypatch, 12, lambda: shutil.rmtree(tmp_path / "tensorboard"))
    assert train_program.main(args_for(tmp_path)) == 0
    assert "TensorBoard failed" in caplog.text
    assert_ends_like(tmp_path, undisturbed)


def with_nan_from(monkeypatch: pytest.MonkeyPatch, step: int, count: int) -> None:
    """Makes one pixel NaN in `count` steps, beginning with `step`."""
    train_step = loop.train_step

    def hooked(experiment: Any, state: Any, pixels: Any, timer: Any) -> Any:
        if not step <= state.step < step + count:
            return train_step(experiment, state, pixels, timer)
        pair = type(experiment.views).pair

        def bad(*args: Any) -> Any:
            x_source, x_start = pair(*args)
            x_source[0, 0, 0, 0] = math.nan
            return x_source, x_start

        with monkeypatch.context() as patch:
            patch.setattr(type(experiment.views), "pair", bad)
            return train_step(experiment, state, pixels, timer)

    monkeypatch.setattr(loop, "train_step", hooked)


def test_a_few_bad_steps_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_nan_from(monkeypatch, 3, 8)
    assert train_program.main(args_for(tmp_path)) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if line["kind"] == "train"] == [2, 5, 1, 0, 0]
    assert [line["loss"] is None for line in lines if line["kind"] == "train"] == [False, True, False, False, False]


def test_bad_steps_before_anything_is_saved_name_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_nan_from(monkeypatch, 0, 22)
    with pytest.raises(SharedError, match="Nothing is saved yet"):
        train_program.main(args_for(tmp_path, "training.checkpoint_every=10 minutes", "training.log_every=20"))


def test_twenty_bad_steps_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_nan_from(monkeypatch, 8, 20)
    with pytest.raises(SharedError) as failure:
        train_program.main(args_for(tmp_path, "training.epochs=2"))
    error = str(failure.value)
    assert "gradients were not finite in 20 steps in a row before step 30" in error
    assert "0.002 (encoder)" in error and f"step 24, in {tmp_path / 'checkpoints'}" in error
    saved = last(tmp_path)
    assert saved["step"] == 24 and all(value.isfinite().all() for value in saved["model"].values())


def test_memory_that_is_missing_is_told_of_with_the_key_that_halves_it(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If memory runs out, the error names the setting that halves the memory needed. With it, the run resumes."""
    for key, short in (
        ("training.micro_batch_size=32", "training.loop.train_step"),
        ("evaluation.batch_size=256", "training.evaluating.judge"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(short, lambda *args: torch.empty(2**50))
            with pytest.raises(OutOfMemoryError, match=f"^out of memory: 4194304.00 GiB was requested.*{key}"):
                train_program.main(args_for(tmp_path))
    assert train_program.main(args_for(tmp_path)) == 0
    assert_ends_like(tmp_path, undisturbed)
    smaller = r"set evaluation\.batch_size=256"
    for words, place, advice in (
        ([], "judge.extract_features", smaller),
        (["--measures", "uniformity"], "measures.subjects.extract_features", smaller),
        ([], "encoders.draw_source", "use another device, because BatchNorm's"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"evaluation.{place}", lambda *args: torch.empty(2**50))
            with pytest.raises(OutOfMemoryError, match=advice):
                judge_program.main([*args_for(tmp_path), *words])


def test_too_little_memory_for_a_checkpoint_does_not_look_like_damage(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of the allocator ends the reading, although previous.pt could be read."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda file, **_: torch.empty(2**50 if file.name.endswith("last.pt") else 1))
        with pytest.raises(OutOfMemoryError, match=r"4194304.00 GiB was requested; to read .*last.pt, free memory"):
            newest_checkpoint(undisturbed / "checkpoints")
    newest = newest_checkpoint(undisturbed / "checkpoints")
    assert newest is not None and newest[0].name == "last.pt"


def test_what_cuda_says_of_its_memory_is_understood() -> None:
    """Out-of-memory errors of CUDA and its libraries become OutOfMemoryError. Other errors are not changed."""
    with pytest.raises(OutOfMemoryError, match=r"2\.50 GiB was requested; buy"), memory_for(lambda: "buy"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of")
    with pytest.raises(OutOfMemoryError, match="buy"), memory_for(lambda: "buy"):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    with pytest.raises(RuntimeError, match="another"), memory_for(lambda: ""):
        raise RuntimeError("another")


def test_an_error_in_mid_work_is_one_line_and_status_2() -> None:
    """`run` prints a UserError as one line and exits with status 2. A bug keeps its traceback.

    This process is the first of two, and does not wait for the other one. Lines printed before are not lost.
    """
    script = (
        "import sys; from utils.cli import run; from utils.files import FolderError\n"
        "def main():\n"
        "    print('a table')\n"
        "    raise (FolderError('the disk is full') if sys.argv[1] == 'user' else ValueError('a bug'))\n"
        "run(main)"
    )
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | group
    ended = {
        kind: subprocess.run(
            [sys.executable, "-c", script, kind], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        for kind in ("user", "bug")
    }
    assert (ended["user"].returncode, ended["user"].stderr) == (2, "error: the disk is full\n")
    assert [each.stdout for each in ended.values()] == ["a table\n", "a table\n"]
    assert ended["bug"].returncode == 1 and "Traceback" in ended["bug"].stderr


@pytest.mark.parametrize("console", ["a full disk", "a pipe that nobody reads"])
def test_a_console_that_cannot_be_written_to_changes_nothing(tmp_path: Path, console: str) -> None:
    script = (
        "import sys, time; from tqdm import tqdm; from utils.cli import run; import logging\n"
        "def main():\n"
        "    logging.warning('a line')\n"
        "    for _ in tqdm(range(3), mininterval=0): print('on stdout', flush=True)\n"
        "    print('a table')\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
        "    return 0\n"
        "run(main)"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open("/dev/full" if "disk" in console else write_end, "w", encoding="utf-8") as said:
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=said, stderr=said, check=False)
    assert done.returncode == 0 and (tmp_path / "done").exists()


@pytest.mark.long
def test_two_processes_agree_to_stop_when_one_is_told_to(tmp_path: Path) -> None:
    """If one rank receives a signal, both ranks save the state and exit with status 75 at the same step."""
    run = tmp_path / "run"
    args = digits_args(run, "training.epochs=10000", "training.log_every=1", "distributed.timeout_minutes=2")
    command = [sys.executable, *TWO_PROCESSES, "train.py", *args]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        try:
            wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 5)
            os.kill(int((run / "logs" / "rank_1.log").read_text().split(" process ")[-1].split()[0]), signal.SIGUSR1)
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 1, "torchrun itself exits with status 1"
    assert said.count("stopped by SIGUSR1 at step ") == 1 and said.count("exitcode  : 75 ") == 2, said
    for rank in (0, 1):
        assert f"stopped at step {last(run)['step']}" in (run / f"logs/rank_{rank}.log").read_text()
    assert losses(run)[-1][0] == last(run)["step"]


def test_a_file_is_written_completely_and_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    """Several processes may write one path. Each has a temporary file, which others remove only after its death."""
    path = tmp_path / "a[1].txt"
    code = "import sys, time; from pathlib import Path; from utils.files import replacing\n"
    code += "with replacing(Path(sys.argv[1])) as partial: partial.write_text('half'); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT) as writer:
        wait_for(lambda: [left.read_text() for left in tmp_path.iterdir()] == ["half"])
        (left,) = tmp_path.iterdir()
        write_text(path, "first")
        assert left.read_text() == "half" and path.read_text() == "first"
        writer.kill()
    write_text(path, "second")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        assert partial.suffix == ".txt"
        partial.write_text("third")
        raise ZeroDivisionError
    assert path.read_text() == "second" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_a_library_replaces_keeps_its_mode(tmp_path: Path) -> None:
    """Some libraries write a file that only its owner may read, in place of the given one."""
    with replacing(tmp_path / "a.bin") as partial:
        expected = partial.stat().st_mode
        partial.unlink()
        partial.touch(mode=0o600)
    assert (tmp_path / "a.bin").stat().st_mode == expected != 0o100600
