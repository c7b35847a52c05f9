"""What the programs' command lines share."""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from utils.config import Config
from utils.config_file import describe_keys, load_config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


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
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="any key of the config, e.g. training.epochs=2"
    )
    return parser


def read_config(args: argparse.Namespace) -> Config:
    return load_config(args.config, args.overrides + (["training.use_amp=true"] if args.use_amp else []))


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """A mistake of the user's ends the program with one line and exit status 2; a bug keeps its traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        yield
    except kinds as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
