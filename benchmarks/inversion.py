"""How near the decode of DDIM-inverted noise comes to the image, by steps and by evaluations for each step.

Over all test images: the decode from the image's own z, without guidance and clipping.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.measure import machine
from datasets.views import scale
from training.trained import open_trained, read_trained

BATCH = 128


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 2, 3], help="evaluations for each step")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    experiment, soda = open_trained(read_trained(None, args.checkpoint, args.overrides))
    test, views, diffusion = experiment.test, experiment.views, experiment.diffusion
    assert test is not None, "the data set has a test split"

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
                x_T = diffusion.ddim_invert(soda.denoiser(z), x_start, steps, iterations)
                own, other = (
                    (diffusion.ddim_sample(soda.denoiser(latents), x_T, steps, clip_denoised=False) - x_start)
                    .square()
                    .mean(dim=(1, 2, 3))
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


if __name__ == "__main__":
    main()
