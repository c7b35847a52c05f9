"""Tests of command lines and of the environment in which they run: words, lists, paths, consoles, left-over variables.

The programs must also import nothing that only some operating systems have.
"""

import ast
import errno
import io
import logging
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch.distributed as dist

import embed
import train
from config.errors import ConfigError, UserError
from config.keys import flat
from config.reading import load_config, parse_config, to_words
from config.schema import Config
from config.yaml_text import parse_yaml
from tests.conftest import ROOT, digits_args
from tests.test_scripts import FLOORS
from utils import cli
from utils.distributed import rendezvous
from utils.distributed.processes import RendezvousError, check_launcher
from utils.files import InUseError, lock_file, read_names
from utils.run_folder.checkpoint import CheckpointError, load_checkpoint

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("output_dir=runs/exp #2", "runs/exp #2"),
        ("output_dir=2026-11-25", "2026-11-25"),
        ("output_dir=010", "010"),
        ("output_dir=1e5", "1e5"),
        ("output_dir=true", "true"),
        ("output_dir=a: b", "a: b"),
        ("output_dir=[x", "[x"),
        ("output_dir=a=b", "a=b"),
        ("training.checkpoint_every=7 steps", "7 steps"),
        ("data.stream=null", None),
        ("seed=010", 10),
        ("seed=-0", 0),
        ("seed=1_000", 1000),
        ("data.num_workers=08", 8),
        ("optimizer.encoder_lr=1e-3", 1e-3),
        ("optimizer.encoder_lr=.5", 0.5),
        ("optimizer.encoder_lr=010.5", 10.5),
        ("decoder.channel_mult=[01, 2, 02]", [1, 2, 2]),
        ("training.use_amp=yes", True),
    ],
)
def test_a_value_is_read_as_it_is_typed(write: Callable[[str], Path], words: str, value: Any) -> None:
    config = load_config(write(""), [words])
    key = words.split("=")[0]
    assert flat(config)[key] == value and type(flat(config)[key]) is type(value)
    assert parse_config(config.to_yaml(), "a checkpoint") == config
    assert load_config(write(""), shlex.split(to_words({key: value}))) == config, "the printed words give another value"


@pytest.mark.parametrize(
    "words", ["seed=1:30", "seed=0x10", "seed=0b1", "seed=2026-11-25", "optimizer.encoder_lr=1:30.5"]
)
def test_what_is_no_decimal_number_is_refused_as_it_is_typed(write: Callable[[str], Path], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"should be a valid \w+, not '{words.split('=')[1]}'"):
        load_config(write(""), [words])


def test_files_hold_decimal_numbers_and_text_as_well(write: Callable[[str], Path]) -> None:
    text = "\ufeffseed: 010\noutput_dir: 2026-11-25\ndata: {cache_dir: 010, root: 1e5}\ntraining: {epochs: 1_0}\n"
    config = load_config(write(text))
    assert (config.seed, config.output_dir, config.training.epochs) == (10, "2026-11-25", 10)
    assert (config.data.cache_dir, config.data.root) == ("010", "1e5")
    section = load_config(write(""), ["data={root: 007, image_size: 064}"]).data
    assert (section.root, section.image_size) == ("007", 64)
    with pytest.raises(ConfigError, match="should be a valid integer, not '1:30'"):
        load_config(write("seed: 1:30\n"))
    assert parse_yaml("{day: 2026-11-25, time: 1:30}", "a plan") == {"day": "2026-11-25", "time": "1:30"}


def test_a_merge_may_be_used_repeatedly(write: Callable[[str], Path]) -> None:
    """A merge of a mapping that is merged itself, with a key of its own, is no repetition of this key."""
    chained = (
        "source: &s {flip_probability: 0.1, blur_probability: 0.2}\n  target: &t {<<: *s, flip_probability: 0.3}\n"
    )
    views = load_config(write(f"views:\n  {chained}  probe: {{<<: *t, blur_probability: 0.4}}\n")).views
    found = [(view.flip_probability, view.blur_probability) for view in (views.source, views.target, views.probe)]
    assert found == [(0.1, 0.2), (0.3, 0.2), (0.3, 0.4)]
    both = "views:\n  source: &s {flip_probability: 0.1}\n  target: &t {blur_probability: 0.2}\n"
    for merges in ("<<: *s, <<: *t", "<<: [*s, *t]"):
        probe = load_config(write(f"{both}  probe: {{{merges}}}\n")).views.probe
        assert (probe.flip_probability, probe.blur_probability) == (0.1, 0.2)
    with pytest.raises(ConfigError, match="line 4: key 'flip_probability' is given twice"):
        load_config(write(f"{both}  probe: {{<<: *t, flip_probability: 0.1, flip_probability: 0.3}}\n"))


