"""Image files and class folders below a folder, without hidden files and without folders of systems and of runs."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets.formats import describe_endings, image_endings
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
        self._others: dict[Path, Counter[str]] = {}  # endings of the files in each folder that are no images
        self._listed: dict[str, Path] = {}  # path by which each real folder was listed

    def images_in(self, folder: Path) -> list[str]:
        """Returns the sorted paths of all images below `folder`, relative to it.

        Raises DatasetError if a link leads to a folder that an earlier call listed under another path. Its images would
        be in two splits.
        """
        files = []
        for here, names in self._walk(folder):
            before = self._listed.setdefault(os.path.realpath(here), here)
            if before != here:
                raise DatasetError(
                    f"{before} and {here} are the same folder: remove the link, so that no image is in two splits"
                )
            inside = here.relative_to(folder)
            files += [str(inside / name) for name in names if is_image(name)]
            others = [name for name in names if not is_image(name) and not name.startswith(".")]
            self._others[here] = Counter(Path(name).suffix.lower() for name in others)
        if is_run_folder(folder):  # files of the run itself
            del self._others[folder]
        return sorted(files, key=lambda file: (compose(file), file))

    def has_images(self, folder: Path) -> bool:
        """Returns True if there are images below `folder`."""
        return any(is_image(name) for _, names in self._walk(folder) for name in names)

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

    def no_images(self, folder: Path) -> DatasetError:
        """Returns the error about a folder without images. It says what was left out."""
        if is_run_folder(folder):
            return DatasetError(
                f"{folder} is the folder of a run, whose pictures are not read: choose the folder of your images"
            )
        runs = [f"the run folder {path}" for path in sorted(self.left_out) if is_run_folder(path)]
        others = ", ".join(filter(None, [join_names(runs), self._other_files(folder)]))
        return DatasetError(
            f"no images in {folder}{f' (left out: {others})' if others else ''}: choose another folder, or add files "
            "that Pillow reads, for example .jpg, .png or .webp"
        )

    def _other_files(self, folder: Path) -> str:
        """Returns the number of files below `folder` that are not images, by ending."""
        counts = [count for here, count in self._others.items() if here.is_relative_to(folder)]
        return describe_endings(sum(counts, Counter()))

    def log_left_out(self, folder: Path) -> None:
        """Logs which files, folders and links below `folder` were not read."""
        others = self._other_files(folder)
        if others:
            logger.info("left out files of %s that are not images: %s", folder, others)
        if self.left_out:
            logger.info("left out %s, made by systems or by runs", join_names(sorted(map(str, self.left_out))))
        if self.repeated:
            logger.info(
                "not followed: %s, because these links lead to folders that are read already, or to a parent folder",
                join_names(sorted(map(str, self.repeated))),
            )

    def _walk(self, folder: Path) -> Iterator[tuple[Path, list[str]]]:
        """Yields (folder, names of its files) for `folder` and all folders below it. Each real folder is read once.

        Links to folders are followed after the other folders. An image that is reachable both ways is then listed under
        its path without links. Links to a parent of `folder` are not followed.
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
                yield here, names

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


def all_images(folder: Path) -> list[str]:
    """Returns the sorted paths of all images below `folder`, relative to it. Logs what is left out.

    Raises DatasetError if there is no such folder, or if it has no images.
    """
    if not folder.is_dir():
        raise DatasetError(f"no folder {folder}: name a folder with images")
    walker = Walker()
    files = walker.images_in(folder)
    if not files:
        raise walker.no_images(folder)
    walker.log_left_out(folder)
    return files


def is_image(name: str) -> bool:
    """Returns True if a file of this name is read as an image."""
    return name.lower().endswith(image_endings()) and not name.startswith(".")


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
