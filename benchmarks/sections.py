"""What the sections of a latent hold: the decoder's modulation shared, sectioned, and sectioned with sections dropped.

Trains each variant for the same steps with each seed, then measures, on the EMA model:
- loss: over the test images, with nothing dropped; knn, probe: of z;
- without: by how much the loss rises when one section is dropped;
- probe of: the accuracy on one section of z alone;
- swapped: how much a decoded image changes when one section is that of another image, everything else being equal, x_T
  included: root mean square over pixels, as a share of the change when the whole latent is the other's;
- coarse: how much of the square of that change lies in the means over squares of 4 x 4 pixels.
A shared latent has no sections; it is cut at the same places, as a control.

The same command goes on where it stopped. Results are JSON lines in `<out>/results.jsonl`.

  python -m benchmarks.sections --out runs/sections
"""

import argparse
import json
import logging
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import machine
from benchmarks.trial import Trial
from evaluation import CLEAN, Protocol
from model import SODA
from model.unet import Layer
from training.experiment import Experiment, build_on_meta
from training.judge import Encode, config_protocols, encode_with, judge
from utils.cli import user_errors
from utils.config import Config, ConfigError
from utils.config_file import load_config, result_digest
from utils.device import autocast
from utils.randomness import generator, image_noise

# Networks for two CPU cores: seven sections of eight dimensions, two at each of 16, 8 and 4 px, one in the middle.
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
    "sectioned, masked": ["decoder.modulation=sectioned", "training.mask.section_probability=0.1"],
}
NUM_PAIRS = 256
NUM_SAMPLING_STEPS = 20

logger = logging.getLogger(__name__)


def cuts(config: Config) -> list[Layer]:
    """The first layer of each section, as they are or would be where modulation is sectioned."""
    decoder = config.decoder.model_copy(update={"modulation": "sectioned"})
    layers = list(build_on_meta(config.model_copy(update={"decoder": decoder})).decoder.layers())
    return [next(layer for layer in layers if layer.section == i) for i in range(decoder.num_sections)]


def by_section(encode: Encode, sections: list[Layer]) -> Encode:
    """`encode`, with each section of z as features of its own."""

    def encode_sections(views: Tensor, indices: range) -> dict[str, Tensor]:
        features = encode(views, indices)
        return features | {f"section {layer.section}": features["z"][:, layer.dims] for layer in sections}

    return encode_sections


def batches(experiment: Experiment, indices: Tensor) -> Iterator[tuple[Tensor, range]]:
    """Views (N, 3, H, W) of the test images `indices`, and their places among them."""
    assert experiment.test is not None
    parts = indices.split(experiment.config.evaluation.batch_size)
    start = 0
    for part, pixels in zip(parts, experiment.test.batches(parts, pin_memory=False), strict=True):
        yield experiment.views.evaluation(pixels), range(start, start + len(part))
        start += len(part)


@torch.no_grad()
def losses(experiment: Experiment, soda: SODA, sections: list[Layer]) -> list[float]:
    """With nothing dropped, then without each section, last without the latent.

    Over the clean test images, source and target alike; timesteps are spread evenly over them.
    """
    assert experiment.test is not None
    device, seed = experiment.device, experiment.config.seed
    dropped = [slice(0), *(layer.dims for layer in sections), slice(None)]
    totals = [0.0] * len(dropped)
    order = torch.randperm(len(experiment.test), generator=generator(seed, "test loss"))
    for views, places in batches(experiment, order):
        timesteps = torch.tensor(places, device=device) * experiment.diffusion.num_timesteps // len(order)
        noise = image_noise(views.shape[1:], places, seed, "test loss", device=device)
        x_start = experiment.views.denormalize(views) * 2 - 1
        with autocast(device, experiment.amp_dtype):
            z = soda.encoder(views).float()
            for i, dims in enumerate(dropped):
                z_kept = z.clone()
                z_kept[:, dims] = 0
                loss = experiment.diffusion.loss(soda.denoiser(z_kept), x_start, timesteps, noise)
                totals[i] += loss.item() * len(views)
    return [total / len(order) for total in totals]


