"""Prints the accuracies of features that nothing has trained, under the two protocols of a config.

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
            "--components",
            type=int,
            nargs="+",
            metavar="N",
            help="numbers of principal components of the pixels; default: the width of the latent",
        )
        parser.add_argument(
            "--out",
            type=cli.path_option,
            help="folder where the accuracies are added to results.jsonl, for docs.record",
        )
        args = parser.parse_intermixed_args(argv)
        config = cli.read_config(args)
        counts = args.components or [config.encoder.latent_dim]
        if min(counts) < 1:
            raise ConfigError(f"--components {min(counts)} is too small: give at least 1")

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
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)

    # Judge.
    encoders = {**baselines(experiment), **principal_components(experiment, counts)}
    table = judge(experiment, encoders, config_protocols(config))
    if rank() == 0:
        print(format_table(table))
        if args.out:
            row = {"run": "floors", "digest": "", "images": 0, "table": table, "amp": str(experiment.amp_dtype)}
            append_row(args.out / RESULTS, {**row, "machine": machine(experiment.device)})
    return 0


def principal_components(experiment: Experiment, counts: list[int]) -> dict[str, Encode]:
    """Collective. Returns functions that reduce raw pixels to their principal components on the training images.

    The features have at most as many dimensions as the raw pixels. They are returned under the same name as the raw
    pixels in `baselines`.

    Args:
        counts: numbers of components. A function is returned for each of them, by name, such as "PCA to 128".
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
        axes = principal_axes(raw - mean)[0].flip(1)  # the axes are ordered by rising variance

    def reduced(num_components: int) -> Encode:
        return lambda views, _: {name: (raw_pixels(views, count) - mean) @ axes[:, :num_components]}

    return {f"PCA to {num_components}": reduced(num_components) for num_components in counts}


if __name__ == "__main__":
    cli.run(main)
