"""Evaluates a checkpoint of train.py by k-NN and linear probe, under several protocols, or by other measures.

The results are compared with those of an untrained encoder and of raw pixels. For photographs with cameras
(data.name=posed), novel views are generated and scored as well.
"""

import argparse
import logging

from config.errors import ConfigError
from evaluation.measures import add_options, check_options, describe_measures
from utils.cli import gather_user_errors, make_parser, overrides, path_option, read_config_if_named, require, run
from utils.distributed.processes import rank
from utils.files import check_writable
from utils.logging import format_table

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python test.py --config config/cifar10.yaml --use_amp
  python test.py --config config/cifar10.yaml --checkpoint runs/cifar10/checkpoints/epoch_0100.pt
  python test.py --config config/digits.yaml --report
  python test.py --checkpoint pretrained/cifar10_cpu.pt --protocols config
  python test.py --config config/cars3d.yaml --report
  python test.py --config config/digits.yaml --measures all
  python test.py --config config/cifar10.yaml --measures few_labels,uniformity --report"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status."""
    # Parse.
    with gather_user_errors():
        args = parse(argv)
        config = read_config_if_named(args)
        judges, needs_one_z = args.report or not args.measures, args.report or bool(args.measures)

    from evaluation.codec import Codec
    from evaluation.judge import check_can_judge, judge_trained
    from evaluation.measures.recording import Record
    from evaluation.novel_views.judging import check_can_judge_views, judge_novel_views
    from evaluation.protocols import all_protocols, config_protocols
    from experiment.trained import check_no_cameras, check_timestep, open_trained, read_trained
    from utils.device import compute_exactly, memory_for

    # Open the checkpoint and the images.
    with gather_user_errors():
        if args.report:
            from analysis import report, views_report

            require(*report.NEEDS)
        trained = read_trained(config, args.checkpoint, overrides(args))
        has_cameras = trained.config.data.has_cameras
        if args.measures:
            check_no_cameras(trained.config, "--measures")
        if args.timestep is not None or (needs_one_z and not has_cameras):
            check_timestep(trained.config, args.timestep)
        experiment, soda = open_trained(trained)
        compute_exactly()
        if has_cameras:
            check_can_judge_views(experiment)
            judges = experiment.has_test_labels  # without labels, only the views are judged
            if (args.protocols or args.no_baselines) and not judges:
                given = f"--protocols {args.protocols}" if args.protocols else "--no_baselines"
                raise ConfigError(f"{given} needs test images with labels: remove it")
        if judges:
            check_can_judge(experiment)
        codec, measuring = Codec(experiment, soda, experiment.config.seed, args.timestep), None
        record = Record(trained, experiment, args.results)
        if args.measures or has_cameras:
            record.log_obstacle()
        if args.measures:
            from analysis.measuring import open_measures

            measuring = open_measures(args, trained, codec, record)
        path = args.out or trained.folder / "report.html"
        if args.report:
            check_writable(path)

    # Judge and measure.
    logger.info("evaluating the EMA encoder of %s", trained.describe(experiment))
    smaller = max(1, trained.config.evaluation.batch_size // 2)
    with memory_for(lambda: f"set evaluation.batch_size={smaller}"):
        protocols, table = [], {}
        if judges:
            protocols = config_protocols(experiment.config)
            if args.protocols != "config":
                protocols = all_protocols(experiment.config, len(experiment.train))
            table = judge_trained(experiment, soda, protocols, with_baselines=not args.no_baselines)
            if rank() == 0:
                print(format_table(table))
                record.add_accuracies(table)
        measured = judge_novel_views(experiment, soda, record) if has_cameras else {}
        if measuring:
            measured = measuring.run()

    # Report.
    if args.report:
        if has_cameras:
            views_report.make_report(path, trained, codec, measured, table)
        else:
            report.make_report(path, trained, codec, protocols, table, measured)
        if rank() == 0:
            print(f"\nreport       {path}")
    with gather_user_errors():
        record.check()
        if measuring:
            measuring.check_complete()
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line. Raises ConfigError if an option needs another option that is missing."""
    parser = make_parser(__doc__ or "", f"{EXAMPLES}\n\nmeasures:\n{describe_measures()}", of_checkpoint=True)
    parser.add_argument(
        "--protocols",
        choices=("all", "config"),
        help="all, the default: also the reference implementation's protocols, which encode all training images once "
        "for each of the probe's 15 epochs; config: only those of the config's section evaluation, which train.py uses",
    )
    parser.add_argument(
        "--no_baselines",
        action="store_true",
        help="judge only the trained encoder, not the settled and the untrained one and the raw pixels: images are "
        "encoded once instead of three times",
    )
    parser.add_argument("--report", action="store_true", help="also write a report as a single HTML file")
    parser.add_argument("--out", type=path_option, help="file for the report; default: report.html in the run folder")
    parser.add_argument(
        "--results",
        type=path_option,
        metavar="FILE",
        help="JSON file for accuracies and measures; default: measures are added to results.json of the run, if the "
        "images are those of the run",
    )
    add_options(parser)
    args = parser.parse_intermixed_args(argv)
    if args.out and not args.report:
        raise ConfigError(f"--out {args.out} is for the report: add --report")
    check_options(args)
    if args.protocols and args.measures and not args.report:
        raise ConfigError(f"--protocols {args.protocols} is for the accuracies: add --report, or remove --measures")
    if args.no_baselines and args.measures and not args.report:
        raise ConfigError("--no_baselines is for the accuracies: add --report, or remove --measures")
    if args.timestep is not None and not (args.report or args.measures):
        raise ConfigError(
            f"--timestep {args.timestep} is for the report and the measures: add --report or --measures, or set "
            f"'evaluation.timesteps=[{args.timestep}]'"
        )
    return args


if __name__ == "__main__":
    run(main)
