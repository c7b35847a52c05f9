"""Small files that are written completely or not at all, locks, and errors of folders that cannot be written to."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

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
    with open(partial, "rb") as file:
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


def lock_file(path: Path) -> TextIO:
    """Locks `path`, which is created if it is missing, and returns the open file.

    The lock is held until the file is closed or this process ends in any way. Raises InUseError if another process
    holds the lock, and OSError if `path` cannot be written. If the storage does not support locks, logs it and
    continues.
    """
    file = open(path, "a+")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise InUseError(holder or "another process") from None
        logger.info("%s cannot be locked (%s): make sure that no second run uses its folder", path, error.strerror)
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file
