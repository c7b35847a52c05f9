"""Train SODA: encoder and decoder together, from one config file. The same command, given again, resumes."""

import logging
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

from utils.cli import errors_under_way, make_parser, read_config, run, user_errors
from utils.config import Config, ConfigError
from utils.config_file import differences, parse_config, result_digest
from utils.distributed import exchange, from_rank_0, rank, same_everywhere
from utils.files import FolderError, InUseError, lock_file, write_text
from utils.logging import format_table, log_to, phases

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python train.py --config config/digits.yaml
  python train.py --config config/cifar10.yaml --use_amp training.epochs=200 output_dir=runs/short
  python train.py --config config/folder.yaml data.root=photos --dry-run
  torchrun --nproc_per_node=4 train.py --config config/cifar10.yaml --use_amp"""

LOCK = ".lock"  # in the run's folder, held by a run while it lives


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the model's size, exit")
    with user_errors(ConfigError):
        args = parser.parse_intermixed_args(argv)
        config = read_config(args)

    # The heavy imports come after the config is known to be good: a mistake in it is answered at once.
    from datasets import DatasetError
    from training.experiment import check_shares, describe_model, initial_state, open_experiment
    from training.loop import train
    from training.reports import read_results
    from utils.checkpoint import CheckpointError
    from utils.device import OutOfMemoryError, memory_for

    if args.dry_run:
        if rank() == 0:
            print(config.to_yaml(), describe_model(config), sep="\n")
        return 0
    folder = Path(config.output_dir)
    with ExitStack() as held:
        with user_errors(ConfigError, DatasetError, CheckpointError, OutOfMemoryError):
            check_shares(config)
            lock = held.enter_context(hold(folder)) if rank() == 0 and (folder / LOCK).exists() else None
            exchange()  # nobody reads what another run may still write
            checkpoint, saved = load_newest(folder / "checkpoints")
            if not same_everywhere(saved and saved["step"]):
                raise ConfigError(
                    f"the machines see different files in {folder}: output_dir must be storage they share"
                )
            check_folder(folder, config, saved)
            results = from_rank_0(read_results(folder))
            if saved and (results.get("config_digest"), results.get("step")) == (result_digest(config), saved["step"]):
                epochs = config.training.epochs
                logger.info("finished: all %d epochs are done; raise training.epochs to go on", epochs)
                if rank() == 0:
                    print(summary(config, results["table"]))
                return 0

            phases.info("opening %s", config.data.name)
            experiment = open_experiment(config)
            if saved and saved["data"] != experiment.data_digest:
                raise DatasetError(
                    f"{config.data.root} holds other images than {checkpoint} was trained on: "
                    "put those back, or choose another output_dir"
                )
            with memory_for(lambda: "take a smaller model, or another device"):
                state = initial_state(experiment)
            if saved:
                state.load_state_dict(saved)
                logger.info("%s: at step %d of %d", checkpoint, state.step, experiment.total_steps)
            if experiment.test is None:
                logger.info("the images have no labels: k-NN and linear probe are skipped")
            if rank() == 0:
                if lock is None:
                    held.enter_context(hold(folder))
                prepare_folder(folder, config, resumes=saved is not None)
            exchange()
            held.enter_context(log_to(folder / "logs"))
            del saved
        # What was well at the start may not stay so.
        with errors_under_way(DatasetError, FolderError, OutOfMemoryError):
            train(experiment, state, folder, checkpoint)
        if rank() == 0:
            print(summary(config, read_results(folder)["table"]))
    return 0


def load_newest(folder: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint that all processes go on from, as rank 0 chooses, and what it holds; None where there is none."""
    from utils.checkpoint import load_checkpoint, newest_checkpoint

    newest = newest_checkpoint(folder) if rank() == 0 else None
    path = from_rank_0(newest and newest[0])
    if newest or path is None or not path.exists():
        return newest or (None, None)
    return path, load_checkpoint(path)


def check_folder(folder: Path, config: Config, saved: dict[str, Any] | None) -> None:
    """Refuse a folder that holds another experiment or something else; name the run keys that changed."""
    written = folder / "config.yaml"
    if saved:
        before = parse_config(saved["config"], f"the config in {folder}")
    elif written.exists():
        try:
            if not written.read_text().strip():
                raise ConfigError("it is empty")
            before = parse_config(written.read_text(), str(written))
        except (ConfigError, UnicodeDecodeError, IsADirectoryError):
            raise ConfigError(f"{written} is not of a run of this program: choose another output_dir") from None
    else:
        return
    changed = differences(before, config, run=False)
    constant = config.optimizer.schedule == "constant"  # else the last epoch decides every learning rate
    if "training.epochs" in changed and config.training.epochs > before.training.epochs and constant:
        del changed["training.epochs"]  # more epochs go on with the same experiment
    if set(changed) == {"training.epochs"} and not constant:
        raise ConfigError(
            f"{folder} was begun for {before.training.epochs} epochs, on which optimizer.schedule=cosine depends: "
            "choose another output_dir"
        )
    if changed:
        listing = ", ".join(f"{name} was {old} and is {new}" for name, (old, new) in changed.items())
        raise ConfigError(
            f"{folder} holds another experiment: {listing}; "
            "choose another output_dir, remove that folder, or give these keys their former values"
        )
    for name, (old, new) in differences(before, config, run=True).items():
        logger.info("%s was %s and is now %s", name, old, new)


def hold(folder: Path) -> TextIO:
    """Make the run's folder, which is ours until what is returned is closed; raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock_file(folder / LOCK)
    except InUseError as holder:
        raise ConfigError(f"{folder} is in use by {holder}: end it or wait, or choose another output_dir") from None
    except OSError as error:
        raise ConfigError(f"cannot write to output_dir {folder}: {error.strerror}") from None


def prepare_folder(folder: Path, config: Config, resumes: bool) -> None:
    """Make what a run writes into, and write its resolved config; raises ConfigError."""
    if not resumes and any((folder / "checkpoints").glob("*.pt")):
        raise ConfigError(f"another run has just used {folder}: start again to go on with it")
    try:
        for name in ("checkpoints", "logs", "samples", "tensorboard"):
            (folder / name).mkdir(exist_ok=True)
            TemporaryFile(dir=folder / name).close()  # it can be written to, too
        for name in ("metrics.jsonl", "results.json"):
            if (folder / name).is_dir():
                raise ConfigError(f"{folder / name} is a folder: choose another output_dir")
        write_text(folder / "config.yaml", config.to_yaml())
    except OSError as error:
        raise ConfigError(f"cannot write to output_dir {folder}: {error.strerror}") from None


def summary(config: Config, table: dict[str, dict[str, dict[str, float]]]) -> str:
    """The closing table and where everything is."""
    folder = Path(config.output_dir)
    lines = ["", format_table(table)] if table else []
    if config.data.name == "digits" and table:
        lines.append("Digits are nearly solved by their raw pixels: this run shows that training works, no more.")
    grids = sorted((folder / "samples").glob("*.png"))
    lines += ["", f"checkpoint   {folder / 'checkpoints' / 'last.pt'}"]
    lines += [f"sample grid  {grids[-1]}"] if grids else []
    lines += [f"TensorBoard  tensorboard --logdir {folder / 'tensorboard'}"]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
