"""Small files, written whole or not at all; locks; what is said of a folder that cannot be written to."""

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
    """A temporary name to write to, with the same ending; once it is on the disk, it takes the place of `path`."""
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
    """UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Raise OSError where a file cannot be written to `path`, whose folders need not be there yet; makes nothing."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


class FolderError(UserError):
    """A run's folder cannot be written to any more."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """OSErrors inside become FolderErrors."""
    try:
        yield
    except OSError as error:
        raise FolderError(
            f"cannot write to {folder} ({error.strerror}); what was saved there before is whole: "
            "mend the storage and start again"
        ) from None


class InUseError(Exception):
    """Another process holds the lock; the message says which."""


def lock_file(path: Path) -> TextIO:
    """Hold `path`, made if need be, until what is returned is closed or this process ends, however it ends.

    Raises InUseError, and OSError where it cannot be written. Storage that knows no locks is used without.
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
        logger.info("%s cannot be locked (%s): see to it that no second run uses the folder", path, error.strerror)
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file
