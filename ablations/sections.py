"""Measures the sections of a latent for three variants: shared, sectioned, and sectioned with masking.

Each variant is trained for the same number of steps with each seed. Then the EMA model is measured:

- loss: test loss with the whole latent;
- k-NN, probe: top-1 accuracy of z in per cent, under the config's protocols;
- probe of: accuracy of the same probe on one section only, or on the whole latent, without scaling to length 1;
- swapped: change of a decoded image when one section is taken from another image, divided by the change when the whole
  latent is taken from it;
- coarse: fraction of the square of this change that remains after averaging over squares of 4 x 4 px (for white noise,
  0.06);
- own: variance of a section, in per cent, that no linear function of the other sections explains;
- without: increase of the loss, in per cent, if one section is set to zero. Only masked training drops single
  sections: the decoders of the other variants have never seen such an input.

A shared latent has no sections. As a control, it is split at the same positions. Run the same command again to resume.
Each run leaves one JSON line in `<out>/results.jsonl`, and its checkpoint, so that it can be measured again without
training.

  python -m ablations.sections --out runs/sections
"""

import argparse
import logging
from typing import Any

from ablations.result_rows import RESULTS, append_row, held_folder, read_rows
from ablations.tables import mean_and_deviation
from config.errors import ConfigError
from config.reading import load_config
from utils.cli import gather_user_errors, path_option, run

# Networks that two CPU cores can train. The latent has seven sections of eight dimensions.
SETTINGS = [
    "data.image_size=16",
    "encoder.width=16",
    "encoder.latent_dim=56",
    "decoder.model_channels=16",
    "decoder.channel_mult=[1,2,2]",
    "decoder.attn_resolutions=[]",
    "decoder.dropout=0.0",
    "training.batch_size=128",
    "optimizer.warmup_epochs=0.5",
    "evaluation.probe.transform=clean",
]
VARIANTS = {
    "shared": [],
    "sectioned": ["decoder.modulation=sectioned"],
    "masked": ["decoder.modulation=sectioned", "training.mask.section_probability=0.1"],
}
ROWS = {"loss": "{:.4f}", "k-NN": "{:.1f}", "probe": "{:.1f}", "decoder parameters": "{:,.0f}"}
ROWS_BY_SECTION = {
    "probe of": "{:.1f}",
    "swapped": "{:.2f}",
    "coarse": "{:.2f}",
    "own": "{:.2f}",
    "without": "{:.2f}",
}

logger = logging.getLogger(__name__)


def markdown_table(rows: list[dict[str, Any]], sections: list[str]) -> str:
    """Returns the table of results: one column per variant, mean ± standard deviation over seeds."""
    found = {name: [row for row in rows if row["variant"] == name] for name in VARIANTS}
    steps = sorted({row["steps"] for row in rows})
    lines = [[f"{' or '.join(map(str, steps))} steps", *found], ["---"] * (1 + len(found))]

    def cell(values: list[float], form: str) -> str:
        same = len(set(values)) == 1  # such as the number of parameters, which does not depend on the seed
        return mean_and_deviation(values[:1] if same else values, form)

    for name, form in ROWS.items():
        lines.append([name, *(cell([row[name] for row in of], form) for of in found.values())])
    for name, form in ROWS_BY_SECTION.items():
        for i, section in enumerate(sections):
            lines.append([f"{name} {section}", *(cell([row[name][i] for row in of], form) for of in found.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=path_option, required=True, help="folder of the results and of the checkpoints needed to resume"
    )
    parser.add_argument(
        "--config", default="config/fashion_mnist.yaml", help="YAML file of the experiment; default: %(default)s"
    )
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each run; default: %(default)s")
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        choices=range(1, 100),
        metavar="N",
        help="number of seeds; the seeds are 0 to N-1; default: %(default)s",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides that apply to every run")
    args = parser.parse_intermixed_args(argv)
    path = args.out / RESULTS
    with gather_user_errors():
        runs = []
        for seed in range(args.seeds):
            common = [*SETTINGS, f"training.epochs={args.epochs}", f"seed={seed}", *args.overrides]
            runs += [(name, seed, load_config(args.config, [*common, *own])) for name, own in VARIANTS.items()]
        if runs[0][2].encoder.time_dependent:
            raise ConfigError("the sections are those of one z: set encoder.time_dependent=false")

        from ablations.section_measures import digest_of, measure_sections, sections_of
        from ablations.trial import Trial
        from benchmarks.measure import machine

        with held_folder(args.out):
            rows = {row["digest"]: row for row in read_rows(path)}
            for name, seed, config in runs:
                digest = digest_of(config)
                if digest in rows:
                    continue
                logger.info("%s, seed %d", name, seed)
                trial = Trial(config, args.out / f"{name}-{seed}.pt")
                trial.train(lambda: False)
                rows[digest] = {
                    "variant": name,
                    "seed": seed,
                    "digest": digest,
                    "steps": trial.state.step,
                    **measure_sections(trial.experiment, trial.state.ema.ema_model),
                    "seconds": trial.seconds,
                    "machine": machine(trial.experiment.device),
                    "amp": str(trial.experiment.amp_dtype),
                    "config": config.to_yaml(),
                }
                append_row(path, rows[digest])
    print(markdown_table([rows[digest_of(config)] for _, _, config in runs], list(sections_of(runs[0][2]))))
    return 0


if __name__ == "__main__":
    run(main)
