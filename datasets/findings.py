"""Facts about image files that are found while they are decoded, and the errors and log lines about them."""

import logging
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from datasets.images import DatasetError
from datasets.listing import Listing

logger = logging.getLogger(__name__)

GREY_BITS = (8, 10, 12, 16)  # depths of greys that cameras and scanners store in 16 or 32 bits
LISTED = 10  # number of files that a message names

# Traits of files that hold more than the pixels that are read from them: name -> what is logged about these files.
TRAITS = {
    "frames": "have several frames or pages, of which the first is read",
    "transparent": "have transparent pixels, which show the colour data.background",
    "clipped": "are greyscale with values below 0 or above 65535, which become black or white: scale them to 16 bits",
    "dark": "are nearly black, because they use at most 12 of 16 bits per channel: scale them to 8 or 16 bits",
}

_lock = threading.Lock()  # of all findings, because a lock in each could not be sent to other processes


class ImageError(DatasetError):
    """Error about one image file that cannot be read.

    Attributes:
        reason: why it cannot be read.
        damaged: True if its content is the reason, or if it is a link to a missing file; False if the system did not
            deliver the content.
    """

    def __init__(self, path: Path, reason: str, damaged: bool) -> None:
        super().__init__(f"cannot read the image {path} ({reason})")
        self.reason, self.damaged = reason, damaged


@dataclass
class Findings:
    """Facts about image files that are found while all of them are decoded. Several threads may add to it.

    Attributes:
        unreadable: reason for each file that cannot be read.
        undelivered: names of the unreadable files that may be intact: the system did not deliver their content.
        greys: number of greyscale files with more than 8 bits per grey, by the bits that hold their largest value.
        counts: number of files with each of `TRAITS`.
    """

    unreadable: dict[str, str] = field(default_factory=dict)
    undelivered: set[str] = field(default_factory=set)
    greys: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def grey_bits(self) -> int | None:
        """The number of bits that hold all greys of more than 8 bits; None if there are no such greys."""
        return max(self.greys, default=None)

    def add_error(self, file: str, error: ImageError) -> None:
        """Adds a file that cannot be read."""
        with _lock:
            self.unreadable[file] = error.reason
            if not error.damaged:
                self.undelivered.add(file)

    def add_grey(self, lowest: int, highest: int) -> None:
        """Adds a greyscale file with more than 8 bits per grey."""
        with _lock:
            self.greys[next((bits for bits in GREY_BITS if highest < 2**bits), GREY_BITS[-1])] += 1
            self.counts["clipped"] += lowest < 0 or highest >= 2**16

    def add(self, trait: str) -> None:
        """Adds a file with one of `TRAITS`."""
        with _lock:
            self.counts[trait] += 1

    def update(self, other: "Findings") -> None:
        """Adds the findings about other files."""
        self.unreadable |= other.unreadable
        self.undelivered |= other.undelivered
        self.greys.update(other.greys)
        self.counts.update(other.counts)


class UnreadableError(DatasetError):
    """Error about image files that cannot be read. The message names the first of them.

    Attributes:
        reasons: the reason for each file.
        can_skip: True if data.unreadable=skip would leave these files out, so that the others can be used.
    """

    def __init__(self, reasons: dict[Path, str], can_skip: bool) -> None:
        listed = [f"{path} ({reason})" for path, reason in list(reasons.items())[:LISTED]]
        what = "the image" if len(reasons) == 1 else f"{len(reasons)} images:"
        super().__init__(f"cannot read {what} {', '.join(listed)}{', ...' if len(reasons) > LISTED else ''}")
        self.reasons, self.can_skip = reasons, can_skip

    def with_advice(self, folder: Path, name: str) -> DatasetError:
        """Returns this error with advice. If there are more files than it names, lists all in `folder`/`name`."""
        text = str(self)
        if len(self.reasons) > LISTED:
            folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{path}\t{reason}\n" for path, reason in self.reasons.items())
            (folder / name).write_text(lines, encoding="utf-8", errors="surrogateescape")
            text += f" (all of them: {folder / name})"
        advice = f"repair or remove {'it' if len(self.reasons) == 1 else 'them'}"
        return DatasetError(f"{text}: {advice}{', or set data.unreadable=skip' if self.can_skip else ''}")


def raise_if_unreadable(listing: Listing, findings: Findings, skip: bool) -> None:
    """Raises UnreadableError if files of the listing cannot be read.

    Args:
        skip: True: damaged files are no error, unless all files are unreadable.
    """
    unreadable, usable = findings.unreadable, len(findings.unreadable) < len(listing.files)
    if skip and usable:
        unreadable = {file: reason for file, reason in unreadable.items() if file in findings.undelivered}
    if unreadable:
        can_skip = usable and not findings.undelivered
        raise UnreadableError({listing.root / file: unreadable[file] for file in sorted(unreadable)}, can_skip)


def log_findings(where: str, count: int, findings: Findings, grey_bits: int | None) -> None:
    """Logs what the pixels do not tell: skipped files, and the range of greys with more than 8 bits.

    Args:
        where: name of the folder of the files.
        count: number of files.
        grey_bits: range that the training images gave; None: it was chosen for these files.
    """
    if findings.unreadable:
        named = ", ".join(sorted(findings.unreadable)[:LISTED]) + (", ..." if len(findings.unreadable) > LISTED else "")
        logger.info(
            "skipping %d of the %d images of %s, because they cannot be read (data.unreadable=skip): %s",
            len(findings.unreadable),
            count,
            where,
            named,
        )
    if findings.greys:
        logger.info(
            "greyscale images of %s with more than 8 bits are read as %d bits, the range of %s (images by the bits "
            "that hold their own largest value: %s)",
            where,
            grey_bits or findings.grey_bits,
            "the images that were trained on" if grey_bits else "these images",
            ", ".join(f"{bits} bits: {findings.greys[bits]}" for bits in sorted(findings.greys)),
        )
        brighter = sum(number for bits, number in findings.greys.items() if grey_bits and bits > grey_bits)
        if brighter:
            logger.warning("%d of them have greys above this range, which become white", brighter)
    for trait, meaning in TRAITS.items():
        if findings.counts[trait]:
            logger.info("%d of the %d images of %s %s", findings.counts[trait], count, where, meaning)
