"""What the programs' command lines share."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from utils import signals
from utils.config import Config, ConfigError
from utils.config_file import describe_keys, load_config
from utils.distributed import (
    SharedError,
    check_launcher,
    exchange,
    lost,
    rank,
    same_everywhere,
    set_timeout,
    stop,
    world_size,
)
from utils.logging import start_logging


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if rank() == 0:
            super()._print_message(message, file)


def check_place() -> None:
    """End with one line and status 2 where the environment does not say which process of how many this is."""
    try:
        check_launcher()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def make_parser(
    description: str, examples: str, *, prog: str | None = None, of_checkpoint: bool = False
) -> argparse.ArgumentParser:
    """What all programs take; those `of_checkpoint` look at one, which holds its own config, and can do without it."""
    check_place()
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
    if not same_everywhere(config.model_copy(update={"data": data})):
        raise ConfigError(f"the processes read different configs from {args.config}: give them all the same")
    return config


def read_config_if_named(args: argparse.Namespace) -> Config | None:
    """`read_config`, or None where only a checkpoint is named."""
    if not (args.config or args.checkpoint):
        raise ConfigError("name what to look at: --config config/digits.yaml, or --checkpoint PATH")
    return read_config(args) if args.config else None


def overrides(args: argparse.Namespace) -> list[str]:
    """What the command line says of the config, as key=value."""
    return [*args.overrides, *(["training.use_amp=true"] if args.use_amp else [])]


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """A mistake of the user's, in any process, ends all of them: one line, exit status 2. A bug keeps its traceback.

    Mistakes are errors of these `kinds`, and OSError.

    Inside, processes meet by `exchange` and what is made of it, so that wherever one of them fails, the others learn of
    it where they meet next. Tensors do not travel inside; `start` may be called, which meets by `exchange` first.
    """
    start_logging()
    mistakes: tuple[type[Exception], ...] = (*kinds, OSError)
    try:
        try:
            yield
            exchange()
        except mistakes as error:
            if isinstance(error, OSError) and error.filename:
                exchange(error=f"cannot use {error.filename}: {error.strerror}")
            exchange(error=str(error))
    except SharedError as failure:
        if rank() == 0:
            print(f"error: {failure}", file=sys.stderr, flush=True)
        if world_size() > 1:
            # A launcher that sees one process end sends the others SIGTERM: let them all end with the same status,
            # and none before the line is out.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            exchange()
        sys.exit(2)


@contextmanager
def errors_under_way(*kinds: type[Exception]) -> Iterator[None]:
    """A mistake of these `kinds` ends this process with one line and status 2, where the others are not to be met.

    They may be waiting for tensors. A launcher ends them when it sees this one end, which therefore does not take leave
    of them: NCCL would wait for all.
    """
    try:
        yield
    except kinds as error:
        _leave(2, f"error: {error}")
    except SharedError as error:  # raised by all at the same step
        _leave(2, f"error: {error}" if rank() == 0 else "")


def _leave(status: int, message: str) -> NoReturn:
    """End this process, which may be in the middle of a meeting with others."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher that has seen another one end
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
    """Run a program and leave, together with the other processes.

    The exit status: 0, finished; 2, a mistake of the user's; 75, stopped by a signal or left alone by the other
    processes, where the same command goes on; anything else is a bug.
    """
    signals.watch()
    for name in ("stdout", "stderr"):
        setattr(sys, name, _Console(getattr(sys, name)))
    status: Any
    try:
        status = main()
    except signals.Stopped as stopped:
        _leave(signals.STATUS, stopped.message if rank() == 0 else "")
    except SystemExit as ended:
        status = ended.code
    except RuntimeError as error:
        reason = lost(error)
        if reason is None:
            raise
        advice = "if none of them says why, the same command goes on"
        _leave(signals.STATUS, f"error: rank {rank()} has lost the others ({reason}): {advice}")
    stop()
    sys.exit(status)
