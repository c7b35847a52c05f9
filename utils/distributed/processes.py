"""Rank and world size of this process, read from the environment variables of a launcher. Does not import torch.

torchrun and torch.distributed.launch set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Without these variables,
the program is a single process.
"""

import os


class RendezvousError(Exception):
    """Processes of the program that do not find each other when they start. The message says what to do.

    It is no UserError, because it cannot be reported to the other processes.
    """


def _from_launcher(name: str, default: int) -> int:
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ  # some clusters set one of the two for their own use
    return int(os.environ.get(name, default)) if launched else default


def rank() -> int:
    """Returns the index of this process among all processes, from 0. Rank 0 writes the files."""
    return _from_launcher("RANK", 0)


def world_size() -> int:
    """Returns the number of processes of the program, over all machines."""
    return _from_launcher("WORLD_SIZE", 1)


def local_rank() -> int:
    """Returns the index of this process among the processes of its machine, from 0. It determines the GPU."""
    return _from_launcher("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Returns the number of processes on this machine."""
    return _from_launcher("LOCAL_WORLD_SIZE", 1)


def check_launcher() -> None:
    """Raises ValueError if the launcher's environment variables are invalid or contradict each other."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = {name: os.environ[name] for name in names if name in os.environ}
    advice = "start several processes with torchrun, or unset RANK and WORLD_SIZE to run a single one"
    try:
        fits = 0 <= rank() < world_size() and local_rank() >= 0 and local_world_size() > 0
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"invalid launcher variables {' '.join(f'{name}={value}' for name, value in found.items())}: {advice}"
        )
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if world_size() > 1 and not (address and port):
        raise ValueError(f"WORLD_SIZE is {world_size()}, but MASTER_ADDR or MASTER_PORT is missing: {advice}")
    if world_size() > 1 and not (port and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"MASTER_PORT={port} is not a port number from 1 to 65535: correct it. Or {advice}")


def my_range(total: int, multiple: int = 1) -> range:
    """Returns this rank's part of range(total): consecutive numbers that start at a multiple of `multiple`.

    The parts of the ranks are as equal in length as this allows.
    """
    pieces = -(-total // multiple)
    start, stop = (pieces * r // world_size() * multiple for r in (rank(), rank() + 1))
    return range(min(start, total), min(stop, total))
