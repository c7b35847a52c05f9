"""Small files, written whole or not at all, and locks."""

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


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
