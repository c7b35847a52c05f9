"""Nearest training images in the latent space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.pictures.base import PictureOfImages, number
from config.errors import ConfigError

if TYPE_CHECKING:
    from analysis.grid import Grid
    from analysis.references import Chosen
    from evaluation.codec import Codec
    from experiment.opening import Experiment


@dataclass(frozen=True, kw_only=True)
class Nearest(PictureOfImages):
    """The training images whose z is nearest to that of each image, with z scaled to length 1, as in k-NN.

    A training image is not among its own neighbours.
    """

    name = "nearest"
    meaning = "for each image, the training images whose z is nearest"

    num_neighbours: int = number(8, "number of neighbours of each image")

    def find(self, experiment: Experiment) -> Chosen:
        found, most = super().find(experiment), len(experiment.train)
        which = "all training images"
        if any(index is not None for index in found.train_indices):
            most, which = most - 1, "all other training images"
        if self.num_neighbours > most:
            raise ConfigError(f"--num_neighbours {self.num_neighbours} is too large: use at most {most} ({which})")
        return found

    def draw(self, codec: Codec, found: Chosen) -> Grid:
        import torch.nn.functional as F

        from analysis.grid import Cell, Grid, to_cells
        from analysis.references import image_name
        from evaluation.knn import nearest_neighbours

        train = codec.experiment.train
        bank, queries = F.normalize(codec.train_z), F.normalize(codec.encode(found.pixels))
        cells = []
        neighbours = nearest_neighbours(bank, queries, min(self.num_neighbours + 1, len(bank)))
        for i, (distance, indices) in enumerate(zip(*neighbours, strict=True)):
            own = found.train_indices[i]
            others = indices != (-1 if own is None else own)  # without the query itself
            distance, indices = (each[others][: self.num_neighbours] for each in (distance, indices))
            (pixels,) = train.batches([indices])
            names = [
                f"{image_name(train, 'train', j)}\n{each:.3f}"
                for j, each in zip(indices.tolist(), distance.tolist(), strict=True)
            ]
            cells.append([Cell(found.pixels[i], found.names[i]), *to_cells(pixels, names)])
        return Grid(
            title="Nearest training images in the latent space",
            explanation="The number below a neighbour is the Euclidean distance between its latent and the query's, "
            "both scaled to length 1. Neighbours are sorted by it, and k-NN uses the same distance.",
            columns=["query", *(f"{i + 1}" for i in range(self.num_neighbours))],
            rows=[],
            cells=cells,
        )
