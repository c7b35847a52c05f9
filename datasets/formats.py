"""Endings of image files that the installed Pillow decodes, and descriptions of other files."""

from collections import Counter
from contextlib import suppress
from functools import cache

from PIL import Image

# Formats that Pillow identifies and does not decode by itself: a film, a program for Ghostscript, scientific arrays
# without a range, and formats that need a handler.
NOT_DECODED = {"MPEG", "EPS", "FITS", "BUFR", "GRIB", "HDF5", "IPTC", "WMF"}

OPENED_AS_JPEG = {"MPO"}  # formats that Pillow's opener of JPEG files decodes; they have no opener of their own

# Plug-in of Pillow that decodes the files with an ending. `image_endings` registers it if it is installed.
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif"}


@cache
def image_endings() -> tuple[str, ...]:
    """Returns the endings of all files that are read as images, in lower case and sorted."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    decoded = (set(Image.OPEN) | OPENED_AS_JPEG) - NOT_DECODED
    return tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in decoded))


def describe_endings(counts: Counter[str]) -> str:
    """Returns a text such as "3 .txt, 1 .mp4" for the number of files with each ending. It is empty if there are none.

    A plug-in that would read the files is named.
    """
    others = sorted((-count, ending) for ending, count in counts.items())
    listed = [
        f"{-count} {ending or 'without an ending'}"
        + (f" (pip install {PLUGINS[ending]} to read them)" if ending in PLUGINS else "")
        for count, ending in others[:10]
    ]
    rest = -sum(count for count, _ in others[10:])
    return ", ".join(listed + ([f"{rest} with other endings"] if rest else []))
