"""What the programs' command lines share."""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from utils.config import Config, ConfigError
from utils.config_file import describe_keys, load_config
from utils.distributed import SharedError, exchange, rank, stop, world_size


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if rank() == 0:
            super()._print_message(message, file)


def make_parser(description: str, examples: str) -> argparse.ArgumentParser:
    parser = _Parser(
        description=description,
        epilog=f"examples:\n{examples}\n\n{describe_keys()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file of the experiment, e.g. config/cifar10.yaml")
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
    return load_config(args.config, args.overrides + (["training.use_amp=true"] if args.use_amp else []))


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """A mistake of the user's, in any process, ends all of them: one line, exit status 2. A bug keeps its traceback.

    Inside, processes may meet by `exchange` and what is made of it, and by nothing else: wherever one of them fails,
    the others learn of it where they meet next.
    """
    logging.basicConfig(level=logging.INFO if rank() == 0 else logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        try:
            yield
            exchange()
        except kinds as error:
            exchange(error=error)
    except SharedError as failure:
        if rank() == 0:
            print(f"error: {failure.error}", file=sys.stderr, flush=True)
        if world_size() > 1:
            # A launcher that sees one process end sends the others SIGTERM: let them all end with the same status,
            # and none before the line is out.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            exchange()
        sys.exit(2)


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program and leave, together with the other processes."""
    status = main()
    stop()
    sys.exit(status)
