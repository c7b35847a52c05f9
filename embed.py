"""Encodes images with a trained encoder and saves their features, or exports the encoder or the model.

The images are a split of the data set, a folder, or files. An exported encoder runs without this repository. Its
weights are written as well, with a model card. An exported model is a small checkpoint for test.py, sample.py and
embed.py.
"""

import argparse
from functools import partial
from pathlib import Path

from config.errors import ConfigError
from utils.cli import gather_user_errors, make_parser, overrides, path_option, read_config_if_named, require, run
from utils.distributed.processes import rank
from utils.files import check_writable, read_names

EXAMPLES = """\
  python embed.py --checkpoint runs/digits/checkpoints/last.pt --split test --out digits.npz
  python embed.py --config config/cifar10.yaml --folder photos --out photos.safetensors
  python embed.py --config config/cifar10.yaml --files @list.txt      (list.txt: one file name per line)
  python embed.py --config config/cifar10.yaml --export encoder       (writes encoder/: .pt2, .onnx, weights and a card)
  python embed.py --config config/cifar10.yaml --export encoder.pt2   (writes only this file; needs no ONNX packages)
  python embed.py --config config/cifar10.yaml --export model.pt      (the EMA model as a small checkpoint)"""

# Packages that each file format needs in addition to requirements.txt.
NEEDS = {
    ".npz": (),
    ".safetensors": ("safetensors",),
    ".pt": (),
    ".pt2": (),
    ".onnx": ("onnx", "onnxscript", "onnxruntime"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status."""
    # Parse.
    with gather_user_errors():
        args = parse(argv)
        config = read_config_if_named(args)
        files = export_paths(args.export) if args.export else [args.out] if args.out else []
        require(*(package for file in files for package in NEEDS[file.suffix.lower()]))

    from analysis.export import export
    from analysis.feature_file import encode_named, images_of_files, images_of_folder, images_of_split, save_features
    from analysis.image_encoder import trained_encoder
    from datasets.findings import UnreadableError
    from datasets.images import DatasetError
    from evaluation.features import feature_name
    from experiment.opening import open_device, open_experiment
    from experiment.threads import training_work
    from experiment.trained import read_trained
    from utils.device import compute_exactly

    # Open the checkpoint.
    with gather_user_errors():
        trained = read_trained(config, args.checkpoint, overrides(args))
        config = trained.config

        # Export.
        if args.export:
            export(trained, files, args.timestep)
            return 0

        encoder = trained_encoder(trained, timestep=args.timestep)

        # Open the images.
        if args.split:
            experiment = open_experiment(config, grey_bits=trained.grey_bits)
            split = experiment.train if args.split == "train" else experiment.test
            if split is None:
                raise DatasetError(f"{config.data.root} has no {args.split} split: use --split train")
            device, amp_dtype, named = experiment.device, experiment.amp_dtype, images_of_split(split, args.split)
        else:
            device, amp_dtype = open_device(config, partial(training_work, config))
            find = partial(images_of_folder, args.folder) if args.folder else partial(images_of_files, args.files)
            named = find(config, trained.grey_bits)
        compute_exactly()
        name = feature_name(args.split or (args.folder.resolve().name if args.folder else "files"), args.timestep)
        path = args.out or trained.folder / "features" / f"{name}.npz"
        check_writable(path)

    # Encode and save.
    try:
        features, named = encode_named(encoder.to(device), named, config.evaluation.batch_size, amp_dtype)
    except UnreadableError as error:
        with gather_user_errors():
            raise error.with_advice(path.parent, f"{path.stem}.unreadable.txt") from None
    with gather_user_errors():
        if rank() == 0:
            features = {feature_name(str(kind), args.timestep): values for kind, values in features.items()}
            save_features(path, features, named, trained.digest)
            print(path)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options of the command line. Raises ConfigError if an option is wrong."""
    parser = make_parser(__doc__ or "", EXAMPLES, of_checkpoint=True)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--split", choices=("train", "test"), help="encode the images of this split of the data set")
    task.add_argument(
        "--folder",
        type=path_option,
        help="encode all images in this folder and its sub-folders; if almost all of them are in sub-folders, the "
        "sub-folders are the classes, and the other images are left out (the log says so)",
    )
    task.add_argument(
        "--files",
        nargs="+",
        metavar="FILE",
        help="encode these image files; @LIST reads their names from the text file LIST, one per line (write ./@NAME "
        "for an image called @NAME); put key=value before this option",
    )
    task.add_argument(
        "--export",
        type=path_option,
        metavar="PATH",
        help="export the encoder: to the file PATH if it ends in .pt2 or .onnx; if it ends in .safetensors, only its "
        "weights, for encoder.weights, with a model card, README.md, beside them; if PATH ends in .pt, export the EMA "
        "model in bf16 as a checkpoint from which training cannot resume; in its config, keys marked * have their "
        "defaults, except sampling, evaluation and views.probe, so that it holds no paths; any other PATH is a folder "
        "for encoder.pt2, encoder.onnx, model.safetensors and README.md",
    )
    parser.add_argument(
        "--out",
        type=path_option,
        help="file for the features, ending in .npz or .safetensors; default: features/NAME.npz in the run folder, "
        "with the split, the folder's name or `files` as NAME; it holds z, pooled, names, checkpoint (its SHA-256), "
        "and, if the images have them, labels and classes, or attributes and attribute_names",
    )
    args = parser.parse_intermixed_args(argv)
    if args.files:
        lists = [read_names(Path(file[1:])) if file.startswith("@") else [file] for file in args.files]
        args.files = [file for names in lists for file in names]
    if args.out and args.export:
        raise ConfigError(f"--out {args.out} is for features: remove it, because --export names its own file or folder")
    if args.out and args.out.suffix not in (".npz", ".safetensors"):
        raise ConfigError(f"--out {args.out} ends in neither .npz nor .safetensors: choose one of these endings")
    return args


def export_paths(path: Path) -> list[Path]:
    """Returns the files that `--export` writes, without the model card."""
    names = ("encoder.pt2", "encoder.onnx", "model.safetensors")
    is_file = path.suffix.lower() in (".pt", ".pt2", ".onnx", ".safetensors")
    return [path] if is_file else [path / name for name in names]


if __name__ == "__main__":
    run(main)
