"""A test split for labelled images that have none."""

import hashlib
import logging
from dataclasses import replace

from datasets.listing import Listing
from utils.text import compose, join_names

logger = logging.getLogger(__name__)


def hold_out(listing: Listing, fraction: float) -> tuple[Listing, Listing]:
    """Divides a listing into (training files, test files). The order of the files is kept.

    From each class, `fraction` of its files becomes the test split, at least one file and at most all but one. A file
    is drawn by a digest of its path relative to the listing's root. The division is therefore the same for all runs and
    on every machine, and a file that is added later moves few others.

    Args:
        listing: files with labels.
    """

    def rank(index: int) -> bytes:
        name = compose(listing.files[index]).encode(errors="surrogateescape")
        return hashlib.blake2b(name, digest_size=16).digest()

    labels = listing.labels
    assert labels is not None
    members: dict[int, list[int]] = {}
    for index in sorted(range(len(labels)), key=rank):
        members.setdefault(labels[index], []).append(index)
    held: set[int] = set()
    for inside in members.values():
        held.update(inside[: min(max(1, round(fraction * len(inside))), len(inside) - 1)])

    def part(indices: list[int], name: str) -> Listing:
        return replace(
            listing,
            files=[listing.files[i] for i in indices],
            labels=[labels[i] for i in indices],
            cache_name=f"{listing.cache_name}-{name}-{fraction:g}",
        )

    logger.info(
        "%d of the %d images in %s are held out as the test split (data.holdout=%g), chosen by a digest of their paths",
        len(held),
        len(labels),
        listing.root,
        fraction,
    )
    single = [listing.classes[label] for label, inside in members.items() if len(inside) == 1]
    if single:
        logger.info("classes with a single image, which is not held out: %s", join_names(sorted(single)))
    everything = range(len(labels))
    return part([i for i in everything if i not in held], "kept"), part([i for i in everything if i in held], "held")
