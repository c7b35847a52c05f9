"""Photographs of objects from known cameras: ROOT/<...>/<object>/<view>.

The folder of a file is its object, and the folder above is the object's class. If ROOT has a folder `images`, the
objects are in it, and a folder `masks` beside it may hold a mask for each image, under the same path.
"""

import logging
from collections import Counter
from pathlib import Path

import torch

from config.pose_pattern import is_transforms_file, name_pattern
from config.schema import Data
from datasets.cameras import Photograph, polar_of, sphere_camera
from datasets.formats import image_endings
from datasets.holdout import draw_held_out, part_of
from datasets.images import DatasetError, Images
from datasets.listing import Listing
from datasets.splits import open_splits
from datasets.transforms_file import list_transforms
from datasets.walking import all_images
from utils.text import join_names

IMAGES, MASKS = "images", "masks"
SIDE = 90.0  # polar angle of a camera at the height of the object
LIMITS = {"polar": (0, 180), "pitch": (-90, 90), "azimuth": (-360, 360), "yaw": (-360, 360)}  # degrees

logger = logging.getLogger(__name__)


def open_posed(data: Data, processes: int, grey_bits: int | None = None) -> tuple[Images, Images | None]:
    """Opens photographs with cameras. The test split holds other objects or other views, as `data.split` says.

    Raises DatasetError if a camera is not known, or if the objects or their views are too few.
    """
    folder = image_folder(Path(data.root))
    views = list_transforms(folder, data.pose) if is_transforms_file(data.pose) else list_names(folder, data)
    _check_views(folder, [view.of for view in views])
    number = {name: index for index, name in enumerate(sorted({view.of for view in views}))}
    heights = polar_of(torch.stack([view.camera for view in views])).rad2deg()
    logger.info(
        "%d photographs of %d objects in %s, seen from %.0f to %.0f degrees (0: from above, 90: from the side)",
        *(len(views), len(number), folder, heights.min().item(), heights.max().item()),
    )
    train, test = split_views(folder, views, data)
    opened = open_splits(train, test, data, processes, grey_bits)
    by_file = {view.file: view for view in views}
    for images in opened:
        if images is not None:
            chosen = [by_file[name] for name in images.names or []]
            images.cameras = torch.stack([view.camera for view in chosen])
            images.objects = torch.tensor([number[view.of] for view in chosen])
            if images is opened[0] or data.split == "objects":
                _check_views(folder, [view.of for view in chosen])  # again, because unreadable files may be skipped
    train_images, test_images = opened
    if data.split == "views" and test_images is not None:
        assert train_images.objects is not None and test_images.objects is not None
        names = {index: name for name, index in number.items()}
        lost = {*test_images.objects.tolist()} - {*train_images.objects.tolist()}
        if lost:
            raise DatasetError(
                f"data.unreadable=skip leaves no training views in {folder} of the objects "
                f"{join_names(sorted(names[index] for index in lost))}: restore some of them, or remove these objects"
            )
    return opened


def image_folder(root: Path, log: bool = True) -> Path:
    """Returns the folder of all objects: ROOT/images if it exists, or ROOT. Raises DatasetError if there is none."""
    if not root.is_dir():
        raise DatasetError(f"no folder {root}: set data.root to the folder of your objects")
    inside = root / IMAGES
    if not inside.is_dir():
        return root
    if log:
        logger.info("%s has a folder %s: the objects are read from it", root, IMAGES)
    return inside


def mask_of(folder: Path, file: str) -> Path | None:
    """Returns the mask of an image: masks/<...>/<view>.<any ending> beside the folder `images`; None if it is missing.

    Args:
        folder: folder of all objects, as `image_folder` returns it.
        file: path of the image below it.
    """
    if folder.name != IMAGES:
        return None
    inside = folder.parent / MASKS / file
    candidates = (inside.with_name(inside.stem + ending) for ending in (inside.suffix, *image_endings()))
    return next((path for path in candidates if path.is_file()), None)


