"""Latents whose sections come from two images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from analysis.pictures.base import INVERTED, PictureOfPairs, option
from config.errors import ConfigError

if TYPE_CHECKING:
    from analysis.grid import Grid
    from analysis.references import Chosen
    from evaluation.codec import Codec
    from experiment.opening import Experiment
    from model.decoder import UNetDecoder


@dataclass(frozen=True, kw_only=True)
class Mix(PictureOfPairs):
    """For each pair: z of the first image, with sections replaced by those of the second image's z.

    By default more and more sections are replaced, from none to all. The user can name the sections instead.
    """

    name = "mix"
    meaning = "the first image of each pair, with sections of z from the second image"
    needs_one_z = False
    example = "cifar10_paper"

    random: bool = option(False, "start from random noise instead of the first image's x_T", action="store_true")
    sections: Sequence[int] | None = option(
        None,
        "sections to take from the second image; default: several columns, which take no section, the last section, "
        "the last two, ..., all sections",
        type=int,
        nargs="+",
    )

    def find(self, experiment: Experiment) -> Chosen:
        count = experiment.config.decoder.num_sections
        if count == 1:
            raise ConfigError(
                "mix needs a model with decoder.modulation=sectioned: train one, e.g. with config/cifar10_paper.yaml"
            )
        if self.sections is not None and not {*self.sections} <= {*range(count)}:
            raise ConfigError(
                f"--sections {list(self.sections)} is out of range: use sections 0 to {count - 1} of this model"
            )
        return super().find(experiment)

    def draw(self, codec: Codec, found: Chosen) -> Grid:
        import torch

        from analysis.grid import Grid, rows_of, to_cells

        first, second = found.pairs()
        z_a, z_b = codec.encode(first.pixels), codec.encode(second.pixels)
        x_T = codec.noise(len(first), "sample 0") if self.random else codec.invert(first.pixels, z_a)
        decoder = codec.soda.decoder
        count = len(decoder.section_dims)
        sets = [list(range(k, count)) for k in range(count, -1, -1)]
        if self.sections is not None:
            sets = [sorted({*self.sections})]
        image_of = [*range(len(first))] * len(sets)
        decode = partial(codec.sample, noise_of=image_of) if self.random else codec.decode
        mixed = []
        for taken in sets:
            drop_mask = torch.tensor([i in taken for i in range(count)], device=z_a.device)
            mixed.append(decoder.mask(z_a, drop_mask) + decoder.mask(z_b, ~drop_mask))
        decoded = decode(torch.cat(mixed), x_T[image_of]).split(len(first))
        ends = to_cells(first.pixels, first.names), to_cells(second.pixels, second.names)
        return Grid(
            title="Mixing sections of two latents",
            explanation="Each column decodes the first image's z, with the sections named above it taken from the "
            f"second image's z. {'x_T is random noise' if self.random else INVERTED + ' of the first image'}. "
            + _section_legend(decoder),
            columns=["first", *(_section_names(taken, count) for taken in sets), "second"],
            rows=[],
            cells=rows_of([ends[0], *map(to_cells, decoded), ends[1]]),
        )


def _section_names(sections: list[int], count: int) -> str:
    if len(sections) in (0, count):
        return "all" if sections else "none"
    in_a_row = sections == list(range(sections[0], sections[-1] + 1)) and len(sections) > 2
    listed = f"{sections[0]} to {sections[-1]}" if in_a_row else " and ".join(map(str, sections))
    return f"section {listed}" if len(sections) == 1 else f"sections {listed}"


def _section_legend(decoder: UNetDecoder) -> str:
    """Returns a sentence with the sizes of the feature maps that each section modulates."""
    sizes: dict[int, set[int]] = {}
    for layer in decoder.layers():
        sizes.setdefault(layer.section, set()).add(layer.resolution)
    places = (
        f"section {section} ({', '.join(map(str, sorted(at, reverse=True)))} px)"
        for section, at in sorted(sizes.items())
    )
    return f"The sections modulate feature maps of these sizes: {', '.join(places)}."
