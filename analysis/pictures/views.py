"""Novel views of an object, all around it, from one or more images of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.pictures.base import Picture, number, option
from config.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from analysis.grid import Grid
    from evaluation.codec import Codec
    from evaluation.novel_views.scenes import Scenes
    from experiment.opening import Experiment
    from experiment.posed import PosedPixels


@dataclass(frozen=True)
class Turntable:
    """An object with its source images, and the poses of a turntable at the height of the first source.

    Attributes:
        sources: indices of the source images in `Scenes`.
        names: captions of the source images.
        turns: (M,) azimuths in degrees, relative to the first source, rising from 0.
        true: indices in `Scenes` of the true views at these azimuths; None: there is none.
    """

    sources: list[int]
    names: list[str]
    turns: list[float]
    true: list[int | None]


@dataclass(frozen=True, kw_only=True)
class Views(Picture[list[Turntable]]):
    """A turntable: an object from all sides, generated from one or more images of it, above the true views.

    If the data set has views all around the object at the height of the first source, the turntable has their azimuths.
    Otherwise, its azimuths are evenly spaced.
    """

    name = "views"
    meaning = "objects from all sides, generated from one or more images, above the true views; and an animated GIF"
    example = "cars3d"
    needs_cameras = True

    images: Sequence[str] | None = option(
        None,
        "source images of one object: 12 (a test image) or train:12; put key=value before this option; default: "
        "images of several test objects",
        nargs="+",
        metavar="IMAGE",
    )
    num_objects: int = number(3, "number of objects, if --images is not given")
    num_sources: int = number(1, "number of source images of each object, if --images is not given")
    num_views: int = number(12, "number of views around the object", minimum=2)

    def find(self, experiment: Experiment) -> list[Turntable]:
        from evaluation.novel_views.scenes import Scenes

        scenes = Scenes(experiment)
        if self.images is None:
            return [self._turntable(scenes, sources) for sources in self._draw_sources(scenes)]
        sources = [_index(reference, scenes) for reference in self.images]
        if len({int(scenes.objects[index]) for index in sources}) > 1:
            raise ConfigError("--images names images of different objects: name images of one object")
        if len({*sources}) < len(sources):
            raise ConfigError("--images names an image twice: name different images of one object")
        return [self._turntable(scenes, sources)]

    def _draw_sources(self, scenes: Scenes) -> list[list[int]]:
        """Returns the indices of the source images of several test objects, drawn by the run's seed.

        The first source of an object has views all around the object at its height, as many as possible.
        """
        import torch

        from experiment.posed import source_images
        from utils.randomness import generator

        config, first = scenes.experiment.config, len(scenes.train)
        images, tested = source_images(scenes.train, scenes.test, config), {*scenes.objects[first:].tolist()}
        order = torch.randperm(len(images), generator=generator(config.seed, "grid images"))
        drawn: dict[int, list[int]] = {}
        for index in (order + first * (images is scenes.test)).tolist():
            if int(scenes.objects[index]) in tested:
                drawn.setdefault(int(scenes.objects[index]), []).append(index)
        chosen = list(drawn.values())[: self.num_objects]
        fewest = min(map(len, chosen))
        if self.num_sources > fewest:
            raise ConfigError(
                f"--num_sources {self.num_sources} is too large: an object has only {fewest} images to choose from, so "
                f"use at most {fewest}"
            )
        for each in chosen:
            each.sort(key=lambda index: -len(ring) if scenes.is_ring(ring := scenes.around(index)) else 0)
        return [each[: self.num_sources] for each in chosen]

    def _turntable(self, scenes: Scenes, sources: list[int]) -> Turntable:
        around = scenes.around(sources[0])
        found = sorted(
            (turn % 360, index) for index, turn in zip(around, scenes.turns(around, sources[0]), strict=True)
        )
        names = [_name(scenes, index) for index in sources]
        if not scenes.is_ring(around):
            turns = [360 * i / self.num_views for i in range(self.num_views)]
            return Turntable(sources, names, turns, [sources[0], *[None] * (self.num_views - 1)])
        count = min(self.num_views, len(found))
        kept = [found[i * len(found) // count] for i in range(count)]
        return Turntable(sources, names, [float(turn) for turn, _ in kept], [int(index) for _, index in kept])

    def draw(self, codec: Codec, found: list[Turntable]) -> Grid:
        import torch

        from analysis.grid import Cell, Grid, to_cells, to_pixels
        from evaluation.novel_views.judging import generate_all, view_sampler
        from evaluation.novel_views.scenes import Scenes

        experiment = codec.experiment
        scenes, steps = Scenes(experiment), experiment.config.sampling.num_sampling_steps
        generate = view_sampler(experiment, codec.soda, codec.seed, steps)
        most = max(len(each.turns) for each in found)
        most_sources = max(len(each.sources) for each in found)
        cells, strips = [], []
        for table in found:
            made = generate_all(generate, posed_turntable(scenes, table), experiment)
            sources = to_cells(scenes.x_start(torch.tensor(table.sources)), table.names)
            true = [
                Cell() if index is None else to_cells(scenes.x_start(torch.tensor([index])))[0] for index in table.true
            ]
            captions = [f"{turn:.0f}°" for turn in table.turns]
            missing = [Cell()] * (most - len(table.turns))
            cells.append([*sources, *[Cell()] * (most_sources - len(sources)), *to_cells(made, captions), *missing])
            cells.append([*[Cell()] * most_sources, *true, *missing])
            strips.append((sources[0].image, to_pixels(made), [cell.image for cell in true]))
        return Grid(
            title="Novel views: an object from all sides",
            explanation="The encoder sees only the source images on the left. The upper row shows the object "
            "as generated at the stated azimuth relative to the first source, at the height of its camera. The lower "
            "row shows the true images, if the data set has them. Each view of an object starts from other noise.",
            columns=["source"] * most_sources + [""] * most,
            rows=[name for _ in found for name in ("generated", "true")],
            cells=cells,
            frames=_frames(strips),
        )


def posed_turntable(scenes: Scenes, table: Turntable) -> PosedPixels:
    """Returns the sources of a turntable once for each of its views. The target pixels are zeros."""
    import math

    import torch

    from datasets.cameras import turn
    from experiment.posed import PosedPixels

    pixels, cameras = scenes.read(torch.tensor(table.sources))  # (K, 3, P, P), (K, 3, 4)
    turns = torch.tensor(table.turns) * (math.pi / 180)
    targets = turn(cameras[:1].expand(len(turns), -1, -1), turns)
    seen = pixels[None].expand(len(turns), -1, -1, -1, -1)
    return PosedPixels(
        torch.cat([torch.zeros_like(seen[:, :1]), seen], dim=1),
        torch.cat([targets[:, None], cameras[None].expand(len(turns), -1, -1, -1)], dim=1),
    )


def _frames(strips: list[tuple[Tensor | None, Tensor, list[Tensor | None]]]) -> list[Tensor]:
    """Returns the images (3, H, W) uint8 of an animation: for each object a row of source, generated and true view."""
    import torch
    import torch.nn.functional as F

    frames = []
    for step in range(max(len(made) for _, made, _ in strips)):
        rows = []
        for source, made, true in strips:
            index = step * len(made) // max(len(each) for _, each, _ in strips)
            shown = [source, made[index], true[index]]
            blank = torch.full_like(made[0], 255)
            rows.append(torch.cat([blank if image is None else image for image in shown], dim=2))
        frame = torch.cat(rows, dim=1)
        factor = max(1, 96 // made.shape[-1])
        frames.append(F.interpolate(frame[None], scale_factor=factor, mode="nearest")[0])
    return frames


def _index(reference: str, scenes: Scenes) -> int:
    """Returns the index in `Scenes` of an image of a split. Raises ConfigError if there is none."""
    import re

    place = re.fullmatch(r"(?:(train|test):)?(\d+)", reference)
    if place is None:
        if "=" in reference:
            raise ConfigError(f"{reference} follows --images, which takes all words behind it: put it before --images")
        raise ConfigError(
            f"no image {reference}: write the number under its picture, such as 12 (a test image) or train:12"
        )
    images, first = (scenes.train, 0) if place[1] == "train" else (scenes.test, len(scenes.train))
    if int(place[2]) >= len(images):
        raise ConfigError(f"no image {reference}: its split has the images 0 to {len(images) - 1}")
    return first + int(place[2])


def _name(scenes: Scenes, index: int) -> str:
    """Returns the caption of an image: the last two parts of its path without the ending, its split and its number."""
    from pathlib import Path

    first, name = len(scenes.train), scenes.name(index)
    number = f"train:{index}" if index < first else f"test:{index - first}"
    return f"{'/'.join(Path(name).with_suffix('').parts[-2:])}\n{number}" if name else number
