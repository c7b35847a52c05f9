"""Random numbers that depend only on (seed, purpose, counters), and not on earlier draws.

A run that resumes at step n therefore draws the same numbers as an uninterrupted run. No generator state is saved.
"""

from hashlib import blake2b

import torch
from torch import Tensor

ROWS = 256  # consecutive positions that share a seed in `uniforms`
CHUNK = 4  # consecutive samples that share a seed in `image_noise`; shares and micro-batches are multiples of it


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """Returns a 63-bit seed, a different one for each seed, purpose and counters (a step, an epoch, a sample, ...).

    torch's CPU generator uses the low 32 bits of the seed, CUDA's generator uses all bits.
    """
    text = ":".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a new generator on `device`, seeded by `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *counters))


def uniforms(positions: range, width: int, seed: int, purpose: str, *counters: int) -> Tensor:
    """Returns uniform numbers in [0, 1) on the host: (len(positions), width), one row for each of `positions`.

    A row depends on its own position only, and not on the other positions. Each block of ROWS positions has its own
    seed.
    """
    blocks = range(positions.start // ROWS, -(-positions.stop // ROWS))
    rows = [torch.rand(ROWS, width, generator=generator(seed, purpose, *counters, block)) for block in blocks]
    start = blocks.start * ROWS
    return torch.cat(rows)[positions.start - start : positions.stop - start]


def image_noise(
    shape: tuple[int, ...], positions: range, seed: int, purpose: str, *counters: int, device: torch.device
) -> Tensor:
    """Returns standard normal noise (len(positions), *shape) for the samples at `positions` of the global batch.

    Each block of CHUNK samples has its own seed. A rank therefore draws only its share of the batch, and gets the same
    numbers as a single process that draws the whole batch.
    """
    chunks = range(positions.start // CHUNK, -(-positions.stop // CHUNK))
    noise = torch.empty(len(chunks) * CHUNK, *shape, device=device)
    source = torch.Generator(device)
    for chunk, out in zip(chunks, noise.split(CHUNK), strict=True):
        source.manual_seed(derive_seed(seed, purpose, *counters, chunk))
        torch.randn(out.shape, generator=source, out=out)
    start = chunks.start * CHUNK
    return noise[positions.start - start : positions.stop - start]
