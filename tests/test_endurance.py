"""Tests that take minutes: kills, hangs, a soak test, full disks and two machines.

They start the programs in the same way as users do.
"""

import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train as train_program
from tests.conftest import ROOT, TWO_PROCESSES, assert_equal_states, digits_args, last, launch, wait_for, write_images
from tests.test_faults import losses

pytestmark = pytest.mark.long

# The state takes 10 MB, so that a kill can interrupt the writing of a checkpoint.
LARGER = ("encoder.width=16", "sampling.num_images=0", "evaluation.every=1000", "evaluation.probe.epochs=1")


@contextmanager
def started(*command: str, log: Path) -> Iterator[subprocess.Popen[str]]:
    """Starts `command` in a process group of its own, which is killed when the context ends.

    The output is appended to the file `log`.
    """
    with open(log, "a", encoding="utf-8") as said:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=said, stderr=said, text=True, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def training_since(run: Path, rank: int = 0) -> int | None:
    """Returns the process id of `rank` if it has started to train, else None.

    The id is read from the rank's log, in which each start begins with its process id.
    """
    log = run / "logs" / f"rank_{rank}.log"
    text = log.read_text().rpartition(" process ")[2] if log.exists() else ""
    return int(text.split()[0]) if " training from step " in text else None


def test_fifty_kills_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is killed 50 times reaches the same state and reports as an undisturbed run.

    The kills come at random moments: during start-up, during training and, at least ten times, while a checkpoint is
    being written. The other kills wait for a new checkpoint, so that the run advances on a slow machine as well.
    """
    chance = random.Random(0)

    def command(name: str, *more: str) -> list[str]:
        settings = ("training.epochs=100000", "training.checkpoint_every=2 steps", "training.log_every=7")
        return [sys.executable, "train.py", *digits_args(tmp_path / name, *LARGER, *settings, *more)]

    run, inside = tmp_path / "run", 0
    for kill in range(50):
        with started(*command("run"), log=tmp_path / "said") as process:
            if kill % 10 == 9:  # while it starts
                time.sleep(chance.uniform(0, 5))
            else:
                begun = newest(run)
                wait_for(lambda: training_since(run) == process.pid, seconds=300)
                wait_for(partial(has_passed, run, begun), seconds=300)
                time.sleep(chance.uniform(0, 0.1))
                if kill % 2:
                    wait_for((run / "checkpoints" / "last.pt.partial").exists)
            assert process.poll() is None, (tmp_path / "said").read_text()
            process.kill()
            process.wait()
            inside += (run / "checkpoints" / "last.pt.partial").exists()
    stopped_at = newest(run)
    assert stopped_at >= 2 * 45 and inside >= 10, (stopped_at, inside)

    epoch = stopped_at // 22 + 1
    states, reports = [], []
    for name in ("run", "undisturbed"):
        kept = tmp_path / name / "checkpoints" / f"epoch_{epoch:04d}.pt"
        with started(*command(name, f"training.keep_every={epoch}"), log=tmp_path / "said") as process:
            wait_for(lambda path=kept: path.exists() or process.poll() is not None, seconds=1800)  # type: ignore[misc]
        states.append(torch.load(kept))
        reports.append([(step, loss) for step, loss in losses(tmp_path / name) if step <= 22 * epoch])
    for part in ("model", "ema", "optimizer", "scaler", "tally", "step", "data"):
        assert_equal_states(states[0][part], states[1][part], part)
    assert reports[0] == reports[1] and len(reports[0]) == 22 * epoch // 7
    with capsys.disabled():
        print(f"\n50 kills, {inside} of them during a save, over {stopped_at} steps")


def status_of(process: int) -> tuple[int, int]:
    """Returns (resident memory in MB, number of open files) of a process."""
    memory = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(encoding="utf-8"))
    assert memory
    return int(memory[1]) // 1000, len(list(Path(f"/proc/{process}/fd").iterdir()))


def test_a_soak_of_ten_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is stopped by random signals, about every 20 seconds for ten minutes, resumes each time.

    No report is lost or repeated, and memory and open files do not grow.
    """
    chance, run = random.Random(0), tmp_path / "run"
    settings = ("training.epochs=100000", "training.checkpoint_every=5 steps", "training.log_every=2")
    args = [sys.executable, "train.py", *digits_args(run, *LARGER, *settings)]
    growth, sizes, restarts_at = [], [], []
    until = time.monotonic() + 600
    while time.monotonic() < until:
        with started(*args, log=tmp_path / "said") as process:
            wait_for(lambda: training_since(run) == process.pid)
            time.sleep(4)
            early = status_of(process.pid)
            time.sleep(chance.uniform(2, 18))
            late = status_of(process.pid)
            growth.append((late[0] - early[0], late[1] - early[1]))
            sizes.append(late)
            number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
            process.send_signal(number)
            status = process.wait(timeout=30)
            assert status == (-signal.SIGKILL if number == signal.SIGKILL else 75), (tmp_path / "said").read_text()
            restarts_at.append(last(run)["step"])

    assert len(restarts_at) > 20 and restarts_at == sorted(restarts_at)
    # A checkpoint that is being written needs one open file and one copy of the state.
    assert all(memory < 60 and files <= 3 for memory, files in growth), growth
    first, later = sizes[: len(sizes) // 3], sizes[-len(sizes) // 3 :]
    for unit, slack in ((0, 1.1), (1, 1.2)):
        sums = [statistics.median(size[unit] for size in part) for part in (first, later)]
        assert sums[1] <= slack * sums[0], sizes
    steps = [step for step, _ in losses(run)]
    assert steps == list(range(2, steps[-1] + 1, 2)), "no report may be missing or repeated"
    by_step = dict(losses(run))
    seams = [abs(by_step[b] - by_step[a]) for a, b in pairwise(by_step) if any(a <= s < b for s in restarts_at)]
    others = [abs(by_step[b] - by_step[a]) for a, b in pairwise(by_step)]
    assert statistics.mean(seams) < 1.5 * statistics.mean(others[len(others) // 10 :]), "the loss jumps at a restart"

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    shown = [event.step for event in events.Scalars("at_a_glance/loss")]
    assert shown in (steps, steps[:-1]), "only the last event may be missing, after a kill"
    assert {path.parent for path in run.rglob("*tfevents*")} == {run / "tensorboard"}, "TensorBoard must show one run"
    with capsys.disabled():
        most = [max(sizes) for sizes in zip(*growth, strict=True)]
        print(f"\n{len(restarts_at)} restarts, {steps[-1]} steps, growth at most {most[0]} MB and {most[1]} files")


def torchrun(*options: str) -> tuple[str, ...]:
    """Returns the command that starts train.py in two processes."""
    return sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *options, "train.py"


def test_the_slurm_script_saves_and_queues_again_when_its_time_is_up(tmp_path: Path) -> None:
    """docs/slurm.sh saves the run and requeues the job when its time is up.

    Scripts stand in for Slurm's commands: `srun` starts the command on this machine, and `scontrol` writes its
    arguments to a file.
    """
    run, said, tools = tmp_path / "run", tmp_path / "said", tmp_path / "tools"
    tools.mkdir()
    stand_ins = {
        "srun": '[ "$SRUN_CPUS_PER_TASK" = 2 ] && exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {tmp_path / "asked"}; fi',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, script in stand_ins.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    allotted = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "PROCESSES_PER_NODE": "2"}
    allotted["SLURM_CPUS_PER_TASK"] = "2"
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", **allotted}

    def submitted(epochs: int) -> tuple[str, ...]:
        assignments = [f"{name}={value}" for name, value in environment.items()]
        return "env", *assignments, "bash", "docs/slurm.sh", *digits_args(run, f"training.epochs={epochs}")

    with started(*submitted(1000), log=said) as job:
        wait_for(lambda: training_since(run) and newest(run) == 0 and (run / "metrics.jsonl").stat().st_size)
        shell = job.pid  # `env` is replaced by the shell, which keeps the process id
        os.kill(shell, signal.SIGUSR1)
        assert job.wait(timeout=60) != 0
    assert "stopped by SIGUSR1 at step" in said.read_text() and (tmp_path / "asked").read_text() == "requeue 17\n"
    reached = newest(run)
    with started(*submitted(1000), log=said) as job:  # the requeued job
        wait_for(lambda: f"at step {reached} of" in said.read_text())
        os.killpg(job.pid, signal.SIGTERM)
        job.wait(timeout=60)
    with started(*submitted(1000), "training.epoch=3", log=said) as job:
        assert job.wait(timeout=60) != 0
    assert (tmp_path / "asked").read_text() == "requeue 17\n", "a user's mistake must not be requeued"


def test_torchrun_brings_back_a_killed_rank(tmp_path: Path) -> None:
    run, said = tmp_path / "run", tmp_path / "said"
    args = digits_args(run, *LARGER, "training.epochs=6", "training.checkpoint_every=4 steps")
    with started(*torchrun("--standalone", "--max-restarts=3"), *args, log=said) as process:
        for rank in (1, 0):
            begun = newest(run)
            wait_for(partial(has_passed, run, begun + 8))
            os.kill(training_since(run, rank) or 0, signal.SIGKILL)
        assert process.wait(timeout=180) == 0, said.read_text()
    assert len(re.findall(r"rank \d has lost the other processes \(Connection", said.read_text())) == 2
    steps = [step for step, _ in losses(run)]
    assert steps == [*range(5, 132, 5), 132], "no report may be missing or repeated"


def test_two_processes_end_with_a_line_and_a_whole_checkpoint_when_numbers_go_bad(tmp_path: Path) -> None:
    """NaNs in one image of rank 1 end both ranks with one error line.

    Rank 0 is still writing a checkpoint at that time, and completes it.
    """
    settings = ("training.epochs=3", "training.checkpoint_every=26 steps", "training.log_every=30")
    done = launch(*TWO_PROCESSES, "-m", "tests.processes", "bad numbers", *digits_args(tmp_path, *settings))
    assert done.returncode == 1 and done.stderr.count("exitcode  : 2 ") == 2, done.stderr
    assert "gradients were not finite in 22 steps in a row before step 30" in done.stderr
    assert "The last checkpoint is of step 26" in done.stderr and done.stderr.count("\nerror: ") == 1
    saved = last(tmp_path)
    assert saved["step"] == 26 and all(value.isfinite().all() for value in saved["model"].values())


def test_a_rank_that_hangs_does_not_keep_the_others(tmp_path: Path) -> None:
    run, said = tmp_path / "run", tmp_path / "said"
    args = digits_args(run, "training.epochs=100000", "distributed.timeout_minutes=0.25", "training.log_every=1")
    with started(*torchrun("--standalone"), *args, log=said) as process:
        wait_for(lambda: all(training_since(run, rank) for rank in (0, 1)) and len(losses(run)) > 3)
        os.kill(training_since(run, 1) or 0, signal.SIGSTOP)
        wait_for(lambda: "error: rank 0 has lost the other processes (Timed out waiting)" in said.read_text(), 60)
        assert process.wait(timeout=60) == 1, "torchrun exits with 1; it kills the stopped rank after 30 s"
    for rank in (0, 1):
        assert " training from step 0 to " in (run / f"logs/rank_{rank}.log").read_text().splitlines()[-1]


def mount(*args: str | Path) -> None:
    """Mounts a file system, or skips the test if this is not possible."""
    done = subprocess.run(["mount", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount point of a file system of 100 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=100m", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "--recursive", "--lazy", folder], check=True)


@pytest.mark.parametrize("fault", ["No space left on device", "Read-only file system"])
def test_a_disk_that_goes_bad_ends_the_run_with_a_line(tmp_path: Path, disk: Path, fault: str) -> None:
    run, said = disk / "run", tmp_path / "said"
    settings = ("training.epochs=100000", "training.checkpoint_every=5 steps", "training.log_every=1")
    args = [sys.executable, "train.py", *digits_args(run, *LARGER, *settings)]
    with started(*args, log=said) as process:
        wait_for(lambda: training_since(run) and (run / "checkpoints" / "previous.pt").exists())
        if fault == "Read-only file system":
            mount("--bind", run, run)
            mount("-o", "remount,bind,ro", run)
        else:
            with open(disk / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
                while ballast.write(bytes(2**12)):  # until no byte is free
                    pass
        assert process.wait(timeout=60) == 2
    errors = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"cannot write to {run}" in errors[0] and fault in errors[0], said.read_text()
    reached = last(run)["step"]
    if fault == "Read-only file system":
        subprocess.run(["umount", run], check=True)
    (disk / "ballast").unlink(missing_ok=True)
    with started(*args, log=said) as process:
        wait_for(lambda: newest(run) > reached + 10)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
    assert f"at step {reached} of" in said.read_text()
    steps = [step for step, _ in losses(run)]
    assert steps == list(range(1, steps[-1] + 1))


@contextmanager
def two_machines(folder: Path) -> Iterator[list[list[str]]]:
    """Simulates two machines by two network namespaces with a virtual cable between them.

    Yields one command prefix per machine. A command with this prefix runs on that machine.
    """
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 soda-a\n10.77.0.2 soda-b\n")
    names = ("soda-a", "soda-b")

    def ip(*args: str) -> None:
        subprocess.run(["ip", *args], check=True, capture_output=True)

    with ExitStack() as made:
        try:
            for name in names:
                ip("netns", "add", name)
                made.callback(ip, "netns", "del", name)
            ip("link", "add", "eth0", "netns", "soda-a", "type", "veth", "peer", "name", "eth0", "netns", "soda-b")
            for number, name in enumerate(names, start=1):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
                for link in ("lo", "eth0"):
                    ip("-n", name, "link", "set", link, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot create network namespaces here: {getattr(error, 'stderr', error)}")
        dress = f'hostname $0; mount --bind {folder / "hosts"} /etc/hosts; exec "$@"'
        yield [["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", dress, name] for name in names]


def processes_on(machine: list[str]) -> list[int]:
    """Returns the process numbers in the network namespace of a machine."""
    found = subprocess.run(["ip", "netns", "pids", machine[3]], capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


def test_two_machines_train_as_one_process_and_resume(tmp_path: Path) -> None:
    """Two machines with two processes each give the losses of one process.

    Each machine caches the images once, and only one rank writes reports. After one machine dies, the run resumes on
    both machines.
    """
    write_images(tmp_path / "photos", seed=0, flat=128)
    settings = (
        *("data.name=folder", f"data.root={tmp_path / 'photos'}", "sampling.num_images=0", "decoder.dropout=0"),
        *("optimizer.encoder_lr=1e-4", "optimizer.decoder_lr=1e-4", "training.epochs=40", "training.log_every=1"),
        *("training.checkpoint_every=2 steps", "distributed.timeout_minutes=2"),
    )
    rendezvous = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=soda-a:29400", "--rdzv-id=soda")
    run, said = tmp_path / "run", [tmp_path / "said_a", tmp_path / "said_b"]

    def start(stack: ExitStack, machines: list[list[str]]) -> list[subprocess.Popen[str]]:
        processes = []
        for machine, log in zip(machines, said, strict=True):
            args = digits_args(run, *settings, f"data.cache_dir={tmp_path / machine[3]}")  # the machine's own disk
            processes.append(stack.enter_context(started(*machine, *torchrun(*rendezvous), *args, log=log)))
        return processes

    with two_machines(tmp_path) as machines:
        with ExitStack() as stack:
            first, _ = start(stack, machines)
            wait_for(lambda: all(training_since(run, rank) for rank in range(4)) and newest(run) >= 4)
            for number in processes_on(machines[1]):
                os.kill(number, signal.SIGKILL)
            assert first.wait(timeout=100) == 1, "torchrun itself exits with status 1"
        assert re.search(
            r"error: rank \d has lost the other processes .* the same command resumes", said[0].read_text()
        )
        reached = newest(run)
        assert 4 <= reached < 80
        with ExitStack() as stack:
            for process in start(stack, machines):
                assert process.wait(timeout=200) == 0, said[0].read_text() + said[1].read_text()
    assert f"at step {reached} of 80" in said[0].read_text() + said[1].read_text()

    cached: dict[str, int] = {}
    for rank in range(4):
        log = (run / "logs" / f"rank_{rank}.log").read_text()
        machine = re.findall(r" process \d+ on (soda-.)", log)
        cached[machine[0]] = cached.get(machine[0], 0) + log.count(" cached the images of ")
    assert cached == {"soda-a": 1, "soda-b": 1}
    assert [step for step, _ in losses(run)] == list(range(1, 81)), "only one rank may write reports"
    assert len(list((run / "tensorboard").iterdir())) == 2, "each of the two starts must write one event file"

    alone = tmp_path / "alone"
    assert train_program.main(digits_args(alone, *settings, f"data.cache_dir={tmp_path / 'soda-a'}")) == 0
    assert dict(losses(run)) == pytest.approx(dict(losses(alone)), rel=1e-4)


def has_passed(run: Path, step: int) -> bool:
    """Returns True if the newest checkpoint is of a later step than `step`."""
    return newest(run) > step


def newest(run: Path) -> int:
    """Returns the step of last.pt, or of previous.pt while last.pt is being replaced; 0 if there is no checkpoint."""
    for name in ("last.pt", "previous.pt"):
        with suppress(FileNotFoundError):
            return torch.load(run / "checkpoints" / name)["step"]
    return 0
