"""The pictures that sample.py and the report draw. Each is a subclass of Picture: its options, checks and drawing.

To add a picture, write a module with a subclass of Picture and add the class to PICTURES. Heavy modules are imported in
the methods that use them, so that `sample.py --help` and errors in options do not wait for the import of torch.
"""

from typing import Any

from analysis.pictures.arithmetic import Arithmetic
from analysis.pictures.base import Picture
from analysis.pictures.directions import Directions
from analysis.pictures.generate import Generate
from analysis.pictures.interpolate import Interpolate
from analysis.pictures.mix import Mix
from analysis.pictures.nearest import Nearest
from analysis.pictures.reconstruct import Reconstruct
from analysis.pictures.views import Views

PICTURES: dict[str, type[Picture[Any]]] = {
    picture.name: picture
    for picture in (Reconstruct, Interpolate, Directions, Arithmetic, Mix, Generate, Nearest, Views)
}
"""Class of each picture, by its name on the command line of sample.py."""
