"""Pictures of what the latents of a trained model hold, one a command: each a PNG that explains itself."""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import (
    check_place,
    errors_under_way,
    make_parser,
    overrides,
    read_config_if_named,
    run,
    user_errors,
)
from utils.config import ConfigError
from utils.distributed import rank
from utils.files import check_writable

if TYPE_CHECKING:
    from analysis.codec import Codec
    from analysis.picture import Picture
    from training.experiment import Experiment

PICTURES = {
    "reconstruct": "images, samples that share their z, the decode from z and x_T",
    "interpolate": "from the first image of each pair to the second",
    "directions": "along the principal components of the latents, or towards a class",
    "arithmetic": "z(a) - z(b) + z(c), of images or means of classes",
    "mix": "sections of the z of each pair's first image with those of the second",
    "generate": "new images, from a Gaussian mixture over the latents",
    "nearest": "the training images nearest to each in z",
}

EXAMPLES = """\
  python sample.py {name} --config config/digits.yaml
  python sample.py {name} --checkpoint runs/digits/checkpoints/last.pt sampling.num_sampling_steps=50 --seed 1"""

USAGE = "\n".join(
    [
        "usage: sample.py PICTURE [options] [key=value ...]      (sample.py PICTURE --help tells its options)",
        "",
        *(f"  {name:<12} {meaning}" for name, meaning in PICTURES.items()),
        "",
        "examples:",
        EXAMPLES.format(name="reconstruct"),
    ]
)


def main(argv: list[str] | None = None) -> int:
    check_place()
    words = list(sys.argv[1:] if argv is None else argv)
    with user_errors(ConfigError):
        first = next((i for i, word in enumerate(words) if not word.startswith("--local")), None)  # of launchers
        name = None if first is None else words.pop(first)
        if name in ("-h", "--help"):
            if rank() == 0:
                print(USAGE)
            return 0
        if name not in PICTURES:
            raise ConfigError(f"name a picture first: {', '.join(PICTURES)} (see sample.py --help)")
        args = parse(name, words)
        config = read_config_if_named(args)

    from analysis import require
    from analysis.codec import Codec
    from analysis.picture import save_picture
    from datasets import DatasetError
    from training.trained import open_trained, read_trained
    from utils.checkpoint import CheckpointError
    from utils.device import OutOfMemoryError, compute_exactly

    with user_errors(ConfigError, DatasetError, CheckpointError):
        if name == "reconstruct":
            require("torchmetrics")
        trained = read_trained(config, args.checkpoint, overrides(args))
        experiment, soda = open_trained(trained)
        compute_exactly()
        draw = prepare(name, args, experiment)
        path = args.out or trained.folder / "pictures" / f"{name}.png"
        check_writable(path)
    seed = experiment.config.seed if args.seed is None else args.seed
    with errors_under_way(DatasetError, OutOfMemoryError):
        picture = draw(Codec(experiment, soda, seed))
    with user_errors():
        if rank() == 0:
            sampling = experiment.config.sampling
            scales = " ".join(f"{scale:g}" for scale in sampling.guidance_scale)
            how = f"{sampling.num_sampling_steps} DDIM steps; samples: guidance {scales}, eta {sampling.eta:g}"
            how += "" if sampling.sections is None else f", sections {sampling.sections}"
            which = trained.describe(experiment.loader.steps_per_epoch)
            save_picture(picture, path, f"{which}, SHA-256 {trained.digest[:12]}; {how}; seed {seed}")
            print(path)
    return 0


