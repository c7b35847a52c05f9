"""Rendezvous of the processes of one start, in a store that may still hold the keys of an earlier start."""

import hashlib
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_S = 0.02


def open_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The launcher's store behind a prefix that only the processes of this start know.

    torchrun keeps one store over its restarts (pytorch/pytorch#135712), and what gloo and NCCL find there may be the
    address of a process that was killed. No number of the restart that all machines agree on is given to the
    processes: each puts down a token of its own, and rank 0 calls the roll until all have answered to the same one.
    Raises RuntimeError if that takes longer than `timeout`.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore(_call_roll(dist.PrefixStore("roll", store), rank, world_size, timeout), store)


def _call_roll(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Digest of all processes' tokens, the same on all ranks."""
    until, token = time.monotonic() + timeout.total_seconds(), uuid.uuid4().hex
    store.set(f"token {rank}", token)
    while time.monotonic() < until:
        if rank == 0:
            store.set("tokens", " ".join(store.get(f"token {other}").decode() for other in range(world_size)))
        called = store.get("tokens").decode()
        roll, tokens = hashlib.sha256(called.encode()).hexdigest(), called.split()
        if len(tokens) == world_size and tokens[rank] == token:  # else it is an earlier start's
            store.set(f"answer {rank}", roll)
            if rank == 0 and all(_holds(store, f"answer {other}", roll) for other in range(world_size)):
                store.set("complete", roll)
            if _holds(store, "complete", roll):
                return roll
        time.sleep(POLL_S)
    raise RuntimeError(f"Timed out waiting {timeout} for all processes to start")


def _holds(store: dist.Store, key: str, value: str) -> bool:
    return store.check([key]) and store.get(key).decode() == value
