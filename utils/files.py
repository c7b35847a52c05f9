"""Small files that are written completely or not at all, locks, and errors of folders that cannot be written to."""

import codecs
import errno
import glob
import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from config.errors import UserError

logger = logging.getLogger(__name__)

# On Windows, nobody can write to a locked file under another handle, so temporary files are not locked there.
LOCKS_PARTIALS = sys.platform != "win32"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file to write to, which has the same ending as `path`. Several processes may do so.

    At the end, the temporary file is flushed to the disk and then replaces `path`. After an error, it is removed. While
    a process writes, it locks its temporary file. Files without a lock were left by killed processes and are removed,
    except on Windows, where files are not locked.

    Raises OSError immediately if the disk is full or read-only.
    """
    _remove_leftovers(path)
    partial = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        with ExitStack() as held:
            if LOCKS_PARTIALS:
                with suppress(OSError, NotImplementedError):  # some storage has no locks; leftovers stay there
                    held.enter_context(native_lock(partial))
            partial.write_bytes(bytes(4096))  # a full or read-only disk fails here, not after the work
            mode = partial.stat().st_mode
            yield partial
            if partial.stat().st_mode != mode:  # some libraries replace the file by one that only its owner may read
                partial.chmod(mode)
            with open(partial, "r+b") as file:  # Windows flushes only files that are open for writing
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary files of `replacing` for `path` that no process has locked."""
    pattern = f"{glob.escape(path.stem)}.*.partial{glob.escape(path.suffix)}"
    for left in path.parent.glob(pattern) if LOCKS_PARTIALS else ():
        with suppress(OSError, NotImplementedError), native_lock(left):
            left.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, completely or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def marked_encoding(content: bytes) -> str | None:
    """Returns the encoding of a text that begins with a byte-order mark, of UTF-8 or UTF-16; None without a mark."""
    marks = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    return next((name for mark, name in marks.items() if content.startswith(mark)), None)


def read_names(path: Path) -> list[str]:
    """Returns the file names in a text file with one name per line.

    Blanks around a name are removed, unless there is a file with these blanks in its name. The file may begin with a
    byte-order mark, of UTF-8 or UTF-16. Raises OSError, or UserError if the file has no names or cannot be decoded.
    """
    content = path.read_bytes()
    encoding = marked_encoding(content)
    try:
        text = content.decode(encoding, "surrogateescape") if encoding else os.fsdecode(content)
    except UnicodeError as error:
        raise UserError(f"cannot read the list {path} ({error}): save it as UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    names = [line if line.strip() and Path(line).exists() else line.strip() for line in lines]
    if not any(names):
        raise UserError(f"the list {path} is empty: write a file name into each line")
    return [name for name in names if name]


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


def native_lock(path: Path) -> BaseFileLock:
    """Returns the operating system's lock of a file. To hold it, enter it as a context.

    Entering raises filelock.Timeout, an OSError, if another process holds the lock. It raises another OSError or
    NotImplementedError if the storage does not support locks.
    """
    # Newer versions of filelock can imitate locks. An imitated lock of a file with other contents looks held.
    options: dict[str, Any] = {"fallback_to_soft": False} if hasattr(FileLock, "fallback_to_soft") else {}
    return FileLock(path, timeout=0, **options)


@contextmanager
def waiting_lock(path: Path, doing: str) -> Iterator[None]:
    """Context that holds the lock of `path`, which is created if it is missing. Waits for other processes that hold it.

    Raises OSError if `path` cannot be written. If the storage does not support locks, continues without one.

    Args:
        doing: what the holder of the lock does, for the log, such as "downloads images".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    open(path, "a", encoding="utf-8").close()
    held = ExitStack()
    with suppress(OSError, NotImplementedError):
        try:
            held.enter_context(native_lock(path))
        except Timeout:
            logger.info("waiting for another process that %s", doing)
            held.enter_context(native_lock(path).acquire(timeout=-1))
    with held:
        yield


def lock_file(path: Path) -> ExitStack:
    """Locks `path`, which is created if it is missing. Closing the returned stack, or leaving its context, unlocks it.

    The end of this process also unlocks `path`. Raises InUseError if another process holds the lock, and OSError if
    `path` cannot be written. If the storage does not support locks, logs it and continues.
    """
    open(path, "a", encoding="utf-8").close()
    held = ExitStack()
    try:
        held.enter_context(native_lock(path))
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
