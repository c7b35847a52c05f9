"""Movement of z along principal components of the latents, or towards a class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.pictures.base import INVERTED, PictureOfImages, number, on_rank_0, option
from config.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from analysis.grid import Grid
    from analysis.references import Chosen
    from evaluation.codec import Codec
    from experiment.opening import Experiment


@dataclass(frozen=True, kw_only=True)
class Directions(PictureOfImages):
    """Images decoded from z moved both ways along principal components, or towards a class. x_T stays the same."""

    name = "directions"
    meaning = "images decoded while z moves along the principal components of the latents, or towards a class"

    num_images: int = number(1, "number of images, if --images is not given")
    num_steps: int = number(7, "number of images along each direction", minimum=2)
    num_components: int = number(6, "number of principal components to move along")
    class_name: str | None = option(
        None, "move towards this class instead of along principal components", flag="--class", metavar="NAME"
    )
    reach: float = option(
        3.0, "largest distance, in standard deviations of the latents; default: %(default)g", type=float
    )
    random: bool = option(False, "start from random noise instead of the image's own x_T", action="store_true")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.reach < math.inf:
            raise ConfigError(f"--reach {self.reach:g} is not valid: use a finite number above 0")

    def find(self, experiment: Experiment) -> Chosen:
        from analysis.references import find_class

        count = len(experiment.train)
        most = min(experiment.config.encoder.latent_dim, count)
        if self.num_components > most:
            raise ConfigError(
                f"--num_components {self.num_components} is too large: use at most {most}, the smaller "
                "of encoder.latent_dim and the number of training images"
            )
        chosen = super().find(experiment)
        if self.class_name is not None:
            find_class(experiment.info.classes, self.class_name)
        return chosen

    def draw(self, codec: Codec, found: Chosen) -> Grid:
        import torch

        from analysis.grid import Cell, Grid, to_cells

        names, steps = self._ways(codec)
        z = codec.encode(found.pixels)
        x_T = codec.noise(len(found), "sample 0") if self.random else codec.invert(found.pixels, z)
        decode = codec.sample if self.random else codec.decode
        amounts = torch.linspace(-self.reach, self.reach, self.num_steps).tolist()
        moved = torch.stack([z[:, None] + amount * steps for amount in amounts], dim=2)  # (N, ways, amounts, D)
        x_Ts = x_T.repeat_interleave(len(names) * len(amounts), dim=0)
        decoded = decode(moved.flatten(0, 2), x_Ts).split(len(amounts))
        cells = []
        for row, images in enumerate(decoded):
            image, way = divmod(row, len(names))
            source = Cell(found.pixels[image], found.names[image]) if way == 0 else Cell()
            cells.append([source, *to_cells(images)])
        title = "Along the principal components of the latents"
        return Grid(
            title=title if self.class_name is None else f"Towards class {self.class_name} and away from it",
            explanation="z moves along the direction of the row. The number above a column is the distance, in "
            "standard deviations of the training latents. "
            + ("x_T is random noise" if self.random else f"{INVERTED} of the image")
            + " and is the same in all columns.",
            columns=["image", *(f"{amount:+.1f}" if amount else "0" for amount in amounts)],
            rows=names * len(found),
            cells=cells,
        )

    def _ways(self, codec: Codec) -> tuple[list[str], Tensor]:
        """Returns a name and a vector for each direction: a list, and (directions, D).

        The length of a vector is the standard deviation of the latents along it.
        """
        import numpy as np
        import torch

        from analysis.latent_space import class_direction, principal_components, subset_to_fit
        from analysis.references import find_class

        train, seed = codec.experiment.train, codec.experiment.config.seed
        latents, labels = subset_to_fit(codec.train_z, train.labels, seed)
        if self.class_name is None:
            units, deviations, shares = on_rank_0(lambda: principal_components(latents, self.num_components))
            names = [f"component {i + 1}: {100 * share:.1f} % of the variance" for i, share in enumerate(shares)]
        else:
            assert labels is not None, "find() accepts classes only if there are labels"
            label = find_class(train.classes, self.class_name)
            unit, deviation = on_rank_0(lambda: class_direction(latents, labels, label))
            units, deviations, names = unit[None], np.array([deviation]), [f"towards class {self.class_name}"]
        return names, torch.tensor(units * deviations[:, None], dtype=torch.float32, device=codec.train_z.device)
