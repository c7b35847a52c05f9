"""Speed of making both views of a batch: ours, in one batch, and torchvision's transforms on PIL images, one by one.

torchvision's transforms run as in the workers of a DataLoader, in one process per core. The time to send their results
to the main process is not included.

  python -m benchmarks.views                                   # 512 images of 32 px, on the CPU
  python -m benchmarks.views --device cuda --batch_size 2048
  python -m benchmarks.views --stored_size 256 --image_size 224 --decoder_size 112 --batch_size 64
"""

import argparse
import multiprocessing
import os

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.measure import machine, ratio, spread, take_turns
from config.reading import load_config
from config.schema import View
from config.schema import Views as ViewsConfig
from datasets.augmentation import Draw
from datasets.views import Views
from utils.device import choose_device
from utils.randomness import uniforms

MEAN, STD = [0.5] * 3, [0.25] * 3  # of the data set


def pil_augmentation(view: View, image_size: int) -> v2.Compose:
    """Returns torchvision's transforms for the crop, flip and RandAugment of `view`: PIL images -> `image_size` px."""
    crop = v2.RandomResizedCrop(image_size, scale=view.crop_scale, ratio=view.crop_ratio)
    flip = v2.RandomHorizontalFlip(view.flip_probability)
    randaugment = v2.RandAugment(view.randaugment_num_ops, view.randaugment_magnitude)
    return v2.Compose(
        [
            v2.RandomApply([crop, flip], p=view.crop_flip_probability),
            v2.Resize((image_size, image_size)),  # images without a crop
            v2.RandomApply([randaugment], p=view.randaugment_probability),
        ]
    )


def pil_pair(config: ViewsConfig, encoder_size: int, decoder_size: int) -> tuple[v2.Compose, v2.Compose]:
    """Returns torchvision's transforms for the source view and for the target view: PIL images -> float tensors."""
    to_float = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    source = v2.Compose([pil_augmentation(config.source, encoder_size), *to_float, v2.Normalize(MEAN, STD)])
    middle = v2.Normalize([0.5] * 3, [0.5] * 3)
    return source, v2.Compose([pil_augmentation(config.target, decoder_size), *to_float, middle])


class OneByOne:
    """Work of one process of the plain pipeline: makes both views of each of its images."""

    def __init__(self, config: ViewsConfig, pixels: Tensor, encoder_size: int, decoder_size: int) -> None:
        self.images = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).numpy()]
        self.source, self.target = pil_pair(config, encoder_size, decoder_size)

    def __call__(self) -> int:
        source = torch.stack([self.source(image) for image in self.images])
        target = torch.stack([self.target(image) for image in self.images])
        return len(source) + len(target)


_worker: OneByOne


def _start_worker(config: ViewsConfig, pixels: Tensor, encoder_size: int, decoder_size: int) -> None:
    global _worker
    torch.set_num_threads(1)
    choose_device("cpu")
    _worker = OneByOne(config, pixels, encoder_size, decoder_size)


def _work(_: int) -> int:
    return _worker()


def main() -> None:
    """Runs the benchmark and prints its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=512, help="images per batch; default: %(default)s")
    parser.add_argument(
        "--image_size",
        type=int,
        default=32,
        help="size of the source views in pixels; default: %(default)s",
    )
    parser.add_argument(
        "--stored_size",
        type=int,
        help="size in pixels of the images that crops are taken from, with antialiasing; default: the size of the "
        "source views, without antialiasing",
    )
    parser.add_argument(
        "--decoder_size",
        type=int,
        help="size of the target views in pixels; default: the size of the source views",
    )
    parser.add_argument(
        "--config",
        default="config/cifar10.yaml",
        help="YAML file of the experiment whose views are made; default: %(default)s",
    )
    parser.add_argument(
        "--device", default="cpu", help="device of our views: auto, cpu, cuda or mps; default: %(default)s"
    )
    parser.add_argument(
        "--cores",
        type=int,
        default=os.cpu_count() or 1,
        help="number of processes that run torchvision's transforms; default: the number of cores, %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=15, help="number of timed rounds; default: %(default)s")
    args = parser.parse_args()
    config, device, size = load_config(args.config).views, choose_device(args.device), args.image_size
    decoder_size, stored_size = args.decoder_size or size, args.stored_size or size

    coarse = torch.rand(args.batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(coarse, (stored_size, stored_size), mode="bicubic").clamp(0, 1).mul(255).byte()
    share = pixels[: -(-args.batch_size // args.cores)].clone()  # every process uses these images
    context = multiprocessing.get_context("spawn")
    # Without a stored size, our target views are drawn at the size of the source views and then averaged down.
    pil_target_size = decoder_size if args.stored_size else size
    with context.Pool(args.cores, _start_worker, (config, share, size, pil_target_size)) as pool:
        views = Views(
            config,
            encoder_size=size,
            decoder_size=decoder_size,
            stored_size=args.stored_size,
            mean=MEAN,
            std=STD,
            device=device,
        )
        on_device = pixels.to(device)
        noise = torch.zeros((len(pixels), 3, size, size), device=device)
        step = iter(range(10**9))

        def draw(seed: int, purpose: str) -> Draw:
            return lambda columns, stream="": uniforms(range(args.batch_size), columns, seed, purpose + stream)

        def at_once() -> None:
            seed = next(step)
            views.pair(on_device, [(draw(seed, "source view"), noise)], draw(seed, "target view"))

        seconds = take_turns(
            {"one by one": lambda: pool.map(_work, range(args.cores), chunksize=1), "in one batch": at_once},
            args.rounds,
            device,
        )
    sizes = f"views of {size} and {decoder_size} px from {args.batch_size} images of {stored_size} px"
    print(f"{sizes}; {args.cores} cores; {machine(device)}")
    for name, each in seconds.items():
        print(f"{name:12s} {spread(each)}  {args.batch_size / sorted(each)[len(each) // 2]:,.0f} pairs/s")
    print(f"in one batch is {ratio(seconds['one by one'], seconds['in one batch'])} as fast as one by one")


if __name__ == "__main__":
    main()
