"""What the sections of a latent hold: the decoder's modulation shared, sectioned, and sectioned with sections masked.

Trains each variant for the same steps with each seed, then measures, on the EMA model:

- loss: over the test images, with nothing dropped;
- k-NN, probe: of z, by the config's protocols;
- probe of: the accuracy on one section alone, and on the whole latent likewise (not scaled to length 1);
- swapped: how much a decoded image changes when one section is another image's, as a share of the change when the whole
  latent is;
- coarse: how much of that change (its square) lies in means over squares of 4 px; 0.06 would be white noise;
- own: how many per cent of a section's variance no linear function of the other sections explains;
- without: by how many per cent the loss rises when one section is dropped. Only masked training has seen that:
  elsewhere the rise is that of an input which the decoder does not know.

A shared latent has no sections; it is cut at the same places, as a control. The same command goes on where it stopped.
Each run leaves a JSON line in `<out>/results.jsonl` and its state, so that it can be measured again without training.

  python -m benchmarks.sections --out runs/sections
"""

import argparse
import json
import logging
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import section_measures
from benchmarks.measure import machine
from benchmarks.trial import Trial
from datasets import DatasetError
from utils.cli import user_errors
from utils.config import Config, ConfigError
from utils.config_file import load_config, result_digest
from utils.files import InUseError, lock_file

# Networks for two CPU cores: seven sections of eight dimensions.
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


def measure(trial: Trial) -> dict[str, Any]:
    """Numbers under the names of ROWS, and lists of them, a section each, under those of ROWS_BY_SECTION."""
    experiment, soda = trial.experiment, trial.state.ema.module.eval()
    sections = section_measures.sections_of(trial.config)
    (knn, probe), probes = section_measures.accuracies(experiment, soda, sections)
    loss, *without = section_measures.losses(experiment, soda, sections)
    swapped, coarse = section_measures.swaps(experiment, soda, sections)
    return {
        "loss": loss,
        "k-NN": knn,
        "probe": probe,
        "decoder parameters": sum(parameter.numel() for parameter in soda.decoder.parameters()),
        "probe of": probes,
        "swapped": swapped,
        "coarse": coarse,
        "own": [100 * share for share in section_measures.own_variance(experiment, soda, sections)],
        "without": [100 * (each / loss - 1) for each in without],
    }


def digest(config: Config) -> str:
    measured_by = section_measures.SEED, section_measures.NUM_PAIRS, section_measures.NUM_SAMPLING_STEPS
    return result_digest(config, also=str(measured_by))


def table(rows: list[dict[str, Any]], sections: list[str]) -> str:
    """A column each variant: mean ± standard deviation over seeds."""
    found = {name: [row for row in rows if row["variant"] == name] for name in VARIANTS}
    steps = sorted({row["steps"] for row in rows})
    lines = [[f"{' or '.join(map(str, steps))} steps", *found], ["---"] * (1 + len(found))]

    def add(title: str, form: str, values: dict[str, list[float]]) -> None:
        spread = {name: form.format(statistics.stdev(of)) if len(set(of)) > 1 else "" for name, of in values.items()}
        cells = [f"{form.format(statistics.mean(of))} ± {spread[name]}".rstrip(" ±") for name, of in values.items()]
        lines.append([title, *cells])

    for name, form in ROWS.items():
        add(name, form, {variant: [row[name] for row in of] for variant, of in found.items()})
    for name, form in ROWS_BY_SECTION.items():
        for i, section in enumerate(sections):
            add(f"{name} {section}", form, {variant: [row[name][i] for row in of] for variant, of in found.items()})
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):  # a line that a crash cut short
            rows.append(json.loads(line))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results and of what resuming needs")
    parser.add_argument("--config", default="config/fashion_mnist.yaml")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 100), metavar="N", help="how many, from 0 on")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run's config")
    args = parser.parse_intermixed_args(argv)
    with user_errors(ConfigError, DatasetError):
        runs = []
        for seed in range(args.seeds):
            common = [*SETTINGS, f"training.epochs={args.epochs}", f"seed={seed}", *args.overrides]
            runs += [(name, seed, load_config(args.config, [*common, *more])) for name, more in VARIANTS.items()]
        args.out.mkdir(parents=True, exist_ok=True)
        try:
            lock = lock_file(args.out / ".lock")
        except InUseError as holder:
            raise ConfigError(f"{args.out} is in use by {holder}: wait for it to end, or choose another") from None
        with lock, open(args.out / "results.jsonl", "a") as results:
            rows = read_rows(args.out / "results.jsonl")
            print(file=results, flush=True)  # the last line may have been cut short
            for name, seed, config in runs:
                if any(row["digest"] == digest(config) for row in rows):
                    continue
                logger.info("%s, seed %d", name, seed)
                trial = Trial(config, args.out / f"{name}-{seed}.pt")
                trial.train(lambda: False)
                what = {"variant": name, "seed": seed, "digest": digest(config), "steps": trial.state.step}
                where = {"machine": machine(trial.experiment.device), "amp": str(trial.experiment.amp_dtype)}
                rows.append({**what, **measure(trial), "seconds": trial.seconds, **where, "config": config.to_yaml()})
                print(json.dumps(rows[-1]), file=results, flush=True)
    wanted = {digest(config) for _, _, config in runs}
    sections = list(section_measures.sections_of(runs[0][2]))
    print(table([row for row in rows if row["digest"] in wanted], sections))


if __name__ == "__main__":
    main()
