"""Trains an image classifier with few labels: on top of a trained encoder, or from scratch.

If a run was stopped, the same command resumes it from its last checkpoint.
"""

import shlex
from pathlib import Path

from config.finetune_schema import FinetuneConfig
from utils.cli import gather_user_errors, make_parser, path_option, read, run
from utils.distributed.processes import rank
from utils.files import write_text
from utils.logging import format_table
from utils.run_folder.results import read_results

EXAMPLES = """\
  python finetune.py --config config/finetune_digits.yaml num_labels=50 label_split=3
  python finetune.py --config config/finetune_digits.yaml method=laplacenet
  python finetune.py --config config/finetune_folder.yaml data.root=labelled --predict unlabelled
  python finetune.py --config config/laplacenet_cifar10.yaml encoder.weights=runs/drl_cifar10/checkpoints/last.pt
  torchrun --nproc_per_node=4 finetune.py --config config/laplacenet_cifar10.yaml --use_amp"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status."""
    # Parse the command line and the config. Heavy imports come later, so that mistakes are reported immediately.
    with gather_user_errors():
        parser = make_parser(__doc__ or "", EXAMPLES, schema=FinetuneConfig)
        parser.add_argument(
            "--predict",
            type=path_option,
            metavar="FOLDER",
            help="classify all images below FOLDER with the newest checkpoint of the run, and exit; classes and "
            "probabilities are written to predictions/FOLDER.csv in the run folder (a--b.csv for the folder a/b)",
        )
        args = parser.parse_intermixed_args(argv)
        config = read(FinetuneConfig, args)
    if args.predict:
        classify(config, args.predict)
        return 0

    from experiment.shares import check_batch_size
    from experiment.starting import check_origin
    from transfer.classifier import read_starting_weights
    from transfer.loop import finetune
    from transfer.opening import open_task
    from transfer.state import initial_state
    from utils.run_folder.folder import RunFolder

    with RunFolder(config) as folder:
        # Open the run folder, the images and the state. Until all of them are valid, nothing in the run folder changes,
        # except its lock.
        with gather_user_errors():
            check_batch_size(config.training.batch_size, multiple=1)
            folder.open()
            if folder.checkpoint:
                check_origin({"encoder": config.encoder.weights}, folder.started_from)
            if folder.is_finished() and not config.labelled:  # with `labelled`, its images are compared first
                folder.log_finished()
                report(config)
                return 0
            starting = {} if folder.checkpoint else read_starting_weights(config)
            known = folder if folder.checkpoint else starting.get("encoder")
            task = open_task(config, known.statistics, known.grey_bits) if known else open_task(config)
            folder.check_images(task.data_digest)
            state = initial_state(task, starting)
            if folder.checkpoint:
                folder.resume(state, task.total_steps)
            del starting, known  # the host copy of the weights
            folder.prepare()
        # Train.
        finetune(task, state, folder)
        # Report.
        report(config)
    return 0


def classify(config: FinetuneConfig, images: Path) -> None:
    """Collective. Writes the classes of the images in a folder to a CSV file, and prints the file's path on rank 0."""
    with gather_user_errors():
        from analysis.predictions import open_prediction
        from datasets.findings import UnreadableError

        opened = open_prediction(config, images)
    path = opened.path
    try:
        text, counts = opened.table()
    except UnreadableError as error:
        with gather_user_errors():
            raise error.with_advice(path.parent, f"{path.stem}.unreadable.txt") from None
    with gather_user_errors():
        if rank() == 0:
            path.parent.mkdir(exist_ok=True)
            write_text(path, text)
            print(*(f"{name}: {count}" for name, count in counts.most_common()), path, sep="\n")


def report(config: FinetuneConfig) -> None:
    """Prints on rank 0 the table of accuracies and the paths of checkpoint and TensorBoard files."""
    if rank() > 0:
        return
    folder = Path(config.output_dir)
    table = read_results(folder)["table"]
    print("", format_table(table), sep="\n")
    print(f"\ncheckpoint   {folder / 'checkpoints' / 'last.pt'}")
    print(f"TensorBoard  tensorboard --logdir {shlex.quote(str(folder / 'tensorboard'))}")


if __name__ == "__main__":
    run(main)