@torch.no_grad()
def swaps(experiment: Experiment, soda: SODA, sections: list[Layer]) -> dict[str, list[float]]:
    """Of each section, last of the whole latent: how an image changes with another's; the coarse share of that."""
    assert experiment.test is not None
    device, seed = experiment.device, experiment.config.seed
    chosen = torch.randperm(len(experiment.test), generator=generator(seed, "pairs"))[: 2 * NUM_PAIRS]
    squares: list[list[Tensor]] = [[] for _ in range(len(sections) + 1)]
    coarse: list[list[Tensor]] = [[] for _ in range(len(sections) + 1)]
    for views, places in batches(experiment, chosen):
        with autocast(device, experiment.amp_dtype):
            own, other = (z.float() for z in soda.encoder(views).chunk(2))
            x_T = image_noise(views.shape[1:], range(len(own)), seed, "x_T", places.start, device=device)

            def decode(z: Tensor, x_T: Tensor = x_T) -> Tensor:
                return experiment.diffusion.ddim_sample(soda.denoiser(z), x_T, NUM_SAMPLING_STEPS)

            before = decode(own)
            for i, dims in enumerate([*(layer.dims for layer in sections), slice(None)]):
                z = own.clone()
                z[:, dims] = other[:, dims]
                change = decode(z) - before
                squares[i].append(change.square().mean(dim=(1, 2, 3)))
                coarse[i].append(F.avg_pool2d(change, 4).square().mean(dim=(1, 2, 3)))
    mean_squares = [torch.cat(each).mean().item() for each in squares]
    return {
        "swapped": [(each / mean_squares[-1]) ** 0.5 for each in mean_squares],
        "coarse": [torch.cat(each).mean().item() / of for each, of in zip(coarse, mean_squares, strict=True)],
    }


def measure(trial: Trial) -> dict[str, Any]:
    experiment, soda = trial.experiment, trial.state.ema.module
    sections = cuts(trial.config)
    protocols = config_protocols(experiment)
    probe = trial.config.evaluation.probe
    protocols += [Protocol("probe", probe, CLEAN, f"section {layer.section}", True) for layer in sections]
    table = judge(experiment, {"trained": by_section(encode_with(experiment, soda), sections)}, protocols)
    top1 = [table[str(protocol)]["trained"]["top1"] for protocol in protocols]
    loss, *without = losses(experiment, soda, sections)
    return {
        "steps": trial.state.step,
        "loss": loss,
        "without": [each - loss for each in without],
        "knn": top1[0],
        "probe": top1[1],
        "probe of": top1[2:],
        **swaps(experiment, soda, sections),
        "machine": machine(experiment.device),
        "amp": str(experiment.amp_dtype),
        "config": trial.config.to_yaml(),
    }


def table(rows: list[dict[str, Any]], sections: list[Layer]) -> str:
    """Mean ± standard deviation over seeds."""

    def cell(values: list[float], form: str) -> str:
        return form.format(statistics.mean(values)) + (
            f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
        )

    found = {name: [row for row in rows if row["variant"] == name] for name in VARIANTS}
    found = {name: of for name, of in found.items() if of}
    names = list(found)
    lines = [["", *names], ["---"] * (1 + len(names))]
    places = [f"section {s.section}, {'middle' if s.name[0] == 'm' else f'{s.resolution} px'}" for s in sections]
    per_section = (("without", "{:.4f}"), ("probe of", "{:.1f}"), ("swapped", "{:.2f}"), ("coarse", "{:.2f}"))
    for name, form in (("loss", "{:.4f}"), ("knn", "{:.1f}"), ("probe", "{:.1f}")):
        lines.append([name, *(cell([row[name] for row in found[v]], form) for v in names)])
    for name, form in per_section:
        for i, place in enumerate(places if name == "probe of" else [*places, "whole latent"]):
            lines.append([f"{name} {place}", *(cell([row[name][i] for row in found[v]], form) for v in names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results and of what resuming needs")
    parser.add_argument("--config", default="config/fashion_mnist.yaml")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of every run's config")
    args = parser.parse_intermixed_args()
    with user_errors(ConfigError):
        runs = [
            (name, seed, load_config(args.config, [*SETTINGS, *args.overrides, *overrides, *budget]))
            for seed in range(args.seeds)
            for budget in [[f"seed={seed}", f"training.epochs={args.epochs}"]]
            for name, overrides in VARIANTS.items()
        ]
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for name, seed, config in runs:
        digest = result_digest(config, without=("data.root",))
        if any(row["digest"] == digest for row in rows):
            continue
        logger.info("%s, seed %d", name, seed)
        trial = Trial(config, args.out / f"{digest}.pt")
        trial.train(lambda: False)
        rows.append({"variant": name, "seed": seed, "digest": digest, **measure(trial), "seconds": trial.seconds})
        with open(results, "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    wanted = {result_digest(config, without=("data.root",)) for _, _, config in runs}
    print(table([row for row in rows if row["digest"] in wanted], cuts(runs[0][2])))


if __name__ == "__main__":
    main()
