"""Cameras of photographs in the format of NeRF-synthetic: a transforms.json in the folder of each object."""

import json
import logging
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from datasets.cameras import Photograph, opengl_camera
from datasets.decoding import orientation_of
from datasets.formats import image_endings
from datasets.images import DatasetError
from datasets.walking import all_images
from utils.text import join_names

logger = logging.getLogger(__name__)


def list_transforms(folder: Path, name: str) -> list[Photograph]:
    """Lists the frames of every file `name` below `folder`, which has the format of NeRF-synthetic's transforms.json.

    All positions are divided by the largest distance of a camera from the origin, so that they are as large as those on
    the unit sphere. Raises DatasetError if a file cannot be used.
    """
    files = all_images(folder)
    folders = sorted({folder / parent for file in files for parent in Path(file).parents})
    lists = [path / name for path in folders if (path / name).is_file()]
    if not lists:
        raise DatasetError(f"no file {name} in {folder}: put one into the folder of each object, or correct data.pose")
    views = [view for path in lists for view in _frames(folder, path)]
    repeated = [file for file, count in Counter(view.file for view in views).items() if count > 1]
    if repeated:
        raise DatasetError(f"{folder / repeated[0]} has more than one camera in the files {name}: remove one of them")
    unlisted = sorted({*files} - {view.file for view in views})
    if unlisted:
        logger.info(
            "left out %d images in %s that no file %s names, such as %s", len(unlisted), folder, name, unlisted[0]
        )
    farthest = max(view.camera[:, 3].norm().item() for view in views)
    if farthest == 0:
        raise DatasetError(f"all cameras of {name} in {folder} are at the origin: correct these files")
    logger.info("positions of cameras are divided by %g, the largest distance from the origin", farthest)
    for view in views:
        view.camera[:, 3] /= farthest
    return views


def _frames(folder: Path, path: Path) -> list[Photograph]:
    """Returns the frames of one file of cameras. Raises DatasetError if it cannot be used."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        angle = float(contents["camera_angle_x"])
        focal = 0.5 / math.tan(angle / 2)  # in widths of the whole image
        frames = [(str(frame["file_path"]), _matrix(frame["transform_matrix"])) for frame in contents["frames"]]
        if not frames or not 0 < angle < math.pi:
            raise ValueError("no frames, or camera_angle_x is not between 0 and pi, in radians")
    except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__} {error}"
        raise DatasetError(f"{path} is not in the format of NeRF-synthetic ({reason}): correct it") from None
    files = [_image_of(file, path) for file, _ in frames]
    shapes = {file: _shape(file) for file in files}
    known = {round(shape, 2): file for file, shape in reversed(shapes.items()) if shape}  # {shape: its first file}
    if not known:
        raise DatasetError(f"cannot read {files[0]}, nor any other image of {path}: restore the files")
    if len(known) > 1:
        raise DatasetError(
            f"{path} has one camera_angle_x, but images of different shapes, such as "
            f"{join_names([file.name for file in known.values()])}: write a file for each shape"
        )
    (first,) = known.values()
    focal *= max(1.0, shapes[first] or 1.0)  # images are cropped to their central square
    of = str(path.parent.relative_to(folder))
    return [
        Photograph(str(file.relative_to(folder)), of, opengl_camera(matrix, focal))
        for file, (_, matrix) in zip(files, frames, strict=True)
    ]


def _shape(file: Path) -> float | None:
    """Returns width / height of an image; None if the file cannot be read. Raises DatasetError if it is not upright."""
    try:
        with Image.open(file) as image:  # reads only the size and the orientation
            shape, orientation = image.width / image.height, orientation_of(image)
    except Exception:  # PIL raises many types for damaged files
        return None
    if orientation != 1:
        raise DatasetError(
            f"{file} is not stored upright (its orientation tag is {orientation}): save it upright, because its camera "
            "belongs to the stored pixels"
        )
    return shape


def _matrix(rows: Any) -> Tensor:
    try:
        matrix = torch.tensor(rows, dtype=torch.float64)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    if matrix.shape not in ((3, 4), (4, 4)) or not matrix.isfinite().all():
        raise ValueError("a transform_matrix is not 4 x 4 finite numbers")
    products = matrix[:3, :3].T @ matrix[:3, :3]
    scale = products.diagonal().mean()
    if scale == 0 or not torch.allclose(products / scale, torch.eye(3, dtype=torch.float64), atol=1e-2):
        raise ValueError("a transform_matrix has columns that are not orthogonal, or not of one length")
    return matrix


def _image_of(file: str, path: Path) -> Path:
    """Returns the image that the file of cameras at `path` names `file`, maybe without its ending.

    Raises DatasetError if the image is missing, or not below the folder of `path`.
    """
    image = path.parent / os.path.normpath(file)
    candidates = [image, *(image.with_name(image.name + ending) for ending in (".png", *image_endings()))]
    found = next((each for each in candidates if each.is_file()), None)
    inside = image.is_relative_to(path.parent) and ".." not in image.parts[len(path.parent.parts) :]
    if found is None or not inside:
        raise DatasetError(
            f"{path} names {file}, but there is no such image beside it: restore the image, or correct the file"
        )
    return found
