"""What processes do in turns, and what they decide together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from utils.distributed import exchange, local_rank, rank, world_size

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
SIGN_OF_LIFE_S = 5.0


def first_on_each_node(work: Callable[[], T]) -> T:
    """`work()` in all processes, but in turns: what it downloads or caches is there for those that come later.

    Rank 0 goes first, then one process on each other machine, which may share rank 0's storage, then the others. If it
    can fail, this is to be called inside `user_errors`, which tells the others. It may take longer than the time-out:
    who works gives signs of life.
    """
    if world_size() == 1:
        return work()
    mine = 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    result: Any = None
    for turn in range(3):
        working = _begin(work) if turn == mine else None
        anybody = True
        while anybody:
            busy = working is not None and bool(wait([working], SIGN_OF_LIFE_S).not_done)
            if working is not None and not busy:
                result = working.result()
            anybody = any(exchange(busy))
    return result


def _begin(work: Callable[[], T]) -> Future[T]:
    """Work in a thread that a process, once it learns that another has failed, can leave behind."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


class Agreement:
    """What processes wish for, known to all of them at the same step, without waiting for any device.

    In a single process, at once; else one call later: each call starts a small reduction over gloo, which goes
    on in the background, and waits for the one before.
    """

    def __init__(self) -> None:
        self._asked: tuple[torch.Tensor, Any] | None = None

    def __call__(self, *wishes: int) -> tuple[int, ...]:
        """The greatest of all processes' wishes, 0 for none, of which there are as many in each call."""
        if world_size() == 1:
            return wishes
        import torch
        import torch.distributed as dist

        answer = self.wait() or (0,) * len(wishes)
        values = torch.tensor(wishes)
        self._asked = values, dist.all_reduce(values, dist.ReduceOp.MAX, async_op=True)
        return answer

    def wait(self) -> tuple[int, ...]:
        """The answer to the last call; nothing if there was none."""
        if self._asked is None:
            return ()
        values, work = self._asked
        self._asked = None
        work.wait()
        return tuple(values.tolist())
