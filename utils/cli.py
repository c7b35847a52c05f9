"""Command-line parsing, error messages and exit statuses of all programs."""

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from config.errors import ConfigError, UserError
from config.keys import describe_keys
from config.reading import load
from config.schema import Config, RunConfig
from utils import signals
from utils.distributed.collectives import (
    SharedError,
    all_equal,
    barrier,
    destroy_process_groups,
    reason_of_lost_peers,
    set_timeout,
)
from utils.distributed.processes import RendezvousError, check_launcher, rank, world_size
from utils.logging import start_logging

C = TypeVar("C", bound=RunConfig)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if rank() == 0:
            super()._print_message(message, file)


def path_option(text: str) -> Path:
    """Returns the path in an option, for argparse. Raises ArgumentTypeError if it is empty."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: write a path")
    return Path(text)


def make_parser(
    description: str,
    examples: str,
    *,
    prog: str | None = None,
    of_checkpoint: bool = False,
    schema: type[RunConfig] = Config,
) -> argparse.ArgumentParser:
    """Returns a parser with the options that all programs share.

    Args:
        prog: name of the program in the help text; None: the name of the script.
        of_checkpoint: True if the program opens a checkpoint. --config is then optional, because the checkpoint
            contains its own config.
        schema: class of the program's config.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=f"examples:\n{examples}\n\n{describe_keys(schema)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=not of_checkpoint, help="config file (YAML) of the experiment, e.g. config/cifar10.yaml"
    )
    if of_checkpoint:
        parser.add_argument(
            "--checkpoint",
            type=path_option,
            help="checkpoint file; default: checkpoints/last.pt in the run folder of --config (key output_dir); "
            "without --config, the config stored in the checkpoint is used",
        )
        parser.add_argument(
            "--timestep",
            type=int,
            metavar="T",
            help="timestep of z, if the encoder depends on it (encoder.time_dependent); from 0, the least noise",
        )
    parser.add_argument(
        "--use_amp",
        action="store_true",
        help="use mixed precision, bf16 if the hardware computes it; the same as training.use_amp=true",
    )
    # torch.distributed.launch passes this option in either spelling. LOCAL_RANK has the same value, so it is ignored.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    from_checkpoint = (
        "; seed and all keys of views, diffusion and training are taken from the checkpoint, and values given here are "
        "ignored, except for views.probe and training.use_amp"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replace the value of a config key (listed below), e.g. evaluation.batch_size=64"
        + (from_checkpoint if of_checkpoint else ""),
    )
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """Collective. Returns the config of train.py on the command line, as `read` does."""
    return read(Config, args)


def read(schema: type[C], args: argparse.Namespace) -> C:
    """Collective. Returns the config of the command line.

    Raises ConfigError if the config is wrong, or if it is not the same on all ranks. Only data.root and data.cache_dir
    may differ between ranks.
    """
    config = load(schema, args.config, overrides(args))
    set_timeout(config.distributed.timeout_minutes)
    data = config.data.model_copy(update={"root": "", "cache_dir": ""})
    if not all_equal(config.model_copy(update={"data": data})):
        raise ConfigError(f"the processes read different configs from {args.config}: give all of them the same config")
    return config


def read_config_if_named(args: argparse.Namespace) -> Config | None:
    """Collective. Returns the config of `read_config`, or None if only --checkpoint is given.

    Raises ConfigError if neither --config nor --checkpoint is given, and in the cases in which `read_config` raises it.
    """
    if not (args.config or args.checkpoint):
        raise ConfigError(
            "neither a config nor a checkpoint is given: add --config config/digits.yaml, or --checkpoint PATH"
        )
    return read_config(args) if args.config else None


def overrides(args: argparse.Namespace) -> list[str]:
    """Returns the overrides on the command line, each as key=value."""
    return [*args.overrides, *(["training.use_amp=true"] if args.use_amp else [])]


def require(*modules: str) -> None:
    """Raises ConfigError if a module is not installed. The message names all missing modules."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        verb = "are" if len(missing) > 1 else "is"
        raise ConfigError(f"{', '.join(missing)} {verb} not installed: run pip install -r requirements-extra.txt")


@contextmanager
def gather_user_errors() -> Iterator[None]:
    """Collective. Ends all ranks with status 2 if any rank raises UserError or OSError inside the context.

    Rank 0 prints the error as one line. Inside the context, use only `all_gather_object` and the functions that are
    built on it, and no collective of tensors, except `open_tensor_group`. If one rank fails, the others raise
    SharedError at their next collective.
    """
    try:
        try:
            yield
            barrier()
        except (UserError, OSError) as error:
            if isinstance(error, SharedError):
                raise
            if isinstance(error, OSError) and error.filename:
                barrier(error=f"cannot use {error.filename} ({error.strerror}): fix it or choose another path")
            barrier(error=str(error))
    except SharedError as failure:
        if rank() == 0:
            print(f"error: {failure}", file=sys.stderr, flush=True)
        if world_size() > 1:
            # A launcher that sees one process end sends SIGTERM to the others. They ignore it, so that all end with the
            # same status. At the barrier they wait until the line is printed.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            barrier()
        sys.exit(2)


def _leave(status: int, message: str) -> NoReturn:
    """Prints `message` and ends this process immediately, even if other ranks wait for it in a collective."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it after another process has ended
    if message:
        print(message, file=sys.stderr, flush=True)
    if world_size() > 1:
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


class _Console:
    """Stream that discards its output after a failed write: a full disk, or a terminal or `tee` that has ended.

    Characters that its encoding lacks, as in paths on an ASCII terminal, are written as escapes such as \\xe9.
    """

    def __init__(self, stream: TextIO | None) -> None:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., Any], *args: str) -> None:
        try:
            call(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def set_wait_policy() -> None:
    """Makes OpenMP's threads sleep while they wait, unless the user has set OMP_WAIT_POLICY.

    Call it before torch is imported, because OpenMP reads this variable then. By default, its threads spin before they
    sleep, which is slow if another program uses the cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a program and exits with its status.

    The exit status is 0 if the program finished and 2 after an error that the user can fix. It is 75 if a signal
    or the time limit of `ablations.ablate` stopped the program, or if it has lost the other processes. In each case,
    the same command resumes. It is 130 after a second Ctrl-C. It is 1 after a bug, with a traceback, and if a run of
    `ablations.ablate` failed.

    After a UserError in `main`, this process exits immediately, without waiting for the others. They may be inside a
    collective of tensors, and closing NCCL would wait for all of them. The launcher ends them when this process has
    ended.
    """
    try:
        check_launcher()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    set_wait_policy()
    signals.watch()
    start_logging()
    for name in ("stdout", "stderr"):
        setattr(sys, name, _Console(getattr(sys, name)))
    status: Any
    try:
        status = main()
    except signals.Stopped as stopped:
        _leave(signals.STATUS, stopped.message if rank() == 0 else "")
    except SystemExit as ended:
        status = ended.code
    except RendezvousError as error:
        _leave(2, f"error: {error}")
    except SharedError as error:  # raised on all ranks at the same step
        _leave(2, f"error: {error}" if rank() == 0 else "")
    except UserError as error:
        _leave(2, f"error: {error}")
    except RuntimeError as error:
        reason = reason_of_lost_peers(error)
        if reason is None:
            raise
        advice = "look at their output; if it shows no error, the same command resumes the run"
        _leave(signals.STATUS, f"error: rank {rank()} has lost the other processes ({reason}): {advice}")
    destroy_process_groups()
    sys.exit(status)
