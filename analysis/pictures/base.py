"""Base classes of the pictures, and functions that several pictures share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from config.errors import ConfigError

if TYPE_CHECKING:
    from analysis.grid import Grid
    from analysis.references import Chosen
    from evaluation.codec import Codec
    from experiment.opening import Experiment

T = TypeVar("T")
Found = TypeVar("Found")

INVERTED = "x_T comes from DDIM inversion"


def splits(experiment: Experiment) -> dict[str, Any]:
    """Returns the existing splits by name."""
    return {"train": experiment.train} | ({} if experiment.test is None else {"test": experiment.test})


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
        needs_one_z: True if a time-dependent encoder needs a timestep for this picture; False if the picture can also
            be drawn from z at all timesteps.
        needs_cameras: True if the picture is for images with cameras (data.name=posed); False if it is for others.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    example: ClassVar[str] = "digits"
    needs: ClassVar[tuple[str, ...]] = ()
    needs_one_z: ClassVar[bool] = True
    needs_cameras: ClassVar[bool] = False

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

    @property
    def needs_prior(self) -> bool:
        """True if the picture draws z from the diffusion prior beside the checkpoint, `Codec.draw_latents`."""
        return False

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

        return choose_images(splits(experiment), self.images, self.num_images, experiment.config.seed, experiment.rules)


@dataclass(frozen=True, kw_only=True)
class PictureOfPairs(PictureOfImages):
    """A picture of pairs of images."""

    def find(self, experiment: Experiment) -> Chosen:
        chosen = super().find(experiment)
        if len(chosen) % 2:
            raise ConfigError(f"{len(chosen)} images do not form pairs: use an even number of images")
        return chosen
