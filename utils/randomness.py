"""All randomness is a function of (seed, purpose, counters): never of what was drawn before.

A run that resumes at step n therefore draws what the uninterrupted run drew, and no state is saved.
"""

from hashlib import blake2b

import torch
from torch import Tensor

ROWS = 256  # positions that share a seed in draws of a few numbers each
CHUNK = 4  # samples that share a seed in image-sized draws; shares and micro-batches are multiples of it


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed of its own for each purpose and counters (a step, an epoch, a sample, ...).

    torch's CPU generator takes the low 32 bits of it, CUDA's all.
    """
    text = ":".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded by `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *counters))


def uniforms(positions: range, width: int, seed: int, purpose: str, *counters: int) -> Tensor:
    """Uniform numbers in [0, 1), on the host: a row (width,) for each of `positions`, whatever the others are.

    Every ROWS positions have a seed of their own.
    """
    blocks = range(positions.start // ROWS, -(-positions.stop // ROWS))
    rows = [torch.rand(ROWS, width, generator=generator(seed, purpose, *counters, block)) for block in blocks]
    start = blocks.start * ROWS
    return torch.cat(rows)[positions.start - start : positions.stop - start]


def image_noise(
    shape: tuple[int, ...], positions: range, seed: int, purpose: str, *counters: int, device: torch.device
) -> Tensor:
    """Standard normal noise (len(positions), *shape) for the samples at `positions`, as of the global batch.

    Every CHUNK samples have a seed of their own, so that a process draws its share of the batch and no more,
    and gets what one process with the whole batch would have drawn there.
    """
    chunks = range(positions.start // CHUNK, -(-positions.stop // CHUNK))
    noise = torch.empty(len(chunks) * CHUNK, *shape, device=device)
    source = torch.Generator(device)
    for chunk, out in zip(chunks, noise.split(CHUNK), strict=True):
        source.manual_seed(derive_seed(seed, purpose, *counters, chunk))
        torch.randn(out.shape, generator=source, out=out)
    start = chunks.start * CHUNK
    return noise[positions.start - start : positions.stop - start]
