"""Speed of decoding images that do not fit in memory, by our threads and by the processes of a DataLoader.

The benchmark writes JPEGs of ImageNet's usual size and decodes all of them in batches, in a random order. The processes
of the DataLoader are started only once.

Then the benchmark measures how long a training step waits for its batch, with and without reading ahead. The step is
simulated: it takes a quarter longer than the decoding of a batch, and only sleeps. It uses neither the cores nor the
GIL. A real step leaves them free only while a GPU works.

  python -m benchmarks.streaming                             # does not use a GPU
  python -m benchmarks.streaming --image_size 224 --workers 16
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import machine, ratio, spread, take_turns
from datasets import decoding
from datasets.decoding import decode, decode_batches, num_cores
from datasets.listing import Listing


def write_jpegs(folder: Path, count: int) -> Listing:
    """Writes JPEGs of blurred noise and returns their listing.

    Each has 500x375 pixels and about 94 kB. The files of ImageNet have 110 kB on average.
    """
    generator = np.random.default_rng(0)
    names = [f"{index:04}.jpg" for index in range(count)]
    for name in names:
        coarse = Image.fromarray(generator.integers(0, 256, (96, 128, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / name, quality=90)
    return Listing(folder, names, None, [])


class Files(Dataset[Tensor]):
    """Data set for the DataLoader. Each item is decoded from its file: (3, image_size, image_size) uint8."""

    def __init__(self, listing: Listing, image_size: int) -> None:
        self._listing, self._image_size = listing, image_size

    def __getitem__(self, index: int) -> Tensor:
        pixels = decode(self._listing.root / self._listing.files[index], self._image_size)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def waits(batches: Iterator[Tensor], step_seconds: float) -> float:
    """Returns the fraction of the time that steps wait for their batches. The first three steps are not counted.

    Args:
        step_seconds: simulated duration of a step, without its wait.
    """
    waited: list[float] = []
    while True:
        start = time.perf_counter()
        if next(batches, None) is None:
            return sum(waited[3:]) / (sum(waited[3:]) + step_seconds * len(waited[3:]))
        waited.append(time.perf_counter() - start)
        time.sleep(step_seconds)


def main() -> None:
    """Runs the benchmark and prints its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--image_size",
        type=int,
        default=128,
        help="height and width in pixels of the decoded images; default: %(default)s",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch; default: %(default)s")
    parser.add_argument(
        "--workers",
        type=int,
        default=num_cores(),
        help="number of threads, and of processes of the DataLoader; default: the number of cores, %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of timed rounds; default: %(default)s")
    args = parser.parse_args()
    count = 12 * args.batch_size
    print(
        f"{count} JPEGs of 500x375 px, decoded to {args.image_size} px by {args.workers} workers; "
        f"{machine(torch.device('cpu'))}"
    )
    with tempfile.TemporaryDirectory() as folder:
        listing = write_jpegs(Path(folder), count)
        size = statistics.mean(path.stat().st_size for path in Path(folder).iterdir())
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(args.batch_size)
        ours = partial(decode_batches, listing, args.image_size)

        loader = DataLoader(
            Files(listing, args.image_size),
            batch_sampler=[chosen.tolist() for chosen in order],
            num_workers=args.workers,
            persistent_workers=True,
        )
        everything: dict[str, Callable[[], Iterable[Tensor]]] = {
            "one thread": partial(ours, order, 1),
            "threads": partial(ours, order, args.workers),
            "processes of a DataLoader": lambda: iter(loader),
        }
        work = {name: lambda batches=batches: [None for _ in batches()] for name, batches in everything.items()}
        seconds = take_turns(work, args.rounds, torch.device("cpu"), warmup=1)
        print(f"{size / 1e3:.0f} kB per file")
        for name, each in seconds.items():
            rate = count / statistics.median(each)
            print(
                f"{name:26s} {spread(each)}  {rate:7.0f} images/s, "
                f"{ratio(seconds['one thread'], each)} the speed of one thread"
            )

        shares: dict[int, list[float]] = {decoding.AHEAD: [], 0: []}
        for _ in range(args.rounds):
            threads = take_turns({"threads": work["threads"]}, 1, torch.device("cpu"), warmup=0)["threads"][0]
            for decoding.AHEAD, found in shares.items():
                found.append(waits(ours(iter(order), args.workers), 1.25 * threads / len(order)))
        for ahead, found in shares.items():
            spread_of = f"{statistics.median(found):.1%} of the time ({min(found):.1%} to {max(found):.1%})"
            print(f"if {ahead} batches are read ahead, the step waits for {spread_of}")


if __name__ == "__main__":
    main()
