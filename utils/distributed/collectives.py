"""Collective operations, named as in torch.distributed. In a single process they return immediately.

Call a function marked "Collective" on all ranks. Picklable objects are sent through gloo on the host. Tensors are sent
through the group that `open_tensor_group` opens. torch is imported inside the functions, so that a mistake in the
config is reported without waiting for this import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar, cast

from config.errors import UserError
from utils.distributed.processes import local_rank, local_world_size, my_range, rank, world_size

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

In = TypeVar("In")
T = TypeVar("T")
SIGN_OF_LIFE_S = 5.0
logger = logging.getLogger(__name__)

_tensor_group: ProcessGroup | None = None
_timeout = timedelta(minutes=30)


class SharedError(UserError):
    """An error of one rank, raised on all ranks."""


def set_timeout(minutes: float) -> None:
    """Sets the time after which a rank that waits for other ranks fails. Call it before the first collective."""
    global _timeout
    _timeout = timedelta(minutes=minutes)


def init() -> None:
    """Collective. Opens the default process group (gloo, on the host) if it is not open yet.

    Raises RendezvousError if the other ranks do not start, or if the port of the rendezvous is in use.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        from utils.distributed.rendezvous import open_store

        store = open_store(rank(), world_size(), _timeout)
        dist.init_process_group("gloo", store=store, rank=rank(), world_size=world_size(), timeout=_timeout)


def all_gather_object(value: T, error: str | None = None) -> list[T]:
    """Collective. Returns the picklable `value` of every rank, in the order of ranks.

    Raises SharedError on all ranks if any rank passes an `error`.
    """
    answers: list[tuple[T, str | None]] = [(value, error)]
    if world_size() > 1:
        import torch.distributed as dist

        init()
        answers *= world_size()
        dist.all_gather_object(answers, (value, error))
    for _, failure in answers:
        if failure is not None:
            raise SharedError(failure)
    return [answer for answer, _ in answers]


def barrier(error: str | None = None) -> None:
    """Collective. Returns when all ranks have called it. Raises SharedError on all ranks if any rank passes `error`."""
    all_gather_object(None, error)


def broadcast_object(value: T) -> T:
    """Collective. Returns the picklable `value` of rank 0."""
    return all_gather_object(value)[0]


def on_rank_0(compute: Callable[[], T]) -> T:
    """Collective. Runs `compute` on rank 0 only, and returns its picklable result on all ranks.

    It is for results that other machines might round differently.
    """
    return broadcast_object(compute() if rank() == 0 else None)  # type: ignore[return-value]


def all_equal(value: Any) -> bool:
    """Collective. Returns True on all ranks if the picklable `value` is equal on all ranks, else False on all ranks."""
    first, *others = all_gather_object(value)
    return all(other == first for other in others)


def map_over_ranks(work: Callable[[In], T], items: Sequence[In]) -> list[T]:
    """Collective. Returns the picklable work(item) of each item, in order. The ranks divide the items among them."""
    parts = all_gather_object([work(items[i]) for i in my_range(len(items))])
    return [result for part in parts for result in part]


def open_tensor_group(backend: str, device: torch.device) -> None:
    """Collective. Opens the process group for tensors on `device`.

    Args:
        backend: `nccl`, `gloo` or `auto`. NCCL needs one GPU per process; otherwise gloo is used on all ranks.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist
    from torch import cuda

    global _tensor_group
    can_nccl = device.type == "cuda" and cuda.device_count() >= local_world_size() and dist.is_nccl_available()
    all_can = all(all_gather_object(can_nccl))
    chosen = "gloo" if backend == "gloo" or not all_can else "nccl"
    if backend == "nccl" and not all_can:
        logger.info("distributed.backend is nccl, which needs one GPU per process: using gloo instead")
    # NCCL's watchdog ends the process without a message. With twice the time-out, gloo reports the time-out first.
    timeout = 2 * _timeout if chosen == "nccl" else _timeout
    _tensor_group = cast("ProcessGroup", dist.new_group(backend=chosen, timeout=timeout))


def tensor_group() -> ProcessGroup | None:
    """Returns the group that `open_tensor_group` opened, or None before that call and in a single process."""
    return _tensor_group


def tensor_backend() -> str:
    """Returns the backend of the tensor group: `nccl` or `gloo`."""
    import torch.distributed as dist

    return str(dist.get_backend(_tensor_group))


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Collective. Replaces a tensor by its sum over all ranks, in place, and returns it."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor, group=_tensor_group)
    return tensor


def destroy_process_groups() -> None:
    """Closes all process groups of this process."""
    global _tensor_group
    if world_size() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        _tensor_group = None


def reason_of_lost_peers(error: RuntimeError) -> str | None:
    """Returns the reason why other ranks cannot be reached, from the message of a collective's error.

    Returns None for other errors. The message is searched because gloo has no exception class of its own.
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


class DelayedMax:
    """Element-wise maximum of small integers over all ranks, without synchronising with any device.

    In a single process, a call returns its own values. With several ranks, a call waits for the reduction that the
    previous call started, and returns the result of that reduction. The call then starts a reduction of its own values,
    which runs over gloo in the background.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, Any] | None = None

    def __call__(self, *values: int) -> tuple[int, ...]:
        """Collective. Takes the same number of values in every call. With several ranks, the first call returns 0s."""
        if world_size() == 1:
            return values
        import torch
        import torch.distributed as dist

        answer = self.wait() or (0,) * len(values)
        tensor = torch.tensor(values)
        self._pending = tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)
        return answer

    def wait(self) -> tuple[int, ...]:
        """Waits for the pending reduction and returns its result, or an empty tuple if none is pending."""
        if self._pending is None:
            return ()
        tensor, work = self._pending
        self._pending = None
        work.wait()
        return tuple(tensor.tolist())


def first_on_each_node(work: Callable[[], T]) -> T:
    """Collective. Runs `work()` on all ranks in three turns and returns its result.

    Later ranks find what the first ranks have downloaded or cached. Rank 0 runs first, then one rank on each other
    machine (which may share rank 0's storage), then all other ranks. `work` may take longer than the time-out, because
    the working rank sends signs of life. If `work` can fail, call this function inside `gather_user_errors`, which
    reports the error to the other ranks.
    """
    if world_size() == 1:
        return work()
    my_turn = 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    result: Any = None
    for turn in range(3):
        working = run_in_thread(work) if turn == my_turn else None
        any_busy = True
        while any_busy:
            busy = working is not None and bool(wait([working], SIGN_OF_LIFE_S).not_done)
            if working is not None and not busy:
                result = working.result()
            any_busy = any(all_gather_object(busy))
    return result


def run_in_thread(work: Callable[[], T]) -> Future[T]:
    """Starts `work` in a daemon thread and returns its future. This process can exit before `work` ends."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
