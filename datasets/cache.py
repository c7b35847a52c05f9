"""Opening of a listing of image files: as stored images with a cache of their pixels, or as streamed images.

In both cases, all files are decoded once before training starts: to cache their pixels, or only to summarise them.
"""

import errno
import hashlib
import json
import logging
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datasets.decoding import DEFAULT_RULES, Rules, StreamedImages, decode_batches, num_cores
from datasets.findings import GREY_BITS, Findings, log_findings, raise_if_unreadable
from datasets.images import DatasetError, Images, StoredImages, Summary, summarize
from datasets.listing import Listing
from utils.files import replacing

logger = logging.getLogger(__name__)

CACHE_VERSION = 6  # increase it if decoding gives different pixels or if the content of the mark file changes
KEPT_S = 3600  # seconds after it was last opened for which the cache of an earlier set of files is kept
BLOCK_BYTES = 2**23  # bytes of pixels in one block while all files are decoded


@dataclass(frozen=True)
class _Index:
    """Content of the mark file."""

    summary: Summary
    findings: Findings


def open_listing(
    listing: Listing,
    image_size: int,
    cache_dir: Path,
    stream: bool,
    num_workers: int | None,
    processes: int,
    rules: Rules = DEFAULT_RULES,
    skip: bool = False,
) -> Images:
    """Opens the images of `listing`, stored or streamed.

    All files are decoded the first time, and again if any file has changed or the cache is incomplete. So unreadable
    files are found before training starts, and stored and streamed images have the same statistics and digest.

    The cache of a split has at most two files. Their names contain the fingerprint of the image files and a digest of
    the rules, so that runs with other files or rules have other caches:
    - The pixels, a memory-mapped array that the processes of one machine share. Only stored images have it. Its last
      images are unused if files are skipped.
    - The mark, a JSON file with the summary of the pixels and what was found about the image files. It is written last.

    Before files are decoded, the caches of other files are removed, except those opened within the last KEPT_S seconds,
    which may belong to other machines.

    Raises UnreadableError if images cannot be read, and DatasetError if the cache cannot be written.

    Args:
        num_workers: threads that decode; None: one per core, divided among `processes` while images are streamed.
        processes: number of processes that share this machine's cores.
        rules: without `grey_bits`, the smallest range is chosen that holds the greys of these files.
        skip: True: damaged images are left out.
    """
    name = f"{listing.cache_name}-{digest_of_folder(listing.root)}-{image_size}"
    prefix = f"{name}-v{CACHE_VERSION}-{_fingerprint(listing)}-"
    mark_file = cache_dir / f"{prefix}{_digest_of(rules)}.json"
    index = _read_mark(mark_file, listing.root)
    if index is None and rules.grey_bits:  # the files may have been decoded by this range, because it is their own
        own_file = cache_dir / f"{prefix}{_digest_of(replace(rules, grey_bits=None))}.json"
        own = _read_mark(own_file, listing.root)
        if own and own.findings.grey_bits == rules.grey_bits:
            mark_file, index = own_file, own
    pixels_file = mark_file.with_suffix(".npy")
    shape = (len(listing.files), 3, image_size, image_size)
    pixels = None if stream or index is None else _map_pixels(pixels_file, shape)
    if index is None or (pixels is None and not stream):
        workers = num_workers or num_cores()
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            if index is None:  # otherwise the mark is valid, and only the pixels are missing
                earlier = [path for path in cache_dir.glob(f"{name}[-.]*") if not path.name.startswith(prefix)]
                if earlier and not mark_file.exists():  # a damaged mark has been logged
                    logger.info(
                        "%s was cached in %s before files were added, removed or changed, on another machine, or by "
                        "another version of this program: decoding all images again",
                        *(listing.root, cache_dir),
                    )
                for path in earlier:
                    _remove_unused(path)
            with replacing(mark_file) as mark:
                if stream:
                    index = _look_through(listing, image_size, workers, None, rules, skip)
                else:
                    with replacing(pixels_file) as partial:
                        array = _allocate(partial, shape)
                        index = _look_through(listing, image_size, workers, array, rules, skip)
                        array.flush()
                mark.write_text(json.dumps(_to_json(index)), encoding="utf-8")
        except OSError as error:
            raise cannot_cache(cache_dir, error, stream) from None
        logger.info("cached %s of %s in %s", "the statistics" if stream else "the images", listing.root, cache_dir)
        pixels = None if stream else _map_pixels(pixels_file, shape)
    for used in (mark_file, pixels_file):
        with suppress(OSError):  # a cache that cannot be written to, or no pixels
            os.utime(used)
    findings = index.findings
    raise_if_unreadable(listing, findings, skip)
    log_findings(str(listing.root), len(listing.files), findings, rules.grey_bits)
    kept = [i for i, file in enumerate(listing.files) if file not in findings.unreadable]
    labels = None if listing.labels is None else [listing.labels[i] for i in kept]
    listing = replace(listing, files=[listing.files[i] for i in kept], labels=labels)
    images: Images
    if stream:
        logger.info(
            "streaming the %d images of %s: each batch is decoded shortly before its use",
            len(listing.files),
            listing.root,
        )
        chosen = replace(rules, grey_bits=rules.grey_bits or findings.grey_bits)
        threads = num_workers or max(1, num_cores() // processes)
        images = StreamedImages(listing, image_size, threads, index.summary, chosen)
    else:
        assert pixels is not None, "the cache has just been read or written"
        found = torch.from_numpy(pixels[: len(kept)])
        images = StoredImages(found, None if labels is None else torch.tensor(labels), listing.classes, index.summary)
        images.names, images.folder = listing.files, listing.root
    images.grey_bits = findings.grey_bits
    return images


def digest_of_folder(root: Path) -> str:
    """Returns a digest of a folder's path, for the names of its caches."""
    return hashlib.blake2b(os.fsencode(root.resolve()), digest_size=6).hexdigest()


def _digest_of(rules: Rules) -> str:
    return hashlib.blake2b(str(rules).encode(), digest_size=4).hexdigest()


def _remove_unused(path: Path) -> None:
    """Removes a file of a cache, if it can be removed and was not opened within the last KEPT_S seconds."""
    with suppress(OSError):
        if path.stat().st_mtime < time.time() - KEPT_S:
            path.unlink()


def cannot_cache(cache_dir: Path, error: OSError, stream: bool) -> DatasetError:
    """Returns the error for a cache folder that cannot be written to. It says what to change in the config."""
    full = error.errno == errno.ENOSPC and not stream
    advice = "set data.cache_dir to another folder" + (", or set data.stream=true to cache no pixels" if full else "")
    return DatasetError(f"cannot cache images in {cache_dir} ({error.strerror}): {advice}")


def _look_through(
    listing: Listing, image_size: int, num_workers: int, out: np.ndarray | None, rules: Rules, skip: bool
) -> _Index:
    """Decodes all files and returns their index. If `out` (N, 3, size, size) is given, the pixels are written to it.

    If the rules have no range of greys, 16 bits are assumed. If fewer bits hold all greys, the files are decoded again.
    Raises UnreadableError.
    """
    while True:
        findings = Findings()
        summary = summarize(_decode_all(listing, image_size, num_workers, out, rules, findings))
        raise_if_unreadable(listing, findings, skip)
        if rules.grey_bits or findings.grey_bits in (None, GREY_BITS[-1]):
            return _Index(summary, findings)
        rules = replace(rules, grey_bits=findings.grey_bits)
        logger.info("%s has greys of %d bits in files of 16 or 32 bits", listing.root, rules.grey_bits)


def _allocate(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Creates a file for an array and allocates its blocks on the disk. Raises OSError if there is no space."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # without this, a full disk kills the process (SIGBUS) later
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _fingerprint(listing: Listing) -> str:
    """Returns a digest of the names, sizes and times of all files. It changes if any file changes.

    The time of the last change of a file's status is included, because copying tools restore the modification time.

    A file that cannot be accessed, such as a link to a missing file, counts by its name. Decoding reports it.

    Raises DatasetError if a file is not a regular file.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in listing.files:
        try:
            status = (listing.root / file).stat()
        except OSError:
            digest.update(f"{file}\0inaccessible\n".encode(errors="surrogateescape"))
            continue
        if not stat.S_ISREG(status.st_mode):
            raise DatasetError(f"{listing.root / file} is not a regular file: remove it")
        times = f"{status.st_mtime_ns}\0{status.st_ctime_ns}"
        digest.update(f"{file}\0{status.st_size}\0{times}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _decode_all(
    listing: Listing, image_size: int, num_workers: int, out: np.ndarray | None, rules: Rules, findings: Findings
) -> Iterator[Tensor]:
    """Yields the pixels of all readable files in order, one block at a time, and shows a progress bar.

    If `out` (N, 3, size, size) is given, the pixels are also written to it, without gaps for unreadable files.
    """
    count, size = len(listing.files), max(1, BLOCK_BYTES // (3 * image_size**2))
    logger.info("decoding %d images of %s", count, listing.root)
    blocks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    written = 0
    with tqdm(total=count, desc="decoding", unit="img", leave=False, disable=None) as bar:  # None: only on a terminal
        decoded = decode_batches(listing, image_size, blocks, num_workers, rules=rules, findings=findings)
        for block, pixels in zip(blocks, decoded, strict=True):
            readable = [listing.files[index] not in findings.unreadable for index in block]
            found = pixels if all(readable) else pixels[torch.tensor(readable)]
            if out is not None:
                out[written : written + len(found)] = found.numpy()
            written += len(found)
            bar.update(len(block))
            yield found


def _to_json(index: _Index) -> dict[str, Any]:
    findings = index.findings
    return {
        "statistics": index.summary.statistics,
        "digest": index.summary.digest,
        "unreadable": findings.unreadable,
        "greys": findings.greys,
        "counts": findings.counts,
    }


def _read_mark(path: Path, root: Path) -> _Index | None:
    """Returns the index of the cache, or None if it is missing or, with a message to the log, damaged."""
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
        mean, std = (tuple(map(float, values)) for values in mark["statistics"])
        greys = Counter({int(bits): int(count) for bits, count in mark["greys"].items()})
        findings = Findings(dict(mark["unreadable"]), set(), greys, Counter(mark["counts"]))
        if len(mean) == len(std) == 3:
            return _Index(Summary((mean, std), str(mark["digest"])), findings)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    logger.info("the cache %s of %s is damaged: decoding all images again", path, root)
    return None


def _map_pixels(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Maps the cached pixels into memory; returns None if the file is missing, truncated or damaged.

    A truncated or damaged file is also logged. The mapping is copy-on-write, because torch requires writable memory.
    Nothing writes to the mapping, so all processes share its pages.
    """
    try:
        pixels = np.load(path, mmap_mode="c")
        if pixels.shape == shape and pixels.dtype == np.uint8:
            return pixels
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):
        pass
    logger.info("the cached pixels in %s are truncated or damaged: decoding all images again", path)
    return None
