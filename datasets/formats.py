"""Endings of image files that the installed Pillow decodes, and counts of other files."""

import os
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image

# Formats that Pillow identifies and does not decode by itself: a film, a program for Ghostscript, scientific arrays
# without a range, and formats that need a handler.
NOT_DECODED = {"MPEG", "EPS", "FITS", "BUFR", "GRIB", "HDF5", "IPTC", "WMF"}

# Plug-in of Pillow that decodes the files with an ending. `image_endings` registers it if it is installed.
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif"}


@cache
def image_endings() -> tuple[str, ...]:
    """Returns the endings of all files that are read as images, in lower case and sorted."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    formats = Image.registered_extensions()
    return tuple(sorted(e for e, name in formats.items() if name in Image.OPEN and name not in NOT_DECODED))


def count_others(folder: Path) -> str:
    """Returns the number of files below `folder` that are not read as images, by ending: "3 .txt, 1 .mp4".

    A plug-in that would read the files is named. Hidden files and folders are not counted. Returns an empty text if
    there are no such files.
    """
    counts: Counter[str] = Counter()
    seen = set()
    for base, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        counts.update(os.path.splitext(name)[1].lower() for name in names if not name.startswith("."))  # noqa: PTH122
    others = sorted((-count, ending) for ending, count in counts.items() if ending not in image_endings())
    listed = [
        f"{-count} {ending or 'without an ending'}"
        + (f" (pip install {PLUGINS[ending]} to read them)" if ending in PLUGINS else "")
        for count, ending in others[:10]
    ]
    rest = -sum(count for count, _ in others[10:])
    return ", ".join(listed + ([f"{rest} with other endings"] if rest else []))
