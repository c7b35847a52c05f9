"""Prints the accuracies of features that nothing has trained, under the two protocols of a config.

The features are those of the untrained encoder, the raw pixels, and the raw pixels reduced by principal component
analysis to as many dimensions as the latent has. A trained encoder has learned something if it is above all of them.

  python -m ablations.floors --config config/cifar10.yaml data.root=data evaluation.knn.bank=clean
"""

from utils import cli
from utils.distributed.processes import rank


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status."""
    # Parse.
    with cli.gather_user_errors():
        parser = cli.make_parser(__doc__ or "", "  python -m ablations.floors --config config/digits.yaml")
        config = cli.read_config(parser.parse_intermixed_args(argv))

    from evaluation.encoders import baselines, principal_components
    from evaluation.judge import check_can_judge, judge
    from evaluation.protocols import config_protocols
    from experiment.opening import open_experiment
    from utils.logging import format_table

    # Open the images.
    with cli.gather_user_errors():
        experiment = open_experiment(config)
        check_can_judge(experiment)

    # Judge.
    num_components = config.encoder.latent_dim
    encoders = {
        **baselines(experiment),
        f"PCA to {num_components}": principal_components(experiment, num_components),
    }
    table = judge(experiment, encoders, config_protocols(config))
    if rank() == 0:
        print(format_table(table))
    return 0


if __name__ == "__main__":
    cli.run(main)
