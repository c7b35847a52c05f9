"""Accuracy of DDIM inversion, for several numbers of steps and of network evaluations per step.

Each test image is inverted to noise x_T. Then x_T is decoded with the image's z, without guidance and clipping. The
printed table has these columns:

- worst dB, median dB: PSNR of the decoded image against the original at the decoder's size, over all images;
- own z is nearer: per cent of the images for which decoding with their own z is nearer to the original than decoding
  with another image's z;
- standard deviation of x_T: over all values of all x_T.

  python -m benchmarks.inversion runs/digits/checkpoints/last.pt
"""

import argparse
from pathlib import Path

import torch

from benchmarks.measure import machine
from config.errors import ConfigError
from datasets.images import DatasetError
from experiment.trained import check_no_cameras, open_trained, read_trained
from model.guidance import Condition, guided_denoiser
from utils.cli import run

BATCH = 128


def of_neighbours(z: Condition) -> Condition:
    """Returns the latents with those of each image moved to the next image."""
    return (lambda timesteps: z(timesteps).roll(1, dims=0)) if callable(z) else z.roll(1, dims=0)


@torch.no_grad()
def main() -> int:
    """Runs the benchmark and prints its results as a Markdown table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint file of train.py")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[20, 50, 100],
        help="numbers of DDIM steps to compare; default: 20 50 100",
    )
    parser.add_argument(
        "--iterations",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help="numbers of network evaluations per inversion step to compare; default: 1 2 3",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replace the value of a key of the checkpoint's config, e.g. device=cpu",
    )
    args = parser.parse_intermixed_args()
    trained = read_trained(None, args.checkpoint, args.overrides)
    check_no_cameras(trained.config, "benchmarks.inversion")
    experiment, soda = open_trained(trained)
    test, views, diffusion = experiment.test, experiment.views, experiment.diffusion
    if not 1 <= min(args.steps) <= max(args.steps) <= diffusion.num_timesteps or min(args.iterations) < 1:
        raise ConfigError(f"--steps are numbers from 1 to {diffusion.num_timesteps}, and --iterations are at least 1")
    if test is None:
        raise DatasetError(f"{experiment.config.data.root} has no test images: set data.root to images with them")

    def decode(z: Condition, x_T: torch.Tensor, steps: int) -> torch.Tensor:
        return diffusion.ddim_sample(guided_denoiser(soda.decoder, z), x_T, steps, clip_denoised=False)

    print(machine(experiment.device))
    print("| steps | evaluations per step | worst dB | median dB | own z is nearer, % | standard deviation of x_T |")
    print("|---|---|---|---|---|---|")
    batches = [range(start, min(start + BATCH, len(test))) for start in range(0, len(test), BATCH)]
    for steps in args.steps:
        for iterations in args.iterations:
            decibels, nearer, codes = [], [], []
            for pixels in test.batches(batches):
                x_start = views.x_start(pixels.to(experiment.device))
                z = soda.condition(views.evaluation(pixels)[:, None])
                x_T = diffusion.ddim_invert(guided_denoiser(soda.decoder, z), x_start, steps, iterations)
                own, other = (
                    (decode(latents, x_T, steps) - x_start).square().mean(dim=(1, 2, 3))
                    for latents in (z, of_neighbours(z))
                )
                decibels.append(10 * torch.log10(4 / own))
                nearer.append((own < other).float())
                codes.append(x_T.flatten())
            found, deviation = torch.cat(decibels), torch.cat(codes).std().item()
            share = 100 * torch.cat(nearer).mean().item()
            worst, median = found.min().item(), found.median().item()
            print(
                f"| {steps} | {iterations} | {worst:.1f} | {median:.1f} | {share:.1f} | {deviation:.2f} |", flush=True
            )
    return 0


if __name__ == "__main__":
    run(main)
