"""Judge a checkpoint of train.py: k-NN and linear probe under every protocol, beside untrained and raw pixels."""

import json
import logging
import shlex
from pathlib import Path

from utils.cli import errors_under_way, make_parser, read_config, run, user_errors
from utils.config import ConfigError
from utils.config_file import differences, parse_config
from utils.distributed import rank

logger = logging.getLogger(__name__)

EXAMPLES = """\
  python test.py --config config/cifar10.yaml --use_amp
  python test.py --config config/cifar10.yaml --checkpoint runs/cifar10/checkpoints/epoch_0100.pt"""

# What the weights mean. Seed, views, diffusion and batch size are the checkpoint's; the rest is no matter to a judge.
MUST_AGREE = ("data.", "encoder.", "decoder.", "initialization")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--checkpoint", type=Path, help="default: checkpoints/last.pt in the config's output_dir")
    with user_errors(ConfigError):
        args = parser.parse_intermixed_args(argv)
        config = read_config(args)

    from datasets import DatasetError
    from training.experiment import build_on_meta, initial_state, open_experiment
    from training.judge import all_protocols, baselines, encode_with, judge, settled
    from training.state import first_difference
    from utils.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint
    from utils.logging import format_table

    with user_errors(ConfigError, DatasetError, CheckpointError):
        folder = Path(config.output_dir) / "checkpoints"
        checkpoint = args.checkpoint or folder / "last.pt"
        newest = None if args.checkpoint else newest_checkpoint(folder)
        checkpoint, saved = newest or (checkpoint, load_checkpoint(checkpoint))
        trained_with = parse_config(saved["config"], str(checkpoint))
        changed = differences(trained_with, config, run=False, prefixes=MUST_AGREE)
        if changed:
            told = dict(changed)
            if "decoder.modulation" in changed:  # without which these would be refused
                told |= differences(trained_with, config, run=False, prefixes=("training.mask.",))
                told |= differences(trained_with, config, run=True, prefixes=("sampling.sections", "sampling.guidance"))
            hint = " ".join(shlex.quote(f"{name}={json.dumps(old)}") for name, (old, _) in told.items())
            shapes = first_difference(saved["model"], build_on_meta(config))
            reason = f" ({shapes})" if shapes else ""
            raise ConfigError(f"{checkpoint} was trained with another config{reason}: add {hint}")
        views = trained_with.views.model_copy(update={"probe": config.views.probe})
        training = trained_with.training.model_copy(update={"use_amp": config.training.use_amp})
        as_trained = {"seed": trained_with.seed, "diffusion": trained_with.diffusion}
        config = config.model_copy(update={**as_trained, "views": views, "training": training})
        config = parse_config(config.to_yaml(), f"the command line with the config of {checkpoint}")  # checked anew
        experiment = open_experiment(config)
        if experiment.test is None:
            raise DatasetError(f"{config.data.root} has no labels, without which nothing can be judged")
        state = initial_state(experiment)
        state.load_state_dict(saved)
        if saved["data"] != experiment.data_digest:
            logger.info("the training images in %s are not those of the checkpoint", config.data.root)
        epoch = state.step / experiment.loader.steps_per_epoch
        logger.info("judging the EMA encoder of %s, epoch %g, step %d", checkpoint, epoch, state.step)

    soda = state.ema.module
    # "settled": with BatchNorm statistics made as those of the untrained encoder are.
    with errors_under_way(DatasetError):
        encoders = {
            "trained": encode_with(experiment, soda),
            "settled": encode_with(experiment, settled(experiment, soda)),
            **baselines(experiment),
        }
        table = judge(experiment, encoders, all_protocols(experiment))
    if rank() == 0:
        print(format_table(table))
    return 0


if __name__ == "__main__":
    run(main)
