"""Movement of z along principal components of the latents, towards a class, or along an attribute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING

from analysis.pictures.base import INVERTED, PictureOfImages, number, option
from config.errors import ConfigError
from utils.distributed.collectives import on_rank_0

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from analysis.grid import Grid
    from analysis.references import Chosen
    from datasets.images import Images
    from evaluation.codec import Codec
    from experiment.opening import Experiment


@dataclass(frozen=True, kw_only=True)
class Directions(PictureOfImages):
    """Images decoded from z moved both ways along principal components, a class or an attribute. x_T stays the same.

    The direction of a class or an attribute is the difference of the means of the training latents with and without it.
    Along its direction, z takes positions that the training latents have. Beyond them, the decoder has seen no latents.
    """

    name = "directions"
    meaning = "images decoded while z moves along principal components of the latents, a class or an attribute"

    num_images: int = number(1, "number of images, if --images is not given")
    num_steps: int = number(7, "number of images along each direction", minimum=2)
    num_components: int = number(6, "number of principal components to move along")
    class_name: str | None = option(
        None, "move towards this class instead of along principal components", flag="--class", metavar="NAME"
    )
    column: str | None = option(
        None, "move along this 0/1 column of data.labels instead of along principal components", metavar="NAME"
    )
    reach: float = option(
        2.0,
        "distance of the first and the last position from the median of the training latents, in standard deviations "
        "of a normal distribution: 2 reaches from their 2nd to their 98th percentile; default: %(default)g",
        type=float,
    )
    random: bool = option(False, "start from random noise instead of the image's own x_T", action="store_true")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.reach < math.inf:
            raise ConfigError(f"--reach {self.reach:g} is not valid: use a finite number above 0")
        if self.class_name is not None and self.column is not None:
            raise ConfigError("--class and --column are both given: use one of them")

    def find(self, experiment: Experiment) -> Chosen:
        count = len(experiment.train)
        most = min(experiment.config.encoder.latent_dim, count)
        if self.class_name is None and self.column is None and self.num_components > most:
            raise ConfigError(
                f"--num_components {self.num_components} is too large: use at most {most}, the smaller "
                "of encoder.latent_dim and the number of training images"
            )
        found = super().find(experiment)
        self._members(experiment.train)
        return found

    def draw(self, codec: Codec, found: Chosen) -> Grid:
        import numpy as np
        import torch

        from analysis.grid import Cell, Grid, to_cells

        amounts = torch.linspace(-self.reach, self.reach, self.num_steps).tolist()
        levels = [NormalDist().cdf(amount) for amount in amounts]
        names, units, projections = self._ways(codec)
        positions = units.new_tensor(np.quantile(projections, levels, axis=1).T)  # (ways, steps)
        z = codec.encode(found.pixels)
        own = z @ units.T  # (N, ways)
        moved = z[:, None, None] + (positions - own[..., None])[..., None] * units[:, None]  # (N, ways, steps, D)
        x_T = codec.noise(len(found), "sample 0") if self.random else codec.invert(found.pixels, z)
        image_of = [image for image in range(len(found)) for _ in range(len(names) * len(levels))]
        decode = partial(codec.sample, noise_of=image_of) if self.random else codec.decode
        decoded = decode(moved.flatten(0, 2), x_T[image_of]).split(len(levels))
        shares = (projections < own.cpu().numpy()[..., None]).mean(axis=2).flatten()  # of the latents before each z
        cells = []
        for row, images in enumerate(decoded):
            image, way = divmod(row, len(names))
            source = Cell(found.pixels[image], found.names[image]) if way == 0 else Cell()
            cells.append([source, *to_cells(images)])
        title = "Along the principal components of the latents"
        if self.class_name is not None:
            title = f"Towards class {self.class_name} and away from it"
        if self.column is not None:
            title = f"From {self.column} = 0 to {self.column} = 1"
        return Grid(
            title=title,
            explanation="z moves along the direction of the row, to positions that training latents have. In column "
            f"{_percent(levels[-1])}, z is further along it than {_percent(levels[-1])} of the training latents. "
            + ("x_T is random noise" if self.random else f"{INVERTED} of the image")
            + " and is the same in all columns.",
            columns=["image", *map(_percent, levels)],
            rows=[
                f"{name}\nthe image is at {_percent(share)}"
                for name, share in zip(names * len(found), shares, strict=True)
            ],
            cells=cells,
        )

    def _members(self, train: Images) -> Tensor | None:
        """Returns True for each training image (N,) of the class or with the attribute; None: neither was given.

        Raises ConfigError if there is no such class or attribute, or if all images are members or none is.
        """
        from analysis.references import find_class, find_column

        if self.column is not None:
            column = find_column(train, self.column)
            assert train.attributes is not None, "find_column accepts columns only if there are attributes"
            return train.attributes[:, column] == 1
        if self.class_name is None:
            return None
        label = find_class(train.classes, self.class_name)
        if len(train.classes) < 2:
            raise ConfigError(f"--class {self.class_name} is the only class: leave --class out")
        assert train.labels is not None, "images with classes have labels"
        return train.labels == label

    def _ways(self, codec: Codec) -> tuple[list[str], Tensor, np.ndarray]:
        """Returns the directions: names, unit vectors (ways, D), and training latents projected on them (ways, n)."""
        import torch

        from analysis.latent_space import mean_difference, principal_components, subset_to_fit

        experiment, members = codec.experiment, self._members(codec.experiment.train)
        latents = subset_to_fit(codec.train_z, None, experiment.config.seed)[0]
        if members is not None:
            found = on_rank_0(lambda: mean_difference(codec.train_z, members))[None]
            names = [f"towards class {self.class_name}" if self.column is None else f"towards {self.column} = 1"]
        else:
            found, shares = on_rank_0(lambda: principal_components(latents, self.num_components))
            names = [f"component {i + 1}: {100 * share:.1f} % of the variance" for i, share in enumerate(shares)]
        projections = on_rank_0(lambda: found @ latents.double().numpy().T)
        return names, torch.tensor(found, dtype=torch.float32, device=codec.train_z.device), projections


def _percent(share: float) -> str:
    """Returns a share as text in per cent, with a decimal near 0 and 100."""
    return f"{100 * share:.{0 if 0.01 <= share <= 0.99 else 1}f} %"
