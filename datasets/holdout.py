"""A test split for labelled images that have none."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from datasets.images import DatasetError
from datasets.listing import Listing
from utils.text import compose, join_names

logger = logging.getLogger(__name__)


def draw_held_out(names: Sequence[str], groups: Sequence[int], fraction: float, kept: int = 1) -> set[int]:
    """Returns the indices of the `names` that are held out for the test split.

    From each group of N names, round(`fraction` * N) are held out, but at least one, and at most N - `kept`. A name is
    drawn by its digest. The draw is therefore the same for all runs and on every machine, and a name that is added
    later changes the split of few others.

    Args:
        groups: number of the group of each name.
    """

    def rank(index: int) -> bytes:
        name = compose(names[index]).encode(errors="surrogateescape")
        return hashlib.blake2b(name, digest_size=16).digest()

    members: dict[int, list[int]] = {}
    for index in sorted(range(len(names)), key=rank):
        members.setdefault(groups[index], []).append(index)
    held: set[int] = set()
    for inside in members.values():
        held.update(inside[: max(0, min(max(1, round(fraction * len(inside))), len(inside) - kept))])
    return held


def part_of(listing: Listing, indices: Iterable[int], name: str) -> Listing:
    """Returns the files of a listing at `indices`, with a cache of their own whose name ends with `name`."""
    chosen = list(indices)
    return replace(
        listing,
        files=[listing.files[i] for i in chosen],
        labels=None if listing.labels is None else [listing.labels[i] for i in chosen],
        cache_name=f"{listing.cache_name}-{name}",
    )


def hold_out(listing: Listing, fraction: float) -> tuple[Listing, Listing]:
    """Divides a listing into (training files, test files). The order of the files is kept.

    From each class, `fraction` of its files becomes the test split, at least one file and at most all but one. They are
    drawn by their paths relative to the listing's root (see `draw_held_out`).

    Raises DatasetError if no class has two files.

    Args:
        listing: files with labels.
    """
    labels = listing.labels
    assert labels is not None
    held = draw_held_out(listing.files, labels, fraction)
    if not held:
        raise DatasetError(
            f"data.holdout={fraction:g} holds out no image of {listing.root}, because each class has a single image, "
            "which is trained on: add images"
        )
    logger.info(
        "%d of the %d images in %s are held out as the test split (data.holdout=%g), chosen by a digest of their paths",
        len(held),
        len(labels),
        listing.root,
        fraction,
    )
    single = [listing.classes[label] for label, count in Counter(labels).items() if count == 1]
    if single:
        logger.info("classes with a single image, which is not held out: %s", join_names(sorted(single)))
    everything = range(len(labels))
    kept = part_of(listing, (i for i in everything if i not in held), f"kept-{fraction:g}")
    return kept, part_of(listing, (i for i in everything if i in held), f"held-{fraction:g}")
