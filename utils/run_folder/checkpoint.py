"""Checkpoints read: without executing anything, their bytes checked, the one before where the last is damaged.

A folder of them holds last.pt, previous.pt, those kept for good (epoch_0100.pt), and SHA256SUMS.
"""

import hashlib
import logging
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from config.errors import UserError

LAST, PREVIOUS, SUMS = "last.pt", "previous.pt", "SHA256SUMS"

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that is missing or cannot be used; the message says what to do."""


def read_sums(folder: Path) -> dict[str, list[str]]:
    """The digests that SHA256SUMS lists for each file: two while it is being replaced."""
    sums: dict[str, list[str]] = {}
    with suppress(OSError, UnicodeDecodeError):
        for line in (folder / SUMS).read_text().splitlines():
            digest, _, name = line.partition("  ")
            sums.setdefault(name, []).append(digest)
    return sums


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """last.pt and what it holds; where it is damaged or missing, with a line, the one before, or the newest kept.

    None where there is no checkpoint at all; raises CheckpointError where there is none that is whole.
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
            logger.warning("%s; going back to %s, of step %d", why, path, found[1]["step"])
        return found
    if failures:
        raise failures[0]
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Model, EMA, optimiser, scaler, tally, step, config and digest of the images, on the host.

    "sha256" is the file's own digest. If the folder's SHA256SUMS lists the file, the digest must be one that it lists.
    Raises CheckpointError.
    """
    if not path.exists():
        raise CheckpointError(f"no checkpoint {path}: train first, or name one that exists")
    try:
        sums = read_sums(path.parent)
        with open(path, "rb") as file:  # once: a run may put another in its place meanwhile
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if path.name in sums and not any(digest in digests for digests in sums.values()):
                raise CheckpointError(f"{path} is damaged: its bytes are not those that {SUMS} lists")
            if path.name not in sums and (path.parent / SUMS).exists():
                logger.warning("%s does not list %s, whose bytes are not checked", path.parent / SUMS, path.name)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickle protocols, which tell a user nothing
                state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except CheckpointError:
        raise
    except Exception as error:  # bytes that are no checkpoint make the unpickler fail in any way at all
        reason = f"{type(error).__name__}: it is damaged, or holds more than tensors and plain values"
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason}): remove it or name another") from None
    expected = {
        **dict.fromkeys(("model", "ema", "optimizer", "scaler"), dict),
        **{"tally": dict | torch.Tensor, "step": int, "config": str, "data": str},
    }
    fits = isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in expected.items())
    if not fits or state["step"] < 0:
        raise CheckpointError(f"{path} is not a checkpoint of this program: name another")
    return state | {"sha256": digest}