def parse(name: str, words: list[str]) -> argparse.Namespace:
    """The options of one picture; raises ConfigError."""
    meaning = f"{PICTURES[name][0].upper()}{PICTURES[name][1:]}."
    parser = make_parser(meaning, EXAMPLES.format(name=name), prog=f"sample.py {name}", of_checkpoint=True)
    parser.add_argument("--seed", type=int, help="of all noise; default: the run's")
    parser.add_argument("--out", type=Path, help=f"the PNG; default: pictures/{name}.png in the run's folder")
    least: dict[str, int] = {}

    def number(option: str, default: int, minimum: int, meaning: str) -> None:
        parser.add_argument(f"--{option}", type=int, default=default, metavar="N", help=f"{meaning} ({default})")
        least[option] = minimum

    if name not in ("arithmetic", "generate"):
        parser.add_argument(
            "--images", nargs="+", metavar="IMAGE", help="12, of the test images; train:12; or a file (key=value first)"
        )
        number("num_images", 1 if name == "directions" else 6, 1, "how many, if none are named")
    if name in ("interpolate", "directions"):
        number("num_steps", 9 if name == "interpolate" else 7, 2, "images along each way")
    if name == "directions":
        number("num_components", 6, 1, "components, of which each is a way")
        parser.add_argument("--class", dest="class_name", metavar="NAME", help="towards this class, not by components")
        parser.add_argument("--reach", type=float, default=3.0, help="how far, in deviations of the latents (3)")
    if name in ("directions", "mix"):
        parser.add_argument("--random", action="store_true", help="start from random noise, not the image's own x_T")
    if name == "arithmetic":
        parser.add_argument(
            "--terms", nargs=3, metavar=("A", "B", "C"), help="each class:NAME or an image, as 12, train:12 or a file"
        )
    if name == "mix":
        parser.add_argument(
            "--sections", type=int, nargs="+", help="take these from the second image; default: all from each on"
        )
    if name == "generate":
        number("num_components", 10, 1, "Gaussians")
    if name in ("reconstruct", "arithmetic", "generate"):
        number("num_samples", 8 if name == "generate" else 3, name == "generate", "samples of each, from random noise")
    if name == "nearest":
        number("num_neighbours", 8, 1, "neighbours of each")
    args = parser.parse_intermixed_args(words)
    for option, minimum in least.items():
        if getattr(args, option) < minimum:
            raise ConfigError(f"--{option} {getattr(args, option)}: take at least {minimum:d}")
    if name == "directions" and not 0 < args.reach < math.inf:
        raise ConfigError(f"--reach {args.reach:g}: take a number above 0")
    return args


def prepare(name: str, args: argparse.Namespace, experiment: "Experiment") -> "Callable[[Codec], Picture]":
    """What draws the picture, once everything that is named is found; raises ConfigError and DatasetError."""
    from analysis import latent_space, pictures
    from analysis.references import Chosen, choose_images, find_class

    count, train = len(experiment.train), experiment.train

    def images() -> Chosen:
        return choose_images(experiment, args.images, args.num_images)

    def pairs() -> Chosen:
        found = images()
        if len(found) % 2:
            raise ConfigError(f"{len(found)} images are no pairs: give one more")
        return found

    if name == "reconstruct":
        return partial(pictures.reconstruct, chosen=images(), num_samples=args.num_samples)
    if name == "interpolate":
        return partial(pictures.interpolate, chosen=pairs(), num_steps=args.num_steps)
    if name == "directions":
        width = min(experiment.config.encoder.latent_dim, count)
        if args.num_components > width:
            raise ConfigError(f"--num_components {args.num_components}: {count} latents have {width} components")
        return partial(
            latent_space.directions,
            chosen=images(),
            num_components=args.num_components,
            num_steps=args.num_steps,
            reach=args.reach,
            label=None if args.class_name is None else find_class(experiment, args.class_name),
            random=args.random,
        )
    if name == "arithmetic":
        terms = args.terms
        if terms is None and train.labels is not None:  # a training image of the second class, made one of the first
            terms = [*(f"class:{name}" for name in train.classes[:2]), f"train:{int((train.labels == 1).nonzero()[0])}"]
        found = [
            find_class(experiment, term.removeprefix("class:"))
            if term.startswith("class:")
            else choose_images(experiment, [term], 1)
            for term in terms or ["0", "1", "2"]
        ]
        if not args.num_samples and not any(isinstance(term, Chosen) for term in found):
            raise ConfigError("--num_samples 0: means of classes have no x_T of their own, so take at least 1")
        return partial(latent_space.arithmetic, terms=found, num_samples=args.num_samples)
    if name == "mix":
        sections = experiment.config.decoder.num_sections
        if sections == 1:
            raise ConfigError("mix needs a model of decoder.modulation sectioned, as config/cifar10_paper.yaml trains")
        if args.sections is not None and not {*args.sections} <= {*range(sections)}:
            raise ConfigError(f"--sections {args.sections}: this model's go from 0 to {sections - 1}")
        chosen_sections = args.sections and sorted({*args.sections})
        return partial(pictures.mix, chosen=pairs(), sections=chosen_sections, random=args.random)
    if name == "generate":
        most = min(count, latent_space.MAX_FIT)
        if args.num_components > most:
            raise ConfigError(f"--num_components {args.num_components}: it goes up to {most}, the latents there are")
        return partial(latent_space.generate, num_components=args.num_components, num_samples=args.num_samples)
    if args.num_neighbours > count:
        raise ConfigError(f"--num_neighbours {args.num_neighbours}: there are {count} training images")
    return partial(pictures.nearest, chosen=images(), num_neighbours=args.num_neighbours)


if __name__ == "__main__":
    run(main)
