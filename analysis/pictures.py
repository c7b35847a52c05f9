"""The pictures that sample.py and the report draw. Each is a subclass of Picture: its options, checks and drawing.

To add a picture, write a subclass of Picture and add it to PICTURES at the end of this file. Heavy modules are imported
in the methods that use them, so that `sample.py --help` and errors in options do not wait for the import of torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from config.errors import ConfigError
from utils.distributed.collectives import broadcast_object
from utils.distributed.processes import rank

if TYPE_CHECKING:
    from torch import Tensor

    from analysis.codec import Codec
    from analysis.grid import Grid
    from analysis.references import Chosen
    from experiment.opening import Experiment
    from model.decoder import UNetDecoder

T = TypeVar("T")
Found = TypeVar("Found")

INVERTED = "x_T comes from DDIM inversion"


def _splits(experiment: Experiment) -> dict[str, Any]:
    """Returns the existing splits by name."""
    return {"train": experiment.train} | ({} if experiment.test is None else {"test": experiment.test})


def _on_rank_0(fit: Callable[[], T]) -> T:
    """Collective. Returns rank 0's result of `fit()` on all ranks: other machines might round differently."""
    return broadcast_object(fit() if rank() == 0 else None)  # type: ignore[return-value]


def option(default: Any, help: str, *, flag: str | None = None, minimum: int | None = None, **settings: Any) -> Any:
    """Returns a field of a Picture that is also a command-line option.

    Args:
        help: help text of the option.
        flag: spelling of the option; default: -- and the field's name.
        minimum: smallest value allowed.
        settings: further arguments of `ArgumentParser.add_argument`.
    """
    return field(default=default, metadata={"minimum": minimum, "flag": flag, "settings": {"help": help, **settings}})


def number(default: int, help: str, *, minimum: int = 1) -> Any:
    """Returns a field for an option that takes an integer (see `option`)."""
    return option(default, f"{help}; default: %(default)s", minimum=minimum, type=int, metavar="N")


