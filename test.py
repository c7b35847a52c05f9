"""Evaluates a checkpoint of train.py by k-NN and linear probe, under several protocols, or by other measures.

The results are compared with those of an untrained encoder and of raw pixels.
"""

import argparse
import logging

from config.errors import ConfigError
from evaluation.measures import Measured, describe_measures, find_measures, measures_option
from utils.cli import gather_user_errors, make_parser, overrides, path_option, read_config_if_named, require, run
from utils.distributed.processes import rank
from utils.files import check_writable
from utils.logging import format_table

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python test.py --config config/cifar10.yaml --use_amp
  python test.py --config config/cifar10.yaml --checkpoint runs/cifar10/checkpoints/epoch_0100.pt
  python test.py --config config/digits.yaml --report
  python test.py --config config/digits.yaml --measures all
  python test.py --config config/cifar10.yaml --measures few_labels,uniformity --report"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status."""
    # Parse.
    with gather_user_errors():
        args = parse(argv)
        config = read_config_if_named(args)
        judges, needs_one_z = args.report or not args.measures, args.report or bool(args.measures)

    from datasets.images import DatasetError
    from evaluation.encoders import baselines, encode_with, settled
    from evaluation.judge import judge
    from evaluation.measures.recording import Record
    from evaluation.measures.subjects import open_others, subjects_of
    from evaluation.protocols import all_protocols
    from experiment.opening import check_neighbours
    from experiment.trained import check_no_cameras, check_timestep, open_trained, read_trained
    from utils.device import compute_exactly

    # Open the checkpoint and the images.
    with gather_user_errors():
        if args.report:
            from analysis import report
            from analysis.codec import Codec

            require(*report.NEEDS)
        trained = read_trained(config, args.checkpoint, overrides(args))
        if needs_one_z:
            check_no_cameras(trained.config, "the report" if args.report else "--measures")
            check_timestep(trained.config, args.timestep)
        experiment, soda = open_trained(trained)
        if judges and not experiment.has_test_labels:
            raise DatasetError(
                f"{trained.config.data.root} has no test images with labels: set data.root to images with labels"
            )
        if judges:
            check_neighbours(trained.config, experiment.train)
        measures = find_measures(args.measures, experiment)
        others = open_others(args.others, experiment) if measures else None
        path = args.out or trained.folder / "report.html"
        if args.report:
            check_writable(path)

    # Judge. "settled" is the trained encoder, with BatchNorm statistics computed as for the untrained encoder.
    logger.info("evaluating the EMA encoder of %s", trained.describe(experiment))
    if judges:
        encoders = {
            "trained": encode_with(experiment, soda),
            "settled": encode_with(experiment, settled(experiment, soda)),
            **baselines(experiment),
        }
        protocols = all_protocols(trained.config, len(experiment.train))
        table = judge(experiment, encoders, protocols)
        if rank() == 0:
            print(format_table(table))

    # Measure.
    measured: dict[str, Measured] = {}
    if measures:
        record, subjects = Record(trained, experiment), subjects_of(experiment, soda, args.timestep, others)
        for measure in measures:
            measured[measure.name] = measure.measure(subjects)
            with gather_user_errors():
                if rank() == 0:
                    print(f"\n{measure.name}: {measured[measure.name]}", flush=True)
                    record.add(measure.name, measured[measure.name])

    # Report.
    if args.report:
        compute_exactly()
        codec = Codec(experiment, soda, experiment.config.seed, args.timestep)
        found, drawn = report.confusions(codec), report.draw_pictures(codec)
        with gather_user_errors():
            if rank() == 0:
                report.write_report(path, trained, codec, protocols, table, measured, found, drawn)
                print(f"\nreport       {path}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line. Raises ConfigError if an option needs another option that is missing."""
    parser = make_parser(__doc__ or "", f"{EXAMPLES}\n\nmeasures:\n{describe_measures()}", of_checkpoint=True)
    parser.add_argument("--report", action="store_true", help="also write a report as a single HTML file")
    parser.add_argument("--out", type=path_option, help="file for the report; default: report.html in the run folder")
    parser.add_argument(
        "--measures",
        type=measures_option,
        default=[],
        metavar="NAMES",
        help="measures to print instead of the accuracies: all, or names in the list below, separated by commas; with "
        "--report, the accuracies are printed as well",
    )
    parser.add_argument(
        "--others",
        type=path_option,
        metavar="FOLDER",
        help="images that the measure anomalies compares with the test images; default: synthetic shapes",
    )
    args = parser.parse_intermixed_args(argv)
    if args.out and not args.report:
        raise ConfigError(f"--out {args.out} is for the report: add --report")
    if args.others and not {"all", "anomalies"} & set(args.measures):
        raise ConfigError(f"--others {args.others} is for the measure anomalies: add --measures anomalies")
    if args.timestep is not None and not (args.report or args.measures):
        raise ConfigError(
            f"--timestep {args.timestep} is for the report and the measures: add --report or --measures, or set "
            f"'evaluation.timesteps=[{args.timestep}]'"
        )
    return args


if __name__ == "__main__":
    run(main)