def list_names(folder: Path, data: Data) -> list[Photograph]:
    """Lists all images below `folder`, with cameras on the unit sphere by the angles in their names.

    Raises DatasetError if a name does not fit `data.pose`, or if an angle is out of range.
    """
    files, pattern = all_images(folder), name_pattern(data.pose)
    if not pattern.groupindex.keys() & {"polar", "pitch"}:
        logger.info("data.pose=%s gives no height: all cameras are at the height of the object (polar 90)", data.pose)
    views, misfits = [], []
    for file in files:
        found = pattern.fullmatch(Path(file).stem)
        if found is None:
            misfits.append(file)
            continue
        angles = {name: float(value) for name, value in found.groupdict().items()}
        for name, angle in angles.items():
            low, high = LIMITS[name]
            if not low <= angle <= high:
                raise DatasetError(
                    f"{folder / file}: {name} {angle:g} is not between {low} and {high} degrees: rename the file, or "
                    "correct data.pose"
                )
        polar = angles.get("polar", SIDE - angles.get("pitch", 0.0))
        azimuth = angles.get("azimuth", angles.get("yaw", 0.0))
        views.append(Photograph(file, str(Path(file).parent), sphere_camera(polar, azimuth, data.focal)))
    loose = [view.file for view in views if view.of == "."]
    if loose:
        raise DatasetError(
            f"{folder / loose[0]} is not in the folder of an object: move it to {folder}/OBJECT/, with all its views"
        )
    if misfits:
        more = f" (nor do {len(misfits) - 1} others)" if len(misfits) > 1 else ""
        raise DatasetError(
            f"the name {folder / misfits[0]} does not fit data.pose={data.pose}{more}: rename or remove it, or correct "
            "data.pose"
        )
    return views


def split_views(folder: Path, views: list[Photograph], data: Data) -> tuple[Listing, Listing | None]:
    """Returns (training views, test views). There is no test split if `data.holdout` is 0.

    The classes are the folders above those of the objects. Without such folders, each object is a class if
    `data.split` is `views`. If it is `objects`, there are no labels, because no class is in both splits.

    Raises DatasetError if no object or view can be held out.
    """
    objects = sorted({view.of for view in views})
    above = {name: Path(name).parent.name for name in objects}
    without = [name for name in objects if not above[name]]
    if 0 < len(without) < len(objects):
        raise DatasetError(
            f"objects in {folder} without the folder of a class: {join_names(without)}: move them into one, as the "
            "others are"
        )
    if without:
        above = {name: name if data.split == "views" else "" for name in objects}
        logger.info(
            "%s has no folders of classes above its objects: %s",
            folder,
            "each object is a class" if data.split == "views" else "the images have no labels",
        )
    classes = sorted({*above.values()} - {""})
    class_of = {name: classes.index(above[name]) if classes else 0 for name in objects}
    labels = [class_of[view.of] for view in views] if classes else None
    listing = Listing(folder, [view.file for view in views], labels, classes, "posed")
    if not data.holdout:
        return listing, None
    if data.split == "objects":
        chosen = {objects[i] for i in draw_held_out(objects, list(class_of.values()), data.holdout)}
        held = {index for index, view in enumerate(views) if view.of in chosen}
        what = f"{len(chosen)} of the {len(objects)} objects"
    else:
        number = {name: index for index, name in enumerate(objects)}
        held = draw_held_out(listing.files, [number[view.of] for view in views], data.holdout, kept=2)
        what = f"{len(held)} of the {len(views)} views"
    if not held:
        more = (
            "each class keeps an object: add objects, or hold out views with data.split=views"
            if data.split == "objects"
            else "each object keeps two views: add views"
        )
        raise DatasetError(
            f"data.holdout={data.holdout:g} holds out no {data.split} of {folder}, because {more}, or set "
            "data.holdout=0"
        )
    logger.info("%s in %s are held out as the test split, chosen by a digest of their paths", what, folder)
    name, everything = f"{data.split}-{data.holdout:g}", range(len(views))
    kept = part_of(listing, (i for i in everything if i not in held), f"kept-{name}")
    return kept, part_of(listing, (i for i in everything if i in held), f"held-{name}")


def _check_views(folder: Path, objects: list[str]) -> None:
    """Raises DatasetError if an object has a single view, because source and target are different views.

    Args:
        objects: name of the object of each view.
    """
    single = [name for name, count in Counter(objects).items() if count == 1]
    if single:
        raise DatasetError(
            f"objects in {folder} with a single view: {join_names(sorted(single))}: add views of them, or remove them"
        )
