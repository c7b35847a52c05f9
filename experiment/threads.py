"""Choice of the number of threads that torch computes with on a CPU."""

import logging
import os
from collections.abc import Callable
from functools import cache

import torch

from config.schema import Config
from experiment.models import build_on_meta, pass_flops
from experiment.shares import micro_batch_size

logger = logging.getLogger(__name__)

# FLOPs of a forward pass below which one thread is used. The operators of a small model are too short to divide: the
# threads mostly wait for each other, and much longer if other programs use the cores (docs/performance.md).
SMALL_PASS = 10e9


def training_work(config: Config) -> float:
    """Returns the FLOPs of a forward pass of one rank in training."""
    return micro_batch_size(config.training) * pass_flops(config, build_on_meta(config))[-1]


def choose_num_threads(work: Callable[[], float]) -> None:
    """Sets the number of torch's threads by the work of a forward pass: one thread, or as many as at start-up.

    The choice ignores the machine's load, because another number of threads would change the last bits of results. If
    the user or the launcher sets OMP_NUM_THREADS, nothing changes.

    Args:
        work: function that returns the FLOPs of a forward pass.
    """
    if "OMP_NUM_THREADS" in os.environ or _threads_at_start() == 1:
        return
    flops = work()
    small = flops < SMALL_PASS
    torch.set_num_threads(1 if small else _threads_at_start())
    if small:
        logger.info("computing with one thread: a forward pass of %.1f GFLOP is too small for more", flops / 1e9)


@cache
def _threads_at_start() -> int:
    return torch.get_num_threads()