@dataclass(frozen=True, kw_only=True)
class Picture(ABC, Generic[Found]):
    """One kind of picture. The fields are its options. The constructor raises ConfigError if a value is out of range.

    Attributes:
        name: name of the picture on the command line of sample.py.
        meaning: content of the picture in one line, for `--help`.
        example: name of a config, without folder and ending, whose model can be drawn.
        needs: packages that the picture needs in addition to requirements.txt.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    example: ClassVar[str] = "digits"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            value, minimum = getattr(self, each.name), each.metadata["minimum"]
            if minimum is not None and value < minimum:
                raise ConfigError(f"--{each.name} {value} is too small: use at least {minimum}")

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        """Adds the fields of the picture to `parser` as options."""
        for each in fields(cls):
            flag = each.metadata["flag"] or f"--{each.name}"
            parser.add_argument(flag, dest=each.name, default=each.default, **each.metadata["settings"])

    @classmethod
    def from_options(cls, args: Namespace) -> Self:
        """Returns the picture with the parsed options. Raises ConfigError if a value is out of range."""
        return cls(**{each.name: getattr(args, each.name) for each in fields(cls)})

    @abstractmethod
    def find(self, experiment: Experiment) -> Found:
        """Returns the images and classes that the options name, for `draw`.

        Checks all options against the experiment before any work starts. Raises ConfigError if an option does not fit,
        and DatasetError if an image cannot be read.
        """

    @abstractmethod
    def draw(self, codec: Codec, found: Found) -> Grid:
        """Collective. Draws the picture.

        Raises DatasetError if an image cannot be read, and OutOfMemoryError if memory runs out.
        """


@dataclass(frozen=True, kw_only=True)
class PictureOfImages(Picture["Chosen"]):
    """A picture of images that the user names. Default: test images, or training images if there is no test split."""

    images: Sequence[str] | None = option(
        None,
        "images: 12 (a test image), train:12 or a file; interpolate and mix take them in pairs (first two, next "
        "two, ...); put key=value before this option",
        nargs="+",
        metavar="IMAGE",
    )
    num_images: int = number(6, "number of images, if --images is not given")

    def find(self, experiment: Experiment) -> Chosen:
        from analysis.references import choose_images

        return choose_images(_splits(experiment), self.images, self.num_images, experiment.config.seed)


@dataclass(frozen=True, kw_only=True)
class PictureOfPairs(PictureOfImages):
    """A picture of pairs of images."""

    def find(self, experiment: Experiment) -> Chosen:
        chosen = super().find(experiment)
        if len(chosen) % 2:
            raise ConfigError(f"{len(chosen)} images do not form pairs: use an even number of images")
        return chosen


@dataclass(frozen=True, kw_only=True)
class Reconstruct(PictureOfImages):
    """For each image: samples from its z and random x_T, and its reconstruction from its z and its own x_T."""

    name = "reconstruct"
    meaning = "images, samples from their z and random noise, and reconstructions from z and x_T"
    needs = ("torchmetrics",)

    num_samples: int = number(3, "number of samples from random noise", minimum=0)

    def draw(self, codec: Codec, found: Chosen) -> Grid:
        import torch

        from analysis import quality
        from analysis.grid import Grid, rows_of, to_cells

        z = codec.encode(found.pixels)
        x_T = codec.invert(found.pixels, z)
        noises = [codec.noise(len(found), f"sample {i}") for i in range(self.num_samples)]
        sampled = codec.sample(z.repeat(len(noises), 1), torch.cat(noises)).split(len(found)) if noises else ()
        decoded = codec.decode(z, x_T)

        sources, size = codec.experiment.views.x_start(found.pixels).to(z.device), found.pixels.shape[-1]
        deviations = [f"std {value:.2f}" for value in x_T.std(dim=(1, 2, 3)).tolist()]
        columns = [to_cells(found.pixels)]
        columns += [to_cells(images, quality.captions(images, sources)) for images in sampled]
        columns += [to_cells(x_T / 3, deviations), to_cells(decoded, quality.captions(decoded, sources))]
        reduced = "" if x_T.shape[-1] == size else f", averaged down from {size} to {x_T.shape[-1]} px"
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


@dataclass(frozen=True, kw_only=True)
class Interpolate(PictureOfPairs):
    """Images decoded between the two images of each pair: z is interpolated linearly, x_T on an arc."""

    name = "interpolate"
    meaning = "interpolation from the first image of each pair to the second"

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
            units, deviations, shares = _on_rank_0(lambda: principal_components(latents, self.num_components))
            names = [f"component {i + 1}: {100 * share:.1f} % of the variance" for i, share in enumerate(shares)]
        else:
            assert labels is not None, "find() accepts classes only if there are labels"
            label = find_class(train.classes, self.class_name)
            unit, deviation = _on_rank_0(lambda: class_direction(latents, labels, label))
            units, deviations, names = unit[None], np.array([deviation]), [f"towards class {self.class_name}"]
        return names, torch.tensor(units * deviations[:, None], dtype=torch.float32, device=codec.train_z.device)


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
            else choose_images(_splits(experiment), [term], 1, experiment.config.seed)
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
            noise = codec.noise(self.num_samples, "sample 0").repeat_interleave(4, dim=0)
            cells += [to_cells(images) for images in codec.sample(z.repeat(self.num_samples, 1), noise).split(4)]
            rows += [f"sampled from random x_T {i + 1}" for i in range(self.num_samples)]
        return Grid(
            title="Latent arithmetic: a - b + c",
            explanation="Each row decodes the four latents from one x_T. If this x_T comes from DDIM inversion of an "
            "image, the column of that image shows its reconstruction.",
            columns=[*names, "a - b + c"],
            rows=rows,
            cells=cells,
        )


@dataclass(frozen=True, kw_only=True)
class Mix(PictureOfPairs):
    """For each pair: z of the first image, with sections replaced by those of the second image's z.

    By default more and more sections are replaced, from none to all. The user can name the sections instead.
    """

    name = "mix"
    meaning = "the first image of each pair, with sections of z from the second image"
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
        decode = codec.sample if self.random else codec.decode
        decoder = codec.soda.decoder
        count = len(decoder.section_dims)
        sets = [list(range(k, count)) for k in range(count, -1, -1)]
        if self.sections is not None:
            sets = [sorted({*self.sections})]
        mixed = []
        for taken in sets:
            drop_mask = torch.tensor([i in taken for i in range(count)], device=z_a.device).expand(len(z_a), -1)
            mixed.append(decoder.mask(z_a, drop_mask) + decoder.mask(z_b, ~drop_mask))
        decoded = decode(torch.cat(mixed), x_T.repeat(len(sets), 1, 1, 1)).split(len(first))
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


@dataclass(frozen=True, kw_only=True)
class Generate(Picture[None]):
    """New images: z is drawn from a Gaussian mixture fitted to the training latents, x_T is random."""

    name = "generate"
    meaning = "new images: z from a Gaussian mixture fitted to the training latents"

    num_components: int = number(10, "number of Gaussians in the mixture")
    num_samples: int = number(8, "number of samples from each Gaussian")

    def find(self, experiment: Experiment) -> None:
        from analysis.latent_space import MAX_FIT

        most = min(len(experiment.train), MAX_FIT)
        if self.num_components > most:
            raise ConfigError(
                f"--num_components {self.num_components} is too large: use at most {most} (latents in the fit)"
            )

    def draw(self, codec: Codec, found: None) -> Grid:
        import numpy as np
        import torch

        from analysis.grid import Grid, to_cells
        from analysis.latent_space import sample_mixture, subset_to_fit
        from utils.randomness import derive_seed

        train, seed = codec.experiment.train, codec.experiment.config.seed
        latents, labels = subset_to_fit(codec.train_z, train.labels, seed)

        def fit() -> tuple[np.ndarray, list[str]]:
            random_state = derive_seed(codec.seed, "mixture") % 2**32
            points, weights, component = sample_mixture(latents, self.num_components, self.num_samples, random_state)
            names = [f"component {i + 1}: {100 * weight:.0f} %" for i, weight in enumerate(weights)]
            if labels is not None:
                for i in range(len(names)):
                    counts = np.bincount(labels.numpy()[component == i], minlength=len(train.classes))
                    share = 100 * counts.max() / max(1, counts.sum())
                    names[i] += f"\n{share:.0f} % {train.classes[int(counts.argmax())]}"
            return np.concatenate(points), names

        drawn, names = _on_rank_0(fit)
        z = torch.tensor(drawn, dtype=torch.float32, device=codec.train_z.device)
        sampled = codec.sample(z, codec.noise(len(z), "generated")).split(self.num_samples)
        return Grid(
            title="New images",
            explanation=f"z is drawn from a mixture of {self.num_components} Gaussians fitted to the training latents; "
            "x_T is random noise. Each row shows one component. Its label gives the weight of the component"
            + (" and the percentage of its latents in the most frequent class." if labels is not None else "."),
            columns=[""] * self.num_samples,
            rows=names,
            cells=[to_cells(images) for images in sampled],
        )


@dataclass(frozen=True, kw_only=True)
class Nearest(PictureOfImages):
    """The training images nearest to each image in z, by cosine: the neighbours that k-NN finds on unit z."""

    name = "nearest"
    meaning = "for each image, the training images whose z is nearest"

    num_neighbours: int = number(8, "number of neighbours of each image")

    def find(self, experiment: Experiment) -> Chosen:
        count = len(experiment.train)
        if self.num_neighbours > count:
            raise ConfigError(
                f"--num_neighbours {self.num_neighbours} is too large: use at most {count} (all training images)"
            )
        return super().find(experiment)

    def draw(self, codec: Codec, found: Chosen) -> Grid:
        import torch
        import torch.nn.functional as F

        from analysis.grid import Cell, Grid, to_cells
        from analysis.references import image_name
        from evaluation.knn import nearest_neighbours

        train = codec.experiment.train
        bank, queries = F.normalize(codec.train_z), F.normalize(codec.encode(found.pixels))
        cells = []
        neighbours = nearest_neighbours(bank, queries, self.num_neighbours)
        for i, (distance, indices) in enumerate(zip(*neighbours, strict=True)):
            own = found.train_indices[i]
            if own is not None:  # the image itself comes before its copies
                indices = torch.cat([torch.tensor([own]), indices[indices != own]])[: self.num_neighbours]
                distance = (bank[indices.to(bank.device)] - bank[own]).norm(dim=1).cpu()
            (pixels,) = train.batches([indices])
            cosines = (1 - distance.square() / 2).tolist()
            names = [
                f"{image_name(train, 'train', j)}\n{cosine:.3f}"
                for j, cosine in zip(indices.tolist(), cosines, strict=True)
            ]
            cells.append([Cell(found.pixels[i], found.names[i]), *to_cells(pixels, names)])
        return Grid(
            title="Nearest training images in the latent space",
            explanation="Neighbours are sorted by the distance that k-NN uses: Euclidean, between latents scaled to "
            "length 1. The number below a neighbour is the cosine between its latent and the query's.",
            columns=["query", *(f"{i + 1}" for i in range(self.num_neighbours))],
            rows=[],
            cells=cells,
        )


PICTURES: dict[str, type[Picture[Any]]] = {
    picture.name: picture for picture in (Reconstruct, Interpolate, Directions, Arithmetic, Mix, Generate, Nearest)
}
