"""Speed of decoding images that do not fit in memory, by our threads and by the processes of a DataLoader.

The benchmark writes JPEGs of ImageNet's usual size and decodes all of them in batches, in a random order. The processes
of the DataLoader are started only once.

Then the benchmark measures how long a training step waits for its batch, with and without reading ahead. The step is
simulated: it takes a quarter longer than the decoding of a batch, and only sleeps. It uses neither the cores nor the
GIL. A real step leaves them free only while a GPU works.

  python -m benchmarks.streaming                             # does not use a GPU
  python -m benchmarks.streaming --image_size 224 --workers 16
  python -m benchmarks.streaming --views config/imagenet.yaml --batch_size 32

With --views, both views of each image are also made. Ours are cropped from stored squares, in one batch, in the main
process. torchvision crops them from the PIL image, in the processes of the DataLoader.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import machine, ratio, spread, take_turns
from benchmarks.views import MEAN, STD, pil_pair
from config.reading import load_config
from config.schema import Config
from datasets import decoding
from datasets.decoding import decode, decode_batches, num_cores
from datasets.listing import Listing
from datasets.views import Views
from utils.device import choose_device
from utils.randomness import uniforms


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


class Files(Dataset[Any]):
    """Data set for the DataLoader: files of a listing, read by a function of their path."""

    def __init__(self, listing: Listing, read: Callable[[Path], Any]) -> None:
        self._listing, self._read = listing, read

    def __getitem__(self, index: int) -> Any:
        return self._read(self._listing.root / self._listing.files[index])


def read_square(path: Path, image_size: int) -> Tensor:
    """Decodes a file to (3, image_size, image_size) uint8."""
    return torch.from_numpy(decode(path, image_size).transpose(2, 0, 1).copy())


class PairReader:
    """Function that decodes a file and makes both views of it by torchvision's transforms."""

    def __init__(self, config: Config) -> None:
        self._source, self._target = pil_pair(config.views, config.encoder_size, config.decoder_size)

    def __call__(self, path: Path) -> tuple[Tensor, Tensor]:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        return self._source(rgb), self._target(rgb)


def pairs_of(batches: Iterable[Tensor], config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Makes both views of batches of stored squares."""
    views = Views(
        config.views,
        encoder_size=config.encoder_size,
        decoder_size=config.decoder_size,
        stored_size=config.data.stored_size,
        mean=MEAN,
        std=STD,
        device=choose_device("cpu"),
    )
    for step, pixels in enumerate(batches):
        draws = [partial(_draw, range(len(pixels)), step, purpose) for purpose in ("source view", "target view")]
        noise = torch.zeros(len(pixels), 3, config.encoder_size, config.encoder_size)
        yield views.pair(pixels, [(draws[0], noise)], draws[1])


def _draw(samples: range, seed: int, purpose: str, columns: int, stream: str = "") -> Tensor:
    return uniforms(samples, columns, seed, purpose + stream)


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
    parser.add_argument("--views", help="YAML file with data.stored_size, whose views are also made; default: none")
    args = parser.parse_args()
    config = load_config(args.views) if args.views else None
    size = config.data.kept_size if config else args.image_size
    count = 12 * args.batch_size
    print(
        f"{count} JPEGs of 500x375 px, decoded to {size} px by {args.workers} workers; {machine(torch.device('cpu'))}"
    )
    with tempfile.TemporaryDirectory() as folder:
        listing = write_jpegs(Path(folder), count)
        num_bytes = statistics.mean(path.stat().st_size for path in Path(folder).iterdir())
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(args.batch_size)
        ours = partial(decode_batches, listing, size)

        def in_processes(read: Callable[[Path], Any]) -> Callable[[], Iterable[Any]]:
            loader = DataLoader(
                Files(listing, read),
                batch_sampler=[chosen.tolist() for chosen in order],
                num_workers=args.workers,
                persistent_workers=True,
            )
            return lambda: iter(loader)

        everything: dict[str, Callable[[], Iterable[Any]]] = {
            "one thread": partial(ours, order, 1),
            "threads": partial(ours, order, args.workers),
            "processes of a DataLoader": in_processes(partial(read_square, image_size=size)),
        }
        if config:
            everything["threads, and both views"] = lambda: pairs_of(ours(order, args.workers), config)
            everything["torchvision's, in processes"] = in_processes(PairReader(config))
        work = {name: lambda batches=batches: [None for _ in batches()] for name, batches in everything.items()}
        seconds = take_turns(work, args.rounds, torch.device("cpu"), warmup=1)
        print(f"{num_bytes / 1e3:.0f} kB per file")
        for name, each in seconds.items():
            rate = count / statistics.median(each)
            print(
                f"{name:27s} {spread(each)}  {rate:7.0f} images/s, "
                f"{ratio(seconds['one thread'], each)} the speed of one thread"
            )

        if config:
            theirs, pairs = seconds["torchvision's, in processes"], seconds["threads, and both views"]
            print(f"both views are made {ratio(theirs, pairs)} as fast as by torchvision")
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
