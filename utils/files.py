"""Small files that are written completely or not at all, locks, and errors of folders that cannot be written to."""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from config.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which has the same ending as `path`.

    At the end, the temporary file is flushed to the disk and then replaces `path`. After an error, it is removed.
    """
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    with open(partial, "r+b") as file:  # Windows flushes only files that are open for writing
        os.fsync(file.fileno())
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, completely or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Raises OSError if no file can be written to `path`. Its folders need not exist yet. Creates nothing."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


class FolderError(UserError):
    """A run folder that cannot be written to during the run."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns OSError inside the context into FolderError."""
    try:
        yield
    except OSError as error:
        raise FolderError(
            f"cannot write to {folder} ({error.strerror}); files saved there before are intact: "
            "fix the storage and start again"
        ) from None


class InUseError(Exception):
    """A lock that another process holds. The message names the process."""


def lock_file(path: Path) -> ExitStack:
    """Locks `path`, which is created if it is missing. Closing the returned stack, or leaving its context, unlocks it.

    The end of this process also unlocks `path`. Raises InUseError if another process holds the lock, and OSError if
    `path` cannot be written. If the storage does not support locks, logs it and continues.
    """
    open(path, "a").close()
    held, lock = ExitStack(), FileLock(path, timeout=0)
    try:
        lock.acquire()
        held.callback(lock.release)
    except Timeout:
        holder = ""
        with suppress(OSError):  # Windows lets nobody read a locked file
            holder = path.read_text(encoding="utf-8", errors="replace").strip()
        raise InUseError(holder or "another process") from None
    except (OSError, NotImplementedError) as error:
        logger.info("%s cannot be locked (%s): make sure that no second run uses its folder", path, error)
    with suppress(OSError):
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return held
