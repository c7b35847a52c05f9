"""Features to take away: of a split, a folder or files; or the encoder itself, as a program that needs none of this."""

from pathlib import Path

from utils.cli import errors_under_way, make_parser, overrides, read_config_if_named, run, user_errors
from utils.config import ConfigError
from utils.distributed import rank
from utils.files import check_writable

EXAMPLES = """\
  python embed.py --checkpoint runs/digits/checkpoints/last.pt --split test --out digits.npz
  python embed.py --config config/cifar10.yaml --folder photos --out photos.safetensors
  python embed.py --config config/cifar10.yaml --files @list.txt          (a file's name in each line)
  python embed.py --config config/cifar10.yaml --export encoder           (encoder/encoder.pt2 and encoder.onnx)"""


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__ or "", EXAMPLES, of_checkpoint=True)
    parser.fromfile_prefix_chars = "@"
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--split", choices=("train", "test"), help="images of the data set")
    what.add_argument("--folder", type=Path, help="all images below it; sub-folders, if all lie in such, are classes")
    what.add_argument("--files", nargs="+", metavar="FILE", help="images, or @LIST, a text file that names them")
    what.add_argument("--export", type=Path, metavar="FOLDER", help="write encoder.pt2 and encoder.onnx")
    parser.add_argument(
        "--out", type=Path, help="ends in .npz or .safetensors; default: features/<what>.npz in the run's folder"
    )
    with user_errors(ConfigError):
        args = parser.parse_intermixed_args(argv)
        config = read_config_if_named(args)
        if args.out and args.export:
            raise ConfigError(f"--out {args.out} is for features: --export names its own folder")
        if args.out and args.out.suffix not in (".npz", ".safetensors"):
            raise ConfigError(f"--out {args.out} ends in neither .npz nor .safetensors")

    from analysis import require
    from analysis.encoder import ExportError, export, image_encoder
    from analysis.features import encode, of_files, of_folder, of_split, save_features
    from datasets import DatasetError
    from training.experiment import open_device, open_experiment
    from training.trained import read_trained
    from utils.checkpoint import CheckpointError
    from utils.device import OutOfMemoryError, compute_exactly

    with user_errors(ConfigError, DatasetError, CheckpointError, ExportError):
        if args.export:
            require("onnx", "onnxscript", "onnxruntime")
        elif args.out and args.out.suffix == ".safetensors":
            require("safetensors")
        trained = read_trained(config, args.checkpoint, overrides(args))
        config = trained.config
        encoder = image_encoder(trained)
        if args.export:
            check_writable(args.export / "encoder.onnx")
            if rank() == 0:
                for path, difference in export(encoder, args.export, {"checkpoint": trained.digest}).items():
                    print(f"{path}  (off by at most {difference:.1g})")
            return 0
        if args.split:
            experiment = open_experiment(config)
            device, amp_dtype, source = experiment.device, experiment.amp_dtype, of_split(experiment, args.split)
        else:
            device, amp_dtype = open_device(config)
            source = of_folder(args.folder, config) if args.folder else of_files(args.files, config)
        compute_exactly()
        name = args.split or (args.folder.resolve().name if args.folder else "files")
        path = args.out or trained.folder / "features" / f"{name}.npz"
        check_writable(path)
    with errors_under_way(DatasetError, OutOfMemoryError):
        features = encode(encoder.to(device), source, config, amp_dtype)
    with user_errors():
        if rank() == 0:
            save_features(path, features, source, trained.digest)
            print(path)
    return 0


if __name__ == "__main__":
    run(main)
