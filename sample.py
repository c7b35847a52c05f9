"""Draws pictures that show the content of a trained model's latents, and fits a prior over z.

Each picture is a PNG file that includes a title and an explanation.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from analysis.pictures import PICTURES, Picture
from config.errors import ConfigError
from utils.cli import gather_user_errors, make_parser, overrides, path_option, read_config_if_named, require, run
from utils.distributed.processes import rank
from utils.files import check_writable

EXAMPLES = """\
  python sample.py {name} --config config/{config}.yaml
  python sample.py {name} --checkpoint runs/{config}/checkpoints/last.pt sampling.num_sampling_steps=50 --seed 1"""

FIT_PRIOR = "fit_prior"
FIT_EXAMPLES = """\
  python sample.py fit_prior --config config/digits.yaml
  python sample.py fit_prior --checkpoint runs/digits/checkpoints/last.pt --steps 5000"""
FIT_MEANING = "fits the diffusion prior over z that generate --prior diffusion uses; the same command resumes"


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    with gather_user_errors():
        # Launchers may put --local-rank before the name of the picture.
        first = next((i for i, word in enumerate(words) if not word.startswith("--local")), None)
        name = None if first is None else words.pop(first)
        if name in ("-h", "--help"):
            if rank() == 0:
                print(usage())
            return 0
        if name not in (*PICTURES, FIT_PRIOR):
            raise ConfigError(f"name a picture first: {', '.join([*PICTURES, FIT_PRIOR])} (see sample.py --help)")
    return fit_prior(words) if name == FIT_PRIOR else draw(PICTURES[name], words)


def draw(kind: type[Picture[Any]], words: list[str]) -> int:
    """Draws a picture with the options `words`, saves it and returns the exit status."""
    # Parse.
    with gather_user_errors():
        args, picture = parse(kind, words)
        config = read_config_if_named(args)
        require(*picture.needs)

    from analysis.grid import save_gif, save_grid
    from analysis.prior import draw_from, open_fit, prior_path
    from datasets.walking import is_listed
    from evaluation.codec import Codec
    from evaluation.features import feature_name
    from experiment.trained import check_cameras, check_no_cameras, check_timestep, open_trained, read_trained
    from utils.device import compute_exactly

    # Open the checkpoint and the images, and find the images that the options name.
    with gather_user_errors():
        trained = read_trained(config, args.checkpoint, overrides(args))
        if picture.needs_cameras:
            check_cameras(trained.config, f"sample.py {kind.name}")
        else:
            check_no_cameras(trained.config, f"sample.py {kind.name}")
        if picture.needs_one_z or args.timestep is not None:
            check_timestep(trained.config, args.timestep)
        experiment, soda = open_trained(trained)
        compute_exactly()
        found = picture.find(experiment)
        seed = experiment.config.seed if args.seed is None else args.seed
        draw_latents = None
        if picture.needs_prior:
            fit = open_fit(prior_path(trained, args.timestep), trained, experiment, must_exist=True)
            draw_latents = draw_from(fit)
        codec = Codec(experiment, soda, seed, args.timestep, draw_latents)
        path = args.out or trained.folder / "pictures" / f"{feature_name(kind.name, args.timestep)}.png"
        if path.suffix.lower() != ".png":
            raise ConfigError(f"--out {path} is not a .png file: name one")
        check_writable(path)
        if picture.needs_cameras:
            check_writable(path.with_suffix(".gif"))
        data = trained.config.data
        if data.is_of_files and is_listed(path, Path(data.root)):
            raise ConfigError(f"{path} is in data.root {data.root}, whose images are trained on: choose another --out")

    # Draw.
    grid = picture.draw(codec, found)

    # Save.
    with gather_user_errors():
        if rank() == 0:
            model = f"{trained.describe(experiment)}, SHA-256 {trained.digest[:12]}"
            at = "" if args.timestep is None else f"z at timestep {args.timestep}; "
            sampling = experiment.config.sampling
            steps = f"{sampling.num_sampling_steps} DDIM steps; samples: {sampling}"
            save_grid(grid, path, f"{model}; {at}{steps}; seed {seed}")
            print(path)
            if grid.frames:
                save_gif(grid.frames, path.with_suffix(".gif"))
                print(path.with_suffix(".gif"))
    return 0


def fit_prior(words: list[str]) -> int:
    """Runs `sample.py fit_prior` with the options `words` and returns its exit status."""
    # Parse.
    with gather_user_errors():
        meaning, name = f"{FIT_MEANING[0].upper()}{FIT_MEANING[1:]}.", f"sample.py {FIT_PRIOR}"
        parser = make_parser(meaning, FIT_EXAMPLES, prog=name, of_checkpoint=True)
        parser.add_argument(
            "--steps", type=int, default=3000, help="optimiser steps, with those of an earlier call; default: 3000"
        )
        args = parser.parse_intermixed_args(words)
        if args.steps < 1:
            raise ConfigError(f"--steps {args.steps} is too small: use at least 1")
        config = read_config_if_named(args)

    from analysis.measuring import measure_priors
    from analysis.prior import open_fit, prior_path
    from evaluation.codec import Codec
    from experiment.trained import check_no_cameras, check_timestep, open_trained, read_trained
    from utils.device import compute_exactly

    # Open the checkpoint, the images and the prior that an earlier call has begun.
    with gather_user_errors():
        trained = read_trained(config, args.checkpoint, overrides(args))
        check_no_cameras(trained.config, f"sample.py {FIT_PRIOR}")
        check_timestep(trained.config, args.timestep)
        experiment, soda = open_trained(trained)
        compute_exactly()
        codec, path = Codec(experiment, soda, experiment.config.seed, args.timestep), prior_path(trained, args.timestep)
        check_writable(path)
        fit = open_fit(path, trained, experiment, must_exist=False)

    # Fit.
    fit.run(codec.train_z, args.steps, path)

    # Compare with the mixture and with latents of test images.
    measure_priors(trained, codec, fit)
    if rank() == 0:
        print(f"\nprior        {path}, {fit.step} steps")
    return 0


def usage() -> str:
    """Returns the help text of the command without a picture: the list of pictures."""
    lines = [
        "usage: sample.py PICTURE [options] [key=value ...]\n\n"
        "Draws a picture that shows the content of a trained model's latents, and saves it as a PNG file.\n"
        "`sample.py PICTURE --help` lists the options of a picture. The pictures are:",
        "",
    ]
    lines += [f"  {name:<12} {picture.meaning}" for name, picture in PICTURES.items()]
    lines += ["", "Another command draws nothing:", "", f"  {FIT_PRIOR:<12} {FIT_MEANING}"]
    return "\n".join([*lines, "", "examples:", EXAMPLES.format(name="reconstruct", config="digits")])


def parse(kind: type[Picture[Any]], words: list[str]) -> tuple[argparse.Namespace, Picture[Any]]:
    """Returns the options of a command and the picture that they describe. Raises ConfigError if one is wrong."""
    meaning, examples = (
        f"{kind.meaning[0].upper()}{kind.meaning[1:]}.",
        EXAMPLES.format(name=kind.name, config=kind.example),
    )
    parser = make_parser(meaning, examples, prog=f"sample.py {kind.name}", of_checkpoint=True)
    parser.add_argument("--seed", type=int, help="seed of the random noise; default: the seed of the run")
    parser.add_argument(
        "--out", type=path_option, help=f"PNG file for the picture; default: pictures/{kind.name}.png in the run folder"
    )
    kind.add_options(parser)
    args = parser.parse_intermixed_args(words)
    return args, kind.from_options(args)


if __name__ == "__main__":
    run(main)
