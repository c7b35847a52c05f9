"""Image files and class folders below a folder, without hidden files and without folders of systems and of runs."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from datasets.formats import count_others, image_endings
from datasets.images import DatasetError
from utils.run_folder.folder import OUTPUTS, is_run_folder
from utils.text import compose, join_names

logger = logging.getLogger(__name__)

# Folders of operating systems and storage devices, in small letters. They hold thumbnails and deleted files.
SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot"),
    *("__macosx", "network trash folder", "temporary items"),
    *("lost+found", "$recycle.bin", "recycler", "recycled", "system volume information", "found.000"),
}


class Walker:
    """Reader of folders. Its methods raise DatasetError if a folder cannot be read.

    Attributes:
        left_out: folders of systems and of runs, which were not read.
        repeated: links that were not followed, because their folders were read already or contain the folder of images.
    """

    def __init__(self) -> None:
        self.left_out: set[Path] = set()
        self.repeated: set[Path] = set()

    def images_in(self, folder: Path) -> list[str]:
        """Returns the sorted paths of all images below `folder`, relative to it."""
        return sorted(self._images(folder), key=lambda file: (compose(file), file))

    def has_images(self, folder: Path) -> bool:
        """Returns True if there are images below `folder`."""
        return any(True for _ in self._images(folder))

    def folders_in(self, folder: Path) -> list[str]:
        """Returns the sorted names of the sub-folders of `folder` that may hold images."""
        _, names, _ = next(os.walk(folder, onerror=_raise_unreadable))
        return self.input_folders(folder, names)

    def class_folders(self, folder: Path) -> dict[str, list[str]]:
        """Returns the names of the sub-folders of each class, by the name of the class.

        Names are equal if their composed forms are equal: a class may have a folder of each form.
        """
        found: dict[str, list[str]] = {}
        for name in self.folders_in(folder):
            found.setdefault(compose(name), []).append(name)
        return dict(sorted(found.items()))

    def log_left_out(self) -> None:
        """Logs the folders and the links that were not read."""
        if self.left_out:
            logger.info("left out %s, made by systems or by runs", join_names(sorted(map(str, self.left_out))))
        if self.repeated:
            logger.info(
                "not followed: %s, because these links lead to folders that are read already, or to a parent folder",
                join_names(sorted(map(str, self.repeated))),
            )

    def _images(self, folder: Path) -> Iterator[str]:
        """Yields the paths of all images below `folder`, relative to it. Each real folder is read once.

        Links to folders are followed after the other folders, so that an image in both has its path without links.
        Links to a parent of `folder` are not followed.
        """
        read = set(map(str, Path(os.path.realpath(folder)).parents))
        starts = [folder]
        for start in starts:
            for base, folders, names in os.walk(start, onerror=_raise_unreadable):  # does not follow links
                real, here = os.path.realpath(base), Path(base)
                if real in read:
                    self.repeated.add(here)
                    folders.clear()
                    continue
                read.add(real)
                folders[:] = self.input_folders(here, folders)
                starts += [here / name for name in folders if (here / name).is_symlink()]
                inside = here.relative_to(folder)
                yield from (str(inside / name) for name in names if is_image(name))

    def input_folders(self, folder: Path, names: list[str]) -> list[str]:
        """Returns the sorted `names` of sub-folders of `folder` that may hold images, and notes the others."""
        outputs = OUTPUTS if is_run_folder(folder) else ()
        kept = []
        for name in sorted(name for name in names if not name.startswith(".")):
            if name.casefold() in SYSTEM_FOLDERS or name in outputs or is_run_folder(folder / name):
                self.left_out.add(folder / name)
            else:
                kept.append(name)
        return kept


def is_image(name: str) -> bool:
    """Returns True if a file of this name is read as an image."""
    return name.lower().endswith(image_endings()) and not name.startswith(".")


def no_images(folder: Path) -> DatasetError:
    """Returns the error about a folder without images. It counts the other files by their endings."""
    others = count_others(folder)
    return DatasetError(
        f"no images in {folder}{f' (left out: {others})' if others else ''}: add files that Pillow reads, for example "
        ".jpg, .png or .webp"
    )


def _raise_unreadable(error: OSError) -> None:
    raise DatasetError(
        f"cannot read the folder {error.filename} ({error.strerror}): restore it, or make it readable"
    ) from None


def is_listed(path: Path, root: Path) -> bool:
    """Returns True if a file at `path` counts as an image of the data set in the folder `root`."""
    path, folder = path.resolve(), root.resolve()
    if not path.is_relative_to(folder) or not is_image(path.name):
        return False
    walker = Walker()
    for name in path.relative_to(folder).parts[:-1]:
        if not walker.input_folders(folder, [name]):
            return False
        folder /= name
    return True
