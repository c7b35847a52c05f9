"""Command-line parsing, error messages and exit statuses that all programs share."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from config.errors import ConfigError, UserError
from config.reading import describe_keys, load_config
from config.schema import Config
from utils import signals
from utils.distributed.collectives import (
    SharedError,
    all_equal,
    barrier,
    destroy_process_groups,
    reason_of_lost_peers,
    set_timeout,
)
from utils.distributed.processes import check_launcher, rank, world_size
from utils.logging import start_logging


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if rank() == 0:
            super()._print_message(message, file)


def make_parser(
    description: str, examples: str, *, prog: str | None = None, of_checkpoint: bool = False
) -> argparse.ArgumentParser:
    """Parser of the options that all programs share.

    Args:
        of_checkpoint: the program looks at a checkpoint, which holds its own config; then --config is optional.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=f"examples:\n{examples}\n\n{describe_keys()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=not of_checkpoint, help="YAML file of the experiment, e.g. config/cifar10.yaml"
    )
    if of_checkpoint:
        parser.add_argument(
            "--checkpoint",
            type=Path,
            help="default: checkpoints/last.pt in the config's output_dir; without --config, its own config holds",
        )
    parser.add_argument(
        "--use_amp",
        action="store_true",
        help="mixed precision, as training.use_amp=true: bf16 where the hardware computes it",
    )
    # torch.distributed.launch passes it, in either spelling; the environment says the same.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="any key of the config, e.g. training.epochs=2"
    )
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """The config of the command line, the same in all processes but for where the images are; raises ConfigError."""
    config = load_config(args.config, overrides(args))
    set_timeout(config.distributed.timeout_minutes)
    data = config.data.model_copy(update={"root": "", "cache_dir": ""})
    if not all_equal(config.model_copy(update={"data": data})):
        raise ConfigError(f"the processes read different configs from {args.config}: give them all the same")
    return config


def read_config_if_named(args: argparse.Namespace) -> Config | None:
    """`read_config`, or None where only a checkpoint is named."""
    if not (args.config or args.checkpoint):
        raise ConfigError("name what to look at: --config config/digits.yaml, or --checkpoint PATH")
    return read_config(args) if args.config else None


def overrides(args: argparse.Namespace) -> list[str]:
    """Overrides of the config on the command line, as key=value."""
    return [*args.overrides, *(["training.use_amp=true"] if args.use_amp else [])]


@contextmanager
def gather_user_errors() -> Iterator[None]:
    """Collective. A UserError or OSError of any process inside ends all: rank 0 prints one line, the status is 2.

    Inside, processes use `all_gather_object` and what is built on it, and no collective of tensors; `open_tensor_group`
    may be called. If one process fails, the others raise at their next collective.
    """
    try:
        try:
            yield
            barrier()
        except (UserError, OSError) as error:
            if isinstance(error, SharedError):
                raise
            if isinstance(error, OSError) and error.filename:
                barrier(error=f"cannot use {error.filename}: {error.strerror}")
            barrier(error=str(error))
    except SharedError as failure:
        if rank() == 0:
            print(f"error: {failure}", file=sys.stderr, flush=True)
        if world_size() > 1:
            # A launcher that sees one process end sends SIGTERM to the others: let all end with the same status, and
            # none before the line is printed.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            barrier()
        sys.exit(2)


def _leave(status: int, message: str) -> NoReturn:
    """End this process at once, even if others wait for it in a collective."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher that has seen another process end
    if message:
        print(message, file=sys.stderr, flush=True)
    if world_size() > 1:
        logging.shutdown()
        os._exit(status)
    sys.exit(status)


class _Console:
    """A stream that leads nowhere once it cannot be written to, as on a full disk or where a terminal or `tee` died."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 (the process ends with it)

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


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program and exit, together with the other processes.

    The exit status is 0 if the program finished; 2 after an error that the user can mend; 75 if a signal stopped it or
    the other processes are lost, in which case the same command resumes; anything else is a bug.

    A UserError that leaves `main` ends this process alone, at once: the others may be waiting for tensors, and NCCL
    would wait for all. A launcher ends them when it sees this process end.
    """
    try:
        check_launcher()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
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
    except SharedError as error:  # raised on all ranks at the same step
        _leave(2, f"error: {error}" if rank() == 0 else "")
    except UserError as error:
        _leave(2, f"error: {error}")
    except RuntimeError as error:
        reason = reason_of_lost_peers(error)
        if reason is None:
            raise
        advice = "see what they printed; if they printed no error, the same command resumes"
        _leave(signals.STATUS, f"error: rank {rank()} has lost the other processes ({reason}): {advice}")
    destroy_process_groups()
    sys.exit(status)
