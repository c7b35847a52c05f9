"""Rendezvous of processes that start together, in a store that may still hold the keys of an earlier start."""

import hashlib
import logging
import os
import socket
import time
import uuid
from concurrent.futures import wait
from datetime import timedelta

import torch.distributed as dist

from utils.distributed.collectives import run_in_thread
from utils.distributed.processes import RendezvousError

POLL_S = 0.02
NOTICE_S = 4.0  # a process that waits for longer says for whom

logger = logging.getLogger(__name__)


class Patience:
    """The time that this process has waited for the others, from the creation of this object on.

    Args:
        timeout: time after which `pause_or_give_up` raises RendezvousError.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout, self._start, self._noticed = timeout, time.monotonic(), False

    def pause_or_give_up(self, reason: str, notice: bool = True) -> None:
        """Pauses for a moment, longer if this process has waited for long.

        Raises RendezvousError after the time-out. Logs a warning, once, if this takes longer than NOTICE_S.

        Args:
            reason: sentence that says who or what is missing.
            notice: False: no warning, because another process logs it.
        """
        waited = time.monotonic() - self._start
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        variables = " ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        if waited > self._timeout.total_seconds():
            raise RendezvousError(
                f"{reason} within {self._timeout.total_seconds() / 60:g} minutes, but the environment has {variables}: "
                "start all processes, or unset RANK and WORLD_SIZE to run a single one"
            )
        if waited > NOTICE_S and notice and not self._noticed:
            self._noticed = True
            logger.warning(
                "waiting: %s yet (the environment has %s). To run a single process, stop this one and unset RANK and "
                "WORLD_SIZE",
                reason,
                variables,
            )
        time.sleep(min(max(POLL_S, waited / 100), 1.0))


def open_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Collective. Returns the launcher's store, under a prefix that only the processes of this start know.

    torchrun keeps one store over its restarts (pytorch/pytorch#135712). In this store, gloo and NCCL may find the
    address of a process that was killed. torchrun gives the processes no restart number on which all machines agree.
    Therefore each rank writes a random token of its own, and rank 0 publishes the list of tokens again and again until
    all ranks have confirmed the same list. The prefix is a digest of this list.

    Raises RendezvousError if this takes longer than `timeout`, or if rank 0 cannot open its port.
    """
    patience = Patience(timeout)
    store = _connect(rank, timeout, patience)
    return dist.PrefixStore(_call_roll(dist.PrefixStore("roll", store), rank, world_size, patience), store)


def _connect(rank: int, timeout: timedelta, patience: Patience) -> dist.Store:
    """Returns the store at MASTER_ADDR and MASTER_PORT. Rank 0 opens it first, unless torchrun has done so.

    Raises RendezvousError if the port cannot be opened, or if nothing answers there until the time-out.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    while not _is_known(address, port):  # torch would print a line per second
        patience.pause_or_give_up(f"this machine has not found the address of MASTER_ADDR={address}")
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    # A thread, because the constructor may wait for longer than its time-out if another program answers.
    opening = run_in_thread(
        lambda: dist.TCPStore(
            address,
            port,
            is_master=serves,
            timeout=2 * timeout,
            wait_for_workers=False,
            multi_tenant=True,
            use_libuv=os.environ.get("USE_LIBUV", "1") == "1",  # as in torch.distributed.rendezvous
        )
    )
    while wait([opening], POLL_S).not_done:
        patience.pause_or_give_up(f"rank 0 has not answered at MASTER_ADDR={address} MASTER_PORT={port}")
    try:
        store = opening.result()
    except dist.DistError as error:
        first = str(error).partition("\n")[0]
        reason = "it is in use by another program" if "EADDRINUSE" in first else first
        raise RendezvousError(
            f"MASTER_PORT={port} of MASTER_ADDR={address} cannot be used ({reason}): choose another port "
            "(torchrun --master-port), or unset RANK and WORLD_SIZE to run a single process"
        ) from None
    store.set_timeout(timeout)
    return store


def _is_known(address: str, port: int) -> bool:
    """Returns True if this machine can look up the network address."""
    try:
        return bool(socket.getaddrinfo(address, port))
    except (OSError, UnicodeError):  # UnicodeError: no valid name of a machine
        return False


def _call_roll(store: dist.Store, rank: int, world_size: int, patience: Patience) -> str:
    """Collective. Returns a digest of the tokens of all ranks, the same on all ranks. Raises RendezvousError."""
    token, ranks = uuid.uuid4().hex, range(world_size)
    store.set(f"token {rank}", token)
    while True:
        missing = [other for other in ranks if not store.check([f"token {other}"])] if rank == 0 else []
        if rank == 0 and not missing:
            store.set("tokens", " ".join(store.get(f"token {other}").decode() for other in ranks))
        called = store.get("tokens").decode() if store.check(["tokens"]) else ""
        roll, tokens = hashlib.sha256(called.encode()).hexdigest(), called.split()
        if len(tokens) == world_size and tokens[rank] == token:  # else the list is from an earlier start
            store.set(f"answer {rank}", roll)
            if rank == 0:
                missing = missing or [other for other in ranks if not _holds(store, f"answer {other}", roll)]
                if not missing:
                    store.set("complete", roll)
            if _holds(store, "complete", roll):
                return roll
        if rank > 0 and not store.check(["token 0"]):
            missing = [0]
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        # Rank 0 says whom all of them wait for. The others speak only if rank 0 itself is missing.
        patience.pause_or_give_up(
            f"no process with rank {shown} has started" if missing else "not all ranks have started", bool(missing)
        )


def _holds(store: dist.Store, key: str, value: str) -> bool:
    return store.check([key]) and store.get(key).decode() == value
