"""Trains SODA, an image encoder together with a denoising decoder, as a config file describes.

If a run was stopped, the same command resumes it from its last checkpoint.
"""

import shlex
from pathlib import Path

from config.schema import Config
from utils.cli import gather_user_errors, make_parser, read_config, run
from utils.distributed.processes import rank
from utils.logging import format_table
from utils.run_folder.results import read_results

EXAMPLES = """\
  python train.py --config config/digits.yaml
  python train.py --config config/cifar10.yaml --use_amp training.epochs=200 output_dir=runs/short
  python train.py --config config/folder.yaml data.root=photos --dry-run
  torchrun --nproc_per_node=4 train.py --config config/cifar10.yaml --use_amp"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status."""
    # Parse the command line and the config. Heavy imports come later, so that mistakes are reported immediately.
    with gather_user_errors():
        parser = make_parser(__doc__ or "", EXAMPLES)
        parser.add_argument(
            "--dry-run", action="store_true", help="print the resolved config and the size of the model, and exit"
        )
        args = parser.parse_intermixed_args(argv)
        config = read_config(args)

    from experiment.models import describe_model
    from experiment.opening import check_can_train, open_experiment
    from experiment.shares import check_shares
    from experiment.starting import check_origin, read_starting_weights, weight_paths
    from experiment.timesteps import check_timesteps
    from training.loop import train
    from training.state import initial_state
    from utils.run_folder.folder import RunFolder

    # Check what depends on the number of processes and on the noise schedule.
    with gather_user_errors():
        check_shares(config.training)
        check_timesteps(config)
    if args.dry_run:
        if rank() == 0:
            print(config.to_yaml(), describe_model(config), sep="\n")
        return 0
    with RunFolder(config) as folder:
        # Open the run folder, the images and the state. Until all of them are valid, nothing in the run folder changes,
        # except its lock.
        with gather_user_errors():
            folder.open()
            if folder.checkpoint:
                check_origin(weight_paths(config), folder.started_from)
            if folder.is_finished():
                folder.log_finished()
                report(config)
                return 0
            starting = {} if folder.checkpoint else read_starting_weights(config)
            known = folder if folder.checkpoint else starting.get("encoder")
            # A frozen encoder gets the images in the normalisation that it was trained with.
            as_trained = (known.statistics, known.grey_bits) if known and config.encoder.frozen else ()
            experiment = open_experiment(config, *as_trained)
            check_can_train(experiment)
            folder.check_images(experiment.data_digest)
            state = initial_state(experiment, starting)
            if folder.checkpoint:
                folder.resume(state, experiment.total_steps)
            del starting, known  # the host copies of the weights
            folder.prepare()
        # Train.
        train(experiment, state, folder)
        # Report.
        report(config)
    return 0


def report(config: Config) -> None:
    """Prints on rank 0 the table of accuracies and the paths of checkpoint, sample grid and TensorBoard files."""
    if rank() > 0:
        return
    folder = Path(config.output_dir)
    table = read_results(folder)["table"]
    if table:
        print("", format_table(table), sep="\n")
    if config.data.name == "digits" and table:
        print("Raw pixels alone nearly solve digits: this table shows only that training works.")
    samples = folder / "samples"
    grids = sorted(samples.glob("epoch_*.png")) or sorted(samples.glob("*.png"))  # those of steps are earlier
    print(f"\ncheckpoint   {folder / 'checkpoints' / 'last.pt'}")
    if grids:
        print(f"sample grid  {grids[-1]}")
    print(f"TensorBoard  tensorboard --logdir {shlex.quote(str(folder / 'tensorboard'))}")


if __name__ == "__main__":
    run(main)
