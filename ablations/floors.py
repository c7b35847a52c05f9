"""Prints the accuracies of baseline features, under the two protocols of a config.

The features are those of the untrained encoder, the raw pixels, and the raw pixels reduced by principal component
analysis. A trained encoder has learned something if it is above all of them.

  python -m ablations.floors --config config/cifar10.yaml data.root=data evaluation.knn.bank=clean
  python -m ablations.floors --config config/cifar10_cpu.yaml --components 128 --out runs/cifar10_floors
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ablations.result_rows import RESULTS, append_row
from config.errors import ConfigError
from utils import cli
from utils.distributed.processes import rank
from utils.files import check_writable

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.encoders import Encode
    from experiment.opening import Experiment


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status."""
    # Parse.
    with cli.gather_user_errors():
        parser = cli.make_parser(__doc__ or "", "  python -m ablations.floors --config config/digits.yaml")
        parser.add_argument(
            "--components", type=int, help="number of principal components; default: the width of the latent"
        )
        parser.add_argument(
            "--out",
            type=cli.path_option,
            help="folder of a file results.jsonl, to which the accuracies are added, for docs.record",
        )
        parser.add_argument("--data", help="name of the data set in results.jsonl; default: the config's data.name")
        args = parser.parse_intermixed_args(argv)
        config = cli.read_config(args)
        num_components = config.encoder.latent_dim if args.components is None else args.components
        if num_components < 1:
            raise ConfigError(f"--components {num_components} is too small: give at least 1")
        if args.out:
            check_writable(args.out / RESULTS)
        elif args.data:
            raise ConfigError("--data is for results.jsonl: add --out")

    import torch

    from benchmarks.measure import machine
    from evaluation.encoders import baselines
    from evaluation.judge import check_can_judge, judge
    from evaluation.protocols import config_protocols
    from experiment.opening import open_experiment
    from utils.logging import format_table

    # Open the images.
    with cli.gather_user_errors():
        experiment = open_experiment(config)
        check_can_judge(experiment)

    # Judge.
    pca, num_components = principal_components(experiment, num_components)
    encoders = {**baselines(experiment), f"PCA to {num_components}": pca}
    table = judge(experiment, encoders, config_protocols(config))
    if rank() == 0:
        print(format_table(table))
    with cli.gather_user_errors():
        if rank() == 0 and args.out:
            name = f"floors-{num_components}-{config.seed}"
            row = {"run": name, "stage": "floors", "variant": f"PCA to {num_components}", "seed": config.seed}
            row |= {"digest": "", "images": 0, "table": table, "data": args.data or config.data.name}
            row |= {"machine": machine(experiment.device), "amp": str(experiment.amp_dtype or torch.float32)}
            args.out.mkdir(parents=True, exist_ok=True)
            append_row(args.out / RESULTS, row)
    return 0


def principal_components(experiment: Experiment, num_components: int) -> tuple[Encode, int]:
    """Collective. Returns a function that reduces raw pixels to their principal components on the training images.

    Also returns the number of components, which is at most the number of raw pixels. The features are returned under
    the same name as the raw pixels in `baselines`.
    """
    from evaluation.encoders import raw_pixels
    from evaluation.features import Features, extract_features
    from evaluation.knn import true_float32
    from evaluation.logistic_regression import principal_axes
    from evaluation.protocols import config_protocols

    config, count = experiment.config, len(experiment.train)
    name = config_protocols(config)[0].feature_name

    def encode(pixels: Tensor, indices: range) -> Features:
        return {name: raw_pixels(experiment.views.evaluation(pixels), count)}

    raw = extract_features(encode, experiment.train, config.evaluation.batch_size, experiment.device)[name]  # (N, D)
    mean = raw.mean(dim=0)
    with true_float32():
        axes = principal_axes(raw - mean)[0].flip(1)[:, :num_components]  # the axes are ordered by rising variance
    return lambda views, _: {name: (raw_pixels(views, count) - mean) @ axes}, axes.shape[1]


if __name__ == "__main__":
    cli.run(main)
