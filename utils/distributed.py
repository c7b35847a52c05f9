"""Rank, world size, and how processes meet. In a single process every call does the obvious thing.

Launchers (torchrun, torch.distributed.launch) tell a process its place by environment variables. Small objects go
through gloo on the host (`exchange`), tensors through the group that `start` opens (`all_reduce`). torch is imported
where it is needed, since a mistake in the config is answered without it.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")
logger = logging.getLogger(__name__)

_group: ProcessGroup | None = None
_timeout = timedelta(minutes=30)


def _from_launcher(name: str, default: int) -> int:
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ  # some clusters set one of them for their own use
    return int(os.environ.get(name, default)) if launched else default


def check_launcher() -> None:
    """Raise ValueError where the environment does not say which process of how many this is."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = {name: os.environ[name] for name in names if name in os.environ}
    advice = "start several processes with torchrun, or unset RANK and WORLD_SIZE"
    try:
        fits = 0 <= rank() < world_size() and local_rank() >= 0 and local_world_size() > 0
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{' '.join(f'{name}={value}' for name, value in found.items())} makes no sense: {advice}")
    if world_size() > 1 and not ("MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ):
        raise ValueError(f"WORLD_SIZE is {world_size()}, and MASTER_ADDR or MASTER_PORT is missing: {advice}")


def rank() -> int:
    """This process among all, 0 first. Files are written by rank 0."""
    return _from_launcher("RANK", 0)


def world_size() -> int:
    """How many processes train together."""
    return _from_launcher("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process among those of its machine. Devices are picked by it."""
    return _from_launcher("LOCAL_RANK", 0)


def local_world_size() -> int:
    """How many processes this machine has."""
    return _from_launcher("LOCAL_WORLD_SIZE", 1)


class SharedError(Exception):
    """A mistake in some process, raised in all of them."""


def exchange(value: Any = None, error: str | None = None) -> list[Any]:
    """Every process's `value`, a picklable object, by rank. If any comes with an error, all raise it as SharedError."""
    answers = [(value, error)]
    if world_size() > 1:
        import torch.distributed as dist

        if not dist.is_initialized():
            from utils.rendezvous import open_store

            store = open_store(rank(), world_size(), _timeout)
            dist.init_process_group("gloo", store=store, rank=rank(), world_size=world_size(), timeout=_timeout)
        answers *= world_size()
        dist.all_gather_object(answers, (value, error))
    for _, failure in answers:
        if failure is not None:
            raise SharedError(failure)
    return [answer for answer, _ in answers]


def from_rank_0(value: T) -> T:
    """Rank 0's value of a picklable object, on all ranks."""
    return exchange(value)[0]


def same_everywhere(value: Any) -> bool:
    """Whether a picklable object is equal on all ranks; the answer is the same on all ranks."""
    first, *others = exchange(value)
    return all(other == first for other in others)


def set_timeout(minutes: float) -> None:
    """A process that waits for the others for longer fails; to be called before processes first meet."""
    global _timeout
    _timeout = timedelta(minutes=minutes)


def start(backend: str, device: torch.device) -> None:
    """Open the group that tensors on `device` travel through; all processes call it together.

    Args:
        backend: `nccl`, `gloo` or `auto`. NCCL needs a GPU for each process; without, it is gloo on all ranks.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist
    from torch import cuda

    global _group
    can_nccl = device.type == "cuda" and cuda.device_count() >= local_world_size() and dist.is_nccl_available()
    all_can = all(exchange(can_nccl))
    chosen = "gloo" if backend == "gloo" or not all_can else "nccl"
    if backend == "nccl" and not all_can:
        logger.info("distributed.backend is nccl, which needs a GPU for each process: taking gloo")
    # NCCL's own watchdog would end the process without a word before gloo, which decisions travel by, speaks up.
    timeout = 2 * _timeout if chosen == "nccl" else _timeout
    _group = cast("ProcessGroup", dist.new_group(backend=chosen, timeout=timeout))


def group() -> ProcessGroup | None:
    """The group that `start` opened; None before, and in a single process."""
    return _group


def backend() -> str:
    """What tensors travel by: nccl or gloo."""
    import torch.distributed as dist

    return str(dist.get_backend(_group))


def stop() -> None:
    """Leave the other processes."""
    global _group
    if world_size() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        _group = None


def lost(error: RuntimeError) -> str | None:
    """Why the other processes cannot be reached, where that is what an error of a collective says; else None.

    gloo has no exception of its own.
    """
    if world_size() == 1:
        return None
    import torch.distributed as dist

    text = str(error)
    signs = ("Connection closed by peer", "Connection reset", "Connection refused", "Broken pipe", "Timed out waiting")
    found = [sign for sign in signs if sign in text]
    if not found and not isinstance(error, dist.DistError):
        return None
    return found[0] if found else " ".join(text.split())[:200]


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by its sum over all processes; returns it."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor, group=_group)
    return tensor


def share(total: int, multiple: int = 1) -> range:
    """This process's part of 0..total-1: consecutive, starting at a multiple, as even as that allows."""
    pieces = -(-total // multiple)
    start, stop = (pieces * r // world_size() * multiple for r in (rank(), rank() + 1))
    return range(min(start, total), min(stop, total))