def test_a_config_whose_name_is_not_utf8_can_be_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / f"{NOT_UTF8}.yaml"
    path.write_text("seed: 3\n")
    with caplog.at_level(logging.INFO):
        config = load_config(path)
    assert config.output_dir == r"runs/caf\xe9" and "output_dir is" in caplog.text
    assert parse_config(config.to_yaml(), "a checkpoint") == config
    caplog.clear()
    path.rename(tmp_path / "café.yaml")
    with caplog.at_level(logging.INFO):
        assert load_config(tmp_path / "café.yaml").output_dir == "runs/café" and not caplog.text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "output_dir=~nobody-at-all/r",
            "~nobody-at-all has no home folder: write the path in full, or ./~nobody-at-all/r",
        ),
        (f"output_dir=runs/{NOT_UTF8}", r"'runs/caf\udce9' is not a path in utf-8: choose a path in ASCII letters"),
        ("data.root=", "data.root: the path is empty: write a path; . is the current folder"),
        ("data.cache_dir=", "data.cache_dir: the path is empty"),
        (f"data.root={NOT_UTF8}", r"data.root: 'caf\udce9' is not a path in utf-8"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_in_one_line(words: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "config" / "digits.yaml", [words])
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_paths_and_consoles_of_an_ascii_system() -> None:
    """A path that an ASCII system cannot write is refused, from the command line and from a file. Escapes are shown."""
    script = (
        "import sys; from config.reading import load_config; from utils.cli import _Console\n"
        "from config.errors import ConfigError\n"
        "for words in sys.argv[2:]:\n"
        "    try: load_config(sys.argv[1], [words])\n"
        "    except ConfigError as error: print(error, file=_Console(sys.stdout))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "config/digits.yaml", "output_dir=é", r'data={root: "\u00e9"}'],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    advice = "is not a path in ascii: choose a path in ASCII letters, or set PYTHONUTF8=1"
    assert rf"output_dir: '\udcc3\udca9' {advice}" in first and rf"data.root: '\xe9' {advice}" in second


def test_a_console_writes_what_its_encoding_lacks_as_escapes() -> None:
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="ascii")
    print(f"runs/é/{NOT_UTF8}", file=cli._Console(terminal), flush=True)
    assert written.getvalue() == rb"runs/\xe9/caf\udce9" + os.linesep.encode()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_files_as_editors_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a.png", "-b.png", "é #1.png", "c.png "]
    for name in (*names, "d.png"):
        (tmp_path / name).write_text("")
    text = "".join(f"{name}\r\n" for name in names) + "\r\n d.png \r\nmissing \n"
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    assert read_names(Path("list.txt")) == [*names, "d.png", "missing"]
    args = embed.parse(["--checkpoint", "last.pt", "--files", "@list.txt", "./@e.png"])
    assert args.files == [*names, "d.png", "missing", "./@e.png"]


def test_a_list_of_files_is_not_empty_and_keeps_all_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf\r\n \n")
    with pytest.raises(UserError, match=r"the list .*empty.txt is empty"):
        read_names(tmp_path / "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9.png")
    assert read_names(tmp_path / "bytes.txt") == [f"{NOT_UTF8}.png"]
    with pytest.raises(OSError, match="No such file"):
        read_names(tmp_path / "none.txt")


def test_a_folder_in_place_of_a_checkpoint_names_the_file(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"a run is a folder: name a checkpoint file"):
        load_checkpoint(run)
    last = run / "checkpoints" / "last.pt"
    last.write_text("")
    for folder in (run, run / "checkpoints"):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(folder)
        *_, word = shlex.split(str(caught.value))
        assert str(caught.value).startswith(f"{folder} is a folder: use ") and word == str(last)


def test_printed_commands_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my run's folder"
    monkeypatch.setattr(train, "read_results", lambda folder: {"table": {}})
    train.report(Config(output_dir=str(folder)))
    *_, last = capsys.readouterr().out.splitlines()
    assert shlex.split(last) == ["TensorBoard", "tensorboard", "--logdir", str(folder / "tensorboard")]
    values = {"output_dir": "a b's", "data.name": "folder", "sampling.sections": [0, 1], "data.stream": None, "seed": 3}
    words = shlex.split(to_words(values))
    assert words == ["output_dir=a b's", "data.name=folder", "sampling.sections=[0, 1]", "data.stream=null", "seed=3"]


@pytest.mark.parametrize("port", ["abc", "0", "65536", "-1", "29500.0", "²"])
def test_a_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"MASTER_PORT={port} is not a port number"):
        check_launcher()


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": ""}, {"RANK": "0"}, {"RANK": ""}])
def test_a_variable_alone_is_no_launcher(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_launcher()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Function that sets the variables of a launcher. A process that waits says so after 0.05 s."""
    monkeypatch.setattr(rendezvous, "NOTICE_S", 0.05)

    def _group(**variables: object) -> None:
        defaults = {"RANK": 0, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29512}
        for name, value in (defaults | variables).items():
            monkeypatch.setenv(name, str(value))

    return _group


SHORT = timedelta(seconds=0.3)


def test_processes_that_do_not_start_are_named_with_the_variables(
    group: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    group()
    store = dist.HashStore()
    store.set("token 2", "token of another process")
    with pytest.raises(RendezvousError) as caught:
        rendezvous._call_roll(store, 0, 4, rendezvous.Patience(SHORT))
    variables = "RANK=0 WORLD_SIZE=4 MASTER_ADDR=127.0.0.1 MASTER_PORT=29512"
    (notice,) = caplog.messages
    assert notice.startswith(f"waiting: no process with rank 1, 3 has started yet (the environment has {variables})")
    assert "no process with rank 1, 3 has started within 0.005 minutes" in str(caught.value)
    assert f"{variables}: start all processes, or unset RANK and WORLD_SIZE" in str(caught.value)


@pytest.mark.parametrize("with_0", [True, False])
def test_other_ranks_speak_only_if_rank_0_is_missing(
    group: Callable[..., None], caplog: pytest.LogCaptureFixture, with_0: bool
) -> None:
    group(RANK=1)
    store = dist.HashStore()
    if with_0:
        store.set("token 0", "token of rank 0")
    with pytest.raises(RendezvousError):
        rendezvous._call_roll(store, 1, 4, rendezvous.Patience(SHORT))
    assert ["no process with rank 0 has started" in message for message in caplog.messages] == [True] * (not with_0)


def test_rank_0_that_does_not_answer_is_named(
    group: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 1 ends at its own time-out, even if the constructor of the store never returns."""
    answer = Event()
    monkeypatch.setattr(dist, "TCPStore", lambda *args, **keys: answer.wait())
    group(RANK=1)
    with pytest.raises(RendezvousError, match=r"rank 0 has not answered at MASTER_ADDR=127\.0\.0\.1 MASTER_PORT=29512"):
        rendezvous.open_store(1, 4, SHORT)
    answer.set()
    assert len(caplog.messages) == 1 and "rank 0 has not answered" in caplog.text


def test_a_port_in_use_is_reported_immediately(group: Callable[..., None]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        group(MASTER_PORT=other.getsockname()[1])
        with pytest.raises(
            RendezvousError, match=r"cannot be used \(it is in use by another program\): choose another"
        ):
            rendezvous.open_store(0, 4, timedelta(minutes=30))


def test_an_address_that_nobody_knows(
    group: Callable[..., None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*args: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    group(MASTER_ADDR="node17")
    with pytest.raises(RendezvousError, match="has not found the address of MASTER_ADDR=node17"):
        rendezvous.open_store(0, 4, SHORT)
    assert "has not found the address of MASTER_ADDR=node17 yet" in caplog.text


def test_a_failed_rendezvous_ends_the_program_with_status_2(tmp_path: Path) -> None:
    """Nothing is written, and the same line appears if the command has another mistake as well."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "train.py", *digits_args(tmp_path / "run")],
            env={**os.environ, **variables, "MASTER_PORT": str(other.getsockname()[1])},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,  # without the check of the port, it waits for minutes
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: MASTER_PORT=") and not list(tmp_path.iterdir())


# Modules of the standard library, and names in others, that not all operating systems have.
UNIX_MODULES = {"crypt", "fcntl", "grp", "nis", "ossaudiodev", "posix", "pty", "pwd", "resource", "spwd", "syslog"}
UNIX_MODULES |= {"readline", "termios", "tty"}
UNIX_NAMES = {"os.fork", "os.getuid", "os.geteuid", "os.pread", "os.set_blocking", "signal.SIGHUP", "signal.SIGUSR1"}
UNIX_NAMES |= {"signal.SIGUSR2", "signal.SIGKILL", "signal.alarm", "signal.setitimer", "signal.pause"}


def test_no_module_needs_what_windows_lacks() -> None:
    paths = [path for name in FLOORS for path in (ROOT / name).rglob("*.py")] + list(ROOT.glob("*.py"))
    assert len(paths) > 80
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if set(names) & UNIX_MODULES or (isinstance(node, ast.Attribute) and ast.unparse(node) in UNIX_NAMES):
                found.add((str(path.relative_to(ROOT)), ast.unparse(node)))
    # It is imported after a test of the operating system.
    assert found == {("utils/device.py", "import resource")}


def test_a_lock_is_held_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text("process 1 on a machine that was switched off\n")
    lock = lock_file(path)
    with pytest.raises(InUseError, match=f"process {os.getpid()} on "):
        lock_file(path)
    with pytest.raises(InUseError, match=f"process {os.getpid()} on "):  # the attempt has not removed the name
        lock_file(path)
    lock.close()
    with lock_file(path):
        assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError):
        lock_file(tmp_path / "missing" / ".lock")


def test_storage_without_locks_is_used_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*args: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level(logging.INFO), lock_file(tmp_path / ".lock"), lock_file(tmp_path / ".lock"):
        assert caplog.text.count("cannot be locked") == 2
