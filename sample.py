"""Pictures of what the latents of a trained model hold, one a command: each a PNG that explains itself."""

import argparse
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import errors_under_way, make_parser, overrides, read_config_if_named, run, user_errors
from utils.config import ConfigError
from utils.distributed import rank
from utils.files import check_writable

if TYPE_CHECKING:
    from analysis.codec import Codec
    from analysis.picture import Picture
    from training.experiment import Experiment

logger = logging.getLogger(__name__)

# Of each picture: what it shows, and its options with their defaults.
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "reconstruct": ("images, samples that share their z, the decode from z and x_T", {"images": 6, "num_samples": 3}),
    "interpolate": ("from the first image of each pair to the second", {"images": 6, "num_steps": 9}),
    "directions": (
        "along the principal components of the latents, or towards a class",
        {"images": 1, "class": None, "num_components": 6, "num_steps": 7, "reach": 3.0},
    ),
    "arithmetic": ("z(a) - z(b) + z(c), of images or means of classes", {"terms": None, "num_samples": 3}),
    "mix": ("sections of the z of each pair's first image with those of the second", {"images": 6, "sections": None}),
    "generate": ("new images, from a Gaussian mixture over the latents", {"num_components": 10, "num_samples": 8}),
    "nearest": ("the training images nearest to each in z", {"images": 6, "num_neighbours": 8}),
}
LEAST = {"num_images": 1, "num_samples": 0, "num_steps": 2, "num_components": 1, "num_neighbours": 1}

EXAMPLES = """\
  python sample.py {name} --config config/digits.yaml
  python sample.py {name} --checkpoint runs/digits/checkpoints/last.pt sampling.num_sampling_steps=50 --seed 1"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    with user_errors(ConfigError):
        name = next((word for word in argv if word in PICTURES), None)
        if name is None and {"-h", "--help"} & {*argv}:
            if rank() == 0:
                print(USAGE)
            return 0
        if name is None:
            raise ConfigError(f"which picture? There are {', '.join(PICTURES)} (see sample.py --help)")
        words = list(argv)
        words.remove(name)
        args = parse(name, words)
        config = read_config_if_named(args)

    from analysis import require
    from analysis.codec import Codec
    from analysis.picture import save_picture
    from datasets import DatasetError
    from training.trained import open_trained, read_trained
    from utils.checkpoint import CheckpointError
    from utils.device import OutOfMemoryError

    with user_errors(ConfigError, DatasetError, CheckpointError):
        if name == "reconstruct":
            require("torchmetrics")
        trained = read_trained(config, args.checkpoint, overrides(args))
        experiment, soda = open_trained(trained)
        draw = prepare(name, args, experiment)
        path = args.out or trained.folder / "pictures" / f"{name}.png"
        check_writable(path)
    seed = experiment.config.seed if args.seed is None else args.seed
    with errors_under_way(DatasetError, OutOfMemoryError):
        picture = draw(Codec(experiment, soda, seed))
    with user_errors():
        if rank() == 0:
            how = trained.describe(experiment.loader.steps_per_epoch)
            steps = f"{experiment.config.sampling.num_sampling_steps} DDIM steps, seed {seed}"
            save_picture(picture, path, f"{how}, SHA-256 {trained.digest()[:12]}; {steps}")
            print(path)
    return 0


USAGE = "\n".join(
    [
        "usage: sample.py PICTURE [options] [key=value ...]      (sample.py PICTURE --help tells its options)",
        "",
        *(f"  {name:<12} {meaning}" for name, (meaning, _) in PICTURES.items()),
        "",
        "examples:",
        EXAMPLES.format(name="reconstruct"),
    ]
)


def parse(name: str, words: list[str]) -> argparse.Namespace:
    """The options of one picture; raises ConfigError."""
    meaning, options = PICTURES[name]
    parser = make_parser(
        f"{meaning[0].upper()}{meaning[1:]}.", EXAMPLES.format(name=name), prog=f"sample.py {name}", of_checkpoint=True
    )
    parser.add_argument("--seed", type=int, help="of all noise; default: the run's")
    parser.add_argument("--out", type=Path, help=f"the PNG; default: pictures/{name}.png in the run's folder")
    if "images" in options:
        number = options["images"]
        parser.add_argument(
            "--images", nargs="+", metavar="IMAGE", help="12, of the test images; train:12; or a file (key=value first)"
        )
        parser.add_argument("--num_images", type=int, default=number, help=f"how many, if none are named ({number})")
    if "class" in options:
        parser.add_argument("--class", dest="class_name", metavar="NAME", help="move towards this class instead")
        parser.add_argument("--reach", type=float, default=3.0, help="how far, in deviations of the latents (3)")
    if "terms" in options:
        parser.add_argument(
            "--terms", nargs=3, metavar=("A", "B", "C"), help="each class:NAME or an image, as 12, train:12 or a file"
        )
    if "sections" in options:
        parser.add_argument(
            "--sections", type=int, nargs="+", help="take these from the second image; default: all from each on"
        )
    meanings = {
        "num_samples": "samples of each from random noise",
        "num_steps": "images along each way",
        "num_components": "components",
        "num_neighbours": "neighbours of each",
    }
    for option, meaning in meanings.items():
        if option in options:
            number = options[option]
            parser.add_argument(f"--{option}", type=int, default=number, help=f"{meaning} ({number})")
    args = parser.parse_intermixed_args(words)
    for option, least in LEAST.items():
        if getattr(args, option, least) < least:
            raise ConfigError(f"--{option} {getattr(args, option)}: take at least {least}")
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
        label = None if args.class_name is None else find_class(experiment, args.class_name)
        options = {"num_components": args.num_components, "num_steps": args.num_steps, "reach": args.reach}
        return partial(latent_space.directions, chosen=images(), label=label, **options)
    if name == "arithmetic":
        terms = args.terms
        if terms is None and train.labels is not None:
            a, b = train.classes[:2]
            terms = [f"class:{a}", f"class:{b}", f"train:{int((train.labels == 1).nonzero()[0])}"]
        found = [
            find_class(experiment, term.removeprefix("class:"))
            if term.startswith("class:")
            else choose_images(experiment, [term], 1)
            for term in terms or ["0", "1", "2"]
        ]
        return partial(latent_space.arithmetic, terms=found, num_samples=args.num_samples)
    if name == "mix":
        sections = experiment.config.decoder.num_sections
        if sections == 1:
            raise ConfigError("mix needs a model of decoder.modulation sectioned, as config/cifar10_paper.yaml trains")
        if args.sections is not None and not {*args.sections} <= {*range(sections)}:
            raise ConfigError(f"--sections {args.sections}: this model's go from 0 to {sections - 1}")
        return partial(pictures.mix, chosen=pairs(), sections=args.sections and sorted({*args.sections}))
    if name == "generate":
        if args.num_components > count or args.num_samples < 1:
            raise ConfigError(f"--num_components goes up to {count}, the training images, and --num_samples from 1")
        options = {"num_components": args.num_components, "num_samples": args.num_samples}
        return partial(latent_space.generate, **options)
    if args.num_neighbours > count:
        raise ConfigError(f"--num_neighbours {args.num_neighbours}: there are {count} training images")
    return partial(pictures.nearest, chosen=images(), num_neighbours=args.num_neighbours)


if __name__ == "__main__":
    run(main)
