"""Threads that share torch's work on the CPU."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


def map_in_threads(function: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    """Returns function(item) for each item. As many threads as torch's number of threads share the items.

    In these threads, each operation of torch uses one thread. This is faster than many short operations that use all
    threads each, because those wait for each other.
    """
    if len(items) == 1 or torch.get_num_threads() == 1:
        return [function(item) for item in items]
    return list(_serial_threads(torch.get_num_threads(), os.getpid()).map(function, items))


@cache
def _serial_threads(count: int, process: int) -> ThreadPoolExecutor:
    """Starts `count` threads in which torch's operations use one thread. A forked process needs threads of its own.

    A thread of the program that first uses torch while this function runs is limited to one thread as well.
    """
    pool, all_started = ThreadPoolExecutor(count), threading.Barrier(count, timeout=60)

    def start() -> None:
        torch.set_num_threads(1)  # for this thread, and for all threads that have not used torch yet
        torch.get_num_threads()  # the first use of torch; a later one would read the number that is set below
        all_started.wait()

    try:
        for started in [pool.submit(start) for _ in range(count)]:
            started.result()
    finally:
        torch.set_num_threads(count)
    return pool
