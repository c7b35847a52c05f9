"""Evaluates a checkpoint of train.py by k-NN and linear probe, under several protocols.

The accuracies are compared with those of an untrained encoder and of raw pixels.
"""

import logging

from config.errors import ConfigError
from utils.cli import gather_user_errors, make_parser, overrides, path_option, read_config_if_named, require, run
from utils.distributed.processes import rank
from utils.files import check_writable
from utils.logging import format_table

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python test.py --config config/cifar10.yaml --use_amp
  python test.py --config config/cifar10.yaml --checkpoint runs/cifar10/checkpoints/epoch_0100.pt
  python test.py --config config/digits.yaml --report"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status."""
    # Parse.
    with gather_user_errors():
        parser = make_parser(__doc__ or "", EXAMPLES, of_checkpoint=True)
        parser.add_argument("--report", action="store_true", help="also write a report as a single HTML file")
        parser.add_argument(
            "--out", type=path_option, help="file for the report; default: report.html in the run folder"
        )
        args = parser.parse_intermixed_args(argv)
        config = read_config_if_named(args)
        if args.out and not args.report:
            raise ConfigError(f"--out {args.out} is for the report: add --report")
        if args.timestep is not None and not args.report:
            raise ConfigError(
                f"--timestep {args.timestep} is for the report: add --report, or set 'evaluation.timesteps="
                f"[{args.timestep}]'"
            )

    from datasets.images import DatasetError
    from evaluation.encoders import baselines, encode_with, settled
    from evaluation.judge import judge
    from evaluation.protocols import all_protocols
    from experiment.opening import check_neighbours
    from experiment.trained import check_timestep, open_trained, read_trained
    from utils.device import compute_exactly

    # Open the checkpoint and the images.
    with gather_user_errors():
        if args.report:
            from analysis import report
            from analysis.codec import Codec

            require(*report.NEEDS)
        trained = read_trained(config, args.checkpoint, overrides(args))
        if args.report:
            check_timestep(trained.config, args.timestep)
        experiment, soda = open_trained(trained)
        if experiment.test is None:
            raise DatasetError(
                f"the images in {trained.config.data.root} have no labels: set data.root to images with labels"
            )
        check_neighbours(trained.config, experiment.train)
        path = args.out or trained.folder / "report.html"
        if args.report:
            check_writable(path)

    # Judge. "settled" is the trained encoder, with BatchNorm statistics computed as for the untrained encoder.
    logger.info("evaluating the EMA encoder of %s", trained.describe(experiment))
    encoders = {
        "trained": encode_with(experiment, soda),
        "settled": encode_with(experiment, settled(experiment, soda)),
        **baselines(experiment),
    }
    protocols = all_protocols(trained.config, len(experiment.train))
    table = judge(experiment, encoders, protocols)
    if rank() == 0:
        print(format_table(table))

    # Report.
    if args.report:
        compute_exactly()
        codec = Codec(experiment, soda, experiment.config.seed, args.timestep)
        found, drawn = report.confusions(codec), report.draw_pictures(codec)
        with gather_user_errors():
            if rank() == 0:
                report.write_report(path, trained, codec, protocols, table, found, drawn)
                print(f"\nreport       {path}")
    return 0


if __name__ == "__main__":
    run(main)
