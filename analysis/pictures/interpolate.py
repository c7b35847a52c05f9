"""Interpolation between two images in z and x_T."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.pictures.base import INVERTED, PictureOfPairs, number

if TYPE_CHECKING:
    from analysis.grid import Grid
    from analysis.references import Chosen
    from evaluation.codec import Codec


@dataclass(frozen=True, kw_only=True)
class Interpolate(PictureOfPairs):
    """Images decoded between the two images of each pair: z is interpolated linearly, x_T on an arc."""

    name = "interpolate"
    meaning = "interpolation from the first image of each pair to the second"
    needs_one_z = False

    num_steps: int = number(9, "number of images from one end to the other", minimum=2)

    def draw(self, codec: Codec, found: Chosen) -> Grid:
        import torch

        from analysis.grid import Grid, rows_of, to_cells
        from analysis.latent_space import slerp

        first, second = found.pairs()
        both = torch.cat([first.pixels, second.pixels])
        z = codec.encode(both)
        x_T = codec.invert(both, z)
        (z_a, z_b), (x_a, x_b) = z.chunk(2), x_T.chunk(2)
        shares = torch.linspace(0, 1, self.num_steps).tolist()
        zs = torch.cat([z_a.lerp(z_b, share) for share in shares])
        x_Ts = torch.cat([slerp(x_a, x_b, share) for share in shares])
        decoded = codec.decode(zs, x_Ts).split(len(first))
        ends = to_cells(first.pixels, first.names), to_cells(second.pixels, second.names)
        return Grid(
            title="Interpolation between two images",
            explanation=f"z is interpolated linearly, x_T spherically. {INVERTED} of the two images. The columns "
            "labelled 0 and 1 show their reconstructions.",
            columns=["image", *(f"{share:.3g}" for share in shares), "image"],
            rows=[],
            cells=rows_of([ends[0], *map(to_cells, decoded), ends[1]]),
        )
