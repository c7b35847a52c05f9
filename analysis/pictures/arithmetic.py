"""Sums and differences of latents of images and of means of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.pictures.base import Picture, number, option, splits
from config.errors import ConfigError

if TYPE_CHECKING:
    from analysis.grid import Grid
    from analysis.references import Chosen
    from evaluation.codec import Codec
    from experiment.opening import Experiment


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Picture["list[Chosen | int]"]):
    """z(a) - z(b) + z(c). Each term is z of one image or, if a class is named, the mean of its training latents.

    The result is decoded from random x_T, and from the x_T of c, a or b: the first of these that is an image, if any.
    """

    name = "arithmetic"
    meaning = "latent arithmetic z(a) - z(b) + z(c), for images or means of classes"

    terms: Sequence[str] | None = option(
        None,
        "a, b and c: each is class:NAME, 12 (a test image), train:12 or a file; default: the first two classes and an "
        "image of the second, or 0, 1 and 2 if the images have no labels",
        nargs=3,
        metavar=("A", "B", "C"),
    )
    num_samples: int = number(3, "number of samples from random noise", minimum=0)

    def find(self, experiment: Experiment) -> list[Chosen | int]:
        """Returns the image, or the index of the class, for each of the three terms."""
        from analysis.references import choose_images, find_class

        train, terms = experiment.train, self.terms or ["0", "1", "2"]
        if self.terms is None and train.labels is not None:
            image = int((train.labels == 1).nonzero()[0])  # a - b + c moves it to the first class
            terms = [*(f"class:{name}" for name in train.classes[:2]), f"train:{image}"]
        found: list[Chosen | int] = [
            find_class(experiment.info.classes, term.removeprefix("class:"))
            if term.startswith("class:")
            else choose_images(splits(experiment), [term], 1, experiment.config.seed, experiment.rules)
            for term in terms
        ]
        if not self.num_samples and all(isinstance(term, int) for term in found):
            raise ConfigError("--num_samples 0: means of classes have no x_T of their own, so use at least 1")
        return found

    def draw(self, codec: Codec, found: list[Chosen | int]) -> Grid:
        import torch

        from analysis.grid import Cell, Grid, to_cells

        train = codec.experiment.train
        latents, names, sources = [], [], []
        for letter, term in zip("abc", found, strict=True):
            if isinstance(term, int):
                assert train.labels is not None, "find() accepts classes only if there are labels"
                latents.append(codec.train_z[train.labels.to(codec.train_z.device) == term].mean(dim=0, keepdim=True))
                names.append(f"{letter}: mean of {train.classes[term]}")
                sources.append(Cell())
            else:
                latents.append(codec.encode(term.pixels))
                names.append(f"{letter}: {' '.join(term.names[0].split())}")
                sources.append(Cell(term.pixels[0]))
        a, b, c = latents
        z = torch.cat([a, b, c, a - b + c])
        cells, rows = [], []
        for index in (2, 0, 1):
            term = found[index]
            if not isinstance(term, int):
                x_T = codec.invert(term.pixels, latents[index])
                cells += [[*sources, Cell()], to_cells(codec.decode(z, x_T.expand(4, -1, -1, -1)))]
                rows += ["image", f"decoded from the x_T of {'abc'[index]}"]
                break
        if self.num_samples:
            row_of = [row for row in range(self.num_samples) for _ in range(4)]
            x_T = codec.noise(self.num_samples, "sample 0")[row_of]
            sampled = codec.sample(z.repeat(self.num_samples, 1), x_T, noise_of=row_of)
            cells += [to_cells(images) for images in sampled.split(4)]
            rows += [f"sampled from random x_T {i + 1}" for i in range(self.num_samples)]
        return Grid(
            title="Latent arithmetic: a - b + c",
            explanation="Each row decodes the four latents from one x_T. If this x_T comes from DDIM inversion of an "
            "image, the column of that image shows its reconstruction.",
            columns=[*names, "a - b + c"],
            rows=rows,
            cells=cells,
        )
