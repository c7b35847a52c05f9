"""Rendezvous of processes that start together, in a store that may still hold the keys of an earlier start."""

import hashlib
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_S = 0.02


def open_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Collective. Returns the launcher's store, under a prefix that only the processes of this start know.

    torchrun keeps one store over its restarts (pytorch/pytorch#135712). In this store, gloo and NCCL may find the
    address of a process that was killed. torchrun gives the processes no restart number on which all machines agree.
    Therefore each rank writes a random token of its own, and rank 0 publishes the list of tokens again and again until
    all ranks have confirmed the same list. The prefix is a digest of this list.

    Raises RuntimeError if this takes longer than `timeout`.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore(_call_roll(dist.PrefixStore("roll", store), rank, world_size, timeout), store)


def _call_roll(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Collective. Returns a digest of the tokens of all ranks, the same on all ranks. Raises RuntimeError."""
    until, token = time.monotonic() + timeout.total_seconds(), uuid.uuid4().hex
    store.set(f"token {rank}", token)
    while time.monotonic() < until:
        if rank == 0:
            store.set("tokens", " ".join(store.get(f"token {other}").decode() for other in range(world_size)))
        called = store.get("tokens").decode()
        roll, tokens = hashlib.sha256(called.encode()).hexdigest(), called.split()
        if len(tokens) == world_size and tokens[rank] == token:  # else the list is from an earlier start
            store.set(f"answer {rank}", roll)
            if rank == 0 and all(_holds(store, f"answer {other}", roll) for other in range(world_size)):
                store.set("complete", roll)
            if _holds(store, "complete", roll):
                return roll
        time.sleep(POLL_S)
    raise RuntimeError(f"Timed out waiting {timeout} for all processes to start")


def _holds(store: dist.Store, key: str, value: str) -> bool:
    return store.check([key]) and store.get(key).decode() == value
