"""Reading of checkpoints. Nothing in a file is executed, and the digest of each file is checked.

A checkpoint folder holds last.pt, previous.pt, checkpoints that are kept permanently (such as epoch_0100.pt),
and SHA256SUMS. If last.pt is damaged, an older checkpoint is used.
"""

import errno
import hashlib
import logging
import shlex
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from config.errors import UserError
from utils.device import memory_for

LAST, PREVIOUS, SUMS = "last.pt", "previous.pt", "SHA256SUMS"

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A missing or unusable checkpoint. The message says what to do."""


def image_statistics(contents: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Returns mean and standard deviation of the channels of a checkpoint's training images.

    Returns None for a checkpoint of an older version that has none.
    """
    if "statistics" not in contents:
        return None
    mean, std = contents["statistics"]
    return tuple(mean), tuple(std)


def read_sums(folder: Path) -> dict[str, list[str]]:
    """Returns the digests that SHA256SUMS lists for each file name; two digests while the file is being replaced.

    Returns an empty dict if SHA256SUMS cannot be read.
    """
    sums: dict[str, list[str]] = {}
    with suppress(OSError, UnicodeDecodeError):
        for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
            digest, _, name = line.partition("  ")
            sums.setdefault(name, []).append(digest)
    return sums


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Returns the path and the contents of last.pt, or of an older checkpoint if last.pt is damaged or missing.

    The older checkpoint is previous.pt, or else the newest intact checkpoint that is kept permanently. If it is used,
    a warning is logged. Returns None if the folder has no checkpoint. Raises CheckpointError if all checkpoints are
    damaged, and OutOfMemoryError if there is too little memory for one of them.
    """
    kept = sorted(folder.glob("epoch_*.pt"), key=lambda path: (len(path.name), path.name), reverse=True)
    failures = []
    for path in (folder / LAST, folder / PREVIOUS, *kept):
        if not path.exists():
            continue
        try:
            found = path, load_checkpoint(path)
        except CheckpointError as failure:
            failures.append(failure)
            continue
        if path.name != LAST:
            why = failures[0] if failures else f"there is no {folder / LAST}"
            logger.warning("%s. Using %s of step %d instead", why, path, found[1]["step"])
        return found
    if failures:
        raise failures[0]
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Returns the contents of a checkpoint, with all tensors on the host.

    The contents are model, EMA, optimiser, scaler, timestep sampler, tally (losses since the last report), step,
    digests of the files that the weights started from, config, and digest, mean and standard deviation of the images.
    "sha256" is added: the digest of the file itself. Raises CheckpointError if the file is missing, damaged or not a
    checkpoint of this program.
    """
    state, digest = read_tensors(path)
    if not is_checkpoint(state):
        raise CheckpointError(f"{path} is not a checkpoint of this program: use another checkpoint")
    return state | {"sha256": digest}


def is_checkpoint(state: Any) -> bool:
    """Returns True if `state` has the contents of a checkpoint of this program."""
    expected = {
        **dict.fromkeys(("model", "ema", "optimizer", "scaler", "tally"), dict),
        **{"step": int, "config": str, "data": str},
    }
    fits = isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in expected.items())
    return fits and state["step"] >= 0


def unpickle(file: IO[bytes]) -> Any:
    """Returns the tensors and plain values of an open file of `torch.save`, on the host.

    Raises OSError if the file cannot be read, and any other exception if it is damaged.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError("the file ends too early") from error  # torch looks for data before its start


def read_tensors(path: Path) -> tuple[Any, str]:
    """Returns the tensors and plain values of a file, on the host, and the file's SHA-256.

    A .safetensors file holds tensors by name. All other files are those of `torch.save`.

    If the file SHA256SUMS beside it lists the file's name, it must also list the digest, under any name, because a
    run renames its checkpoints. Raises CheckpointError if the file is missing, damaged or of another format, and
    OutOfMemoryError.
    """
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}: train first, or name a checkpoint that exists")
    if path.is_dir():
        inside = next((file for file in (path / LAST, path / "checkpoints" / LAST) if file.exists()), None)
        advice = f"use {shlex.quote(str(inside))}" if inside else "name a checkpoint file"
        raise CheckpointError(f"{path} is a folder: {advice}")
    try:
        sums = read_sums(path.parent)
        with open(path, "rb") as file:  # opened only once, because a run may replace the file
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if path.name in sums and not any(digest in digests for digests in sums.values()):
                raise CheckpointError(
                    f"{path} is damaged ({SUMS} lists another digest): move it elsewhere, or use another one"
                )
            if path.name not in sums and (path.parent / SUMS).exists():
                logger.warning("%s does not list %s: its digest is not checked", path.parent / SUMS, path.name)
            file.seek(0)
            advice = f"to read {path}, free memory, or start fewer processes on this machine"
            with memory_for(lambda: advice), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about pickle protocols do not help the user
                if path.suffix.lower() == ".safetensors":
                    from safetensors.torch import load

                    state = load(file.read())
                else:
                    state = unpickle(file)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}): make it readable, or use another checkpoint"
        ) from error
    except UserError:
        raise
    except ImportError:
        raise CheckpointError(f"{path} needs safetensors: run pip install -r requirements-extra.txt") from None
    except Exception as error:  # on arbitrary bytes, the unpickler can raise any exception
        reason = f"{type(error).__name__}: it is damaged, or holds objects other than tensors and plain values"
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({reason}): move it elsewhere, or use another one"
        ) from None
    return state, digest
