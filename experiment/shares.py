"""Division of the global batch into equal shares, one per rank, and of each share into micro-batches."""

import math

from config.errors import ConfigError
from config.schema import Training
from utils.distributed.processes import world_size
from utils.randomness import CHUNK


def check_shares(training: Training) -> None:
    """Checks that the global batch can be divided.

    Raises ConfigError in the cases of `check_batch_size`, and if a share cannot be divided into equal micro-batches.
    """
    check_batch_size(training.batch_size)
    batch_size = training.batch_size
    if (batch_size // world_size()) % micro_batch_size(training):
        raise ConfigError(
            f"training.micro_batch_size {micro_batch_size(training)} does not divide the "
            f"{batch_size // world_size()} images of each process: use a divisor of them that is a multiple of {CHUNK}"
        )


def check_batch_size(batch_size: int, multiple: int = CHUNK) -> None:
    """Raises ConfigError if the ranks cannot have equal shares of the batch that are multiples of `multiple` images."""
    unit = math.lcm(multiple * world_size(), CHUNK)  # the schema allows only multiples of CHUNK
    if batch_size % unit:
        below = batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below else str(unit)
        raise ConfigError(
            f"training.batch_size is {batch_size}, but for {world_size()} processes it must be a multiple of {unit}: "
            f"use {nearest}"
        )


def micro_batch_size(training: Training) -> int:
    """Returns the number of images in one forward pass of one rank."""
    share = training.batch_size // world_size()
    return min(training.micro_batch_size or share, share)


def batch_norm_batch_size(training: Training) -> int:
    """Returns the number of images over which BatchNorm normalises: one micro-batch of every rank.

    If views.num_sources is above 1, BatchNorm normalises over all source views of these images.
    """
    return micro_batch_size(training) * world_size()


def advice_for_less_memory(training: Training) -> str:
    """Returns advice for the user after an out-of-memory error: a smaller micro-batch size, or a smaller model.

    The micro-batch size is the largest valid one that is at most half of the current size.
    """
    share, now = training.batch_size // world_size(), micro_batch_size(training)
    smaller = [size for size in range(CHUNK, now // 2 + 1, CHUNK) if share % size == 0]
    if not smaller:
        return f"a micro-batch of {now} images is the smallest possible: use a smaller model"
    return (
        f"set training.micro_batch_size={smaller[-1]} (it is {now}), which needs at most half of the memory for "
        "activations, and run the command again to resume"
    )
