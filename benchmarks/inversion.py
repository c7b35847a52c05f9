"""Distance between test images and the decodes of their DDIM-inverted noise, by steps and by evaluations of each step.

Each image is decoded from its own z, without guidance and clipping.

  python -m benchmarks.inversion runs/digits/checkpoints/last.pt
"""

import argparse
from pathlib import Path

import torch

from benchmarks.measure import machine
from datasets.views import scale
from experiment.trained import open_trained, read_trained
from model.guidance import guided_denoiser
from utils.cli import run

BATCH = 128


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument(
        "--iterations", type=int, nargs="+", default=[1, 2, 3], help="evaluations of the network for each step"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    experiment, soda = open_trained(read_trained(None, args.checkpoint, args.overrides))
    test, views, diffusion = experiment.test, experiment.views, experiment.diffusion
    assert test is not None, "the data set has a test split"

    def decode(z: torch.Tensor, x_T: torch.Tensor, steps: int) -> torch.Tensor:
        return diffusion.ddim_sample(guided_denoiser(soda.decoder, z), x_T, steps, clip_denoised=False)

    print(machine(experiment.device))
    print("| steps | evaluations a step | worst dB | median dB | own z is nearer, % | deviation of x_T |")
    print("|---|---|---|---|---|---|")
    batches = [range(start, min(start + BATCH, len(test))) for start in range(0, len(test), BATCH)]
    for steps in args.steps:
        for iterations in args.iterations:
            decibels, nearer, codes = [], [], []
            for pixels in test.batches(batches):
                x_start = scale(pixels.to(experiment.device))
                z = soda.encoder(views.evaluation(pixels))
                x_T = diffusion.ddim_invert(guided_denoiser(soda.decoder, z), x_start, steps, iterations)
                own, other = (
                    (decode(latents, x_T, steps) - x_start).square().mean(dim=(1, 2, 3))
                    for latents in (z, z.roll(1, dims=0))
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
