"""Division of the global batch: the equal share of each process, and the micro-batches of a share."""

from config.errors import ConfigError
from config.schema import Training
from utils.distributed.processes import world_size
from utils.randomness import CHUNK


def check_shares(training: Training) -> None:
    """Raise ConfigError unless the processes can take equal shares of the batch, each a multiple of CHUNK images."""
    batch_size, unit = training.batch_size, CHUNK * world_size()
    if batch_size % unit:
        below = batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below else str(unit)
        raise ConfigError(
            f"training.batch_size {batch_size} does not divide into shares of a multiple of {CHUNK} images for each of "
            f"{world_size()} processes: take {nearest}"
        )
    if (batch_size // world_size()) % micro_batch_size(training):
        raise ConfigError(
            f"training.micro_batch_size {micro_batch_size(training)} does not divide the "
            f"{batch_size // world_size()} images of each process"
        )


def micro_batch_size(training: Training) -> int:
    """Images of one forward pass of one process."""
    share = training.batch_size // world_size()
    return min(training.micro_batch_size or share, share)


def batch_norm_batch_size(training: Training) -> int:
    """Images that BatchNorm normalises over: one micro-batch of every process."""
    return micro_batch_size(training) * world_size()


def advice_for_less_memory(training: Training) -> str:
    """Text that names the largest micro-batch of at most half the present size."""
    share, now = training.batch_size // world_size(), micro_batch_size(training)
    smaller = [size for size in range(CHUNK, now // 2 + 1, CHUNK) if share % size == 0]
    if not smaller:
        return f"a micro-batch of {now} images is the smallest possible: take a smaller model"
    return (
        f"training.micro_batch_size={smaller[-1]} (now {now}) needs at most half of it, and the run can resume with it"
    )
