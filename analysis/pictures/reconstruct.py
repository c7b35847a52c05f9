"""Images beside samples from their latents and reconstructions from latent and inverted noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.pictures.base import INVERTED, PictureOfImages, number

if TYPE_CHECKING:
    from analysis.grid import Grid
    from analysis.references import Chosen
    from evaluation.codec import Codec


@dataclass(frozen=True, kw_only=True)
class Reconstruct(PictureOfImages):
    """For each image: samples from its z and random x_T, and its reconstruction from its z and its own x_T."""

    name = "reconstruct"
    meaning = "images, samples from their z and random noise, and reconstructions from z and x_T"
    needs_one_z = False
    needs = ("torchmetrics",)

    num_samples: int = number(3, "number of samples from random noise", minimum=0)

    def draw(self, codec: Codec, found: Chosen) -> Grid:
        import torch

        from analysis.grid import Grid, rows_of, to_cells
        from evaluation import quality

        z = codec.encode(found.pixels)
        x_T = codec.invert(found.pixels, z)
        noises = [codec.noise(len(found), f"sample {i}") for i in range(self.num_samples)]
        sampled = codec.sample(torch.cat([z] * len(noises)), torch.cat(noises)).split(len(found)) if noises else ()
        decoded = codec.decode(z, x_T)

        sources, size = codec.experiment.views.x_start(found.pixels).to(z.device), found.pixels.shape[-1]
        deviations = [f"std {value:.2f}" for value in x_T.std(dim=(1, 2, 3)).tolist()]
        columns = [to_cells(found.pixels)]
        columns += [to_cells(images, quality.captions(images, sources)) for images in sampled]
        columns += [to_cells(x_T / 3, deviations), to_cells(decoded, quality.captions(decoded, sources))]
        reduced = "" if x_T.shape[-1] == size else f", reduced from {size} to {x_T.shape[-1]} px"
        of_samples = (
            "All samples decode the source's z, each from new random noise: what they have in common comes from z. "
        )
        return Grid(
            title="What the latent z encodes, and what the noise x_T adds",
            explanation=(of_samples if noises else "")
            + f"The last column decodes z from the x_T beside it. This noise {INVERTED.removeprefix('x_T ')} of the "
            "source. It is shown divided by 3; std is its standard deviation. PSNR (in dB) and SSIM compare an image "
            f"with its source{reduced}.",
            columns=["source", *(f"sample {i + 1}" for i in range(len(noises))), "x_T", "decoded from z and x_T"],
            rows=found.names,
            cells=rows_of(columns),
        )
