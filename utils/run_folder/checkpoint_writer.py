"""Writing of checkpoints in a thread. A new checkpoint replaces an older one only when it is complete on the disk."""

import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch

from utils.files import FolderError, write_text, writing_to
from utils.run_folder.checkpoint import LAST, PREVIOUS, SUMS, read_sums

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writer of a run's checkpoints into `folder`. A thread writes one checkpoint at a time.

    A context manager: on exit, it waits until the last checkpoint is on the disk. If the thread cannot write, the next
    use of the writer raises FolderError.

    Args:
        resumed_from: checkpoint that this run resumes from. If it is not last.pt, then last.pt is missing or damaged,
            and is not kept as previous.pt.
        flush_first: file that is flushed to the disk before a new checkpoint gets its name.
    """

    def __init__(self, folder: Path, resumed_from: Path | None, flush_first: Path) -> None:
        self._folder, self._flush_first = folder, flush_first
        self._last_is_good = resumed_from == folder / LAST
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        for partial in folder.glob("*.partial"):  # left by a process that was killed
            with suppress(OSError):
                partial.unlink()

    def save(self, contents: dict[str, Any], keep_as: str | None = None) -> None:
        """Copies `contents` to the host. The thread writes them to last.pt and, if given, also to `keep_as`.

        `contents` are tensors and plain values. Waits until the previous checkpoint is written. Raises FolderError if
        the previous checkpoint could not be written.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, to_host(contents), keep_as)

    def check(self) -> None:
        """Raises FolderError if the thread has failed to write."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the saved checkpoint is on the disk. Raises FolderError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()
        try:
            self.wait()
        except FolderError as failure:
            if error is None:
                raise
            logger.warning("%s", failure)

    def _write(self, contents: dict[str, Any], keep_as: str | None) -> None:
        partial = self._folder / f"{LAST}.partial"
        with writing_to(self._folder), _removed_on_failure(partial):
            digest = write_file(partial, contents)
            sync(self._flush_first)
            self._put_in_place(partial, digest, keep_as)

    def _put_in_place(self, partial: Path, digest: str, keep_as: str | None) -> None:
        """Renames the files. A process killed between any two lines leaves an intact checkpoint and a correct list.

        A digest is listed before its file gets a name, and is removed from the list after its file has lost the name.
        In between, a name has two digests.
        """
        last, previous = self._folder / LAST, self._folder / PREVIOUS
        sums = {name: digests for name, digests in read_sums(self._folder).items() if (self._folder / name).exists()}
        of_last, of_previous = sums.pop(LAST, []), sums.pop(PREVIOUS, [])
        becomes_previous = of_last if self._last_is_good else of_previous
        meanwhile = {LAST: [digest, *of_last], PREVIOUS: [*becomes_previous, *of_previous]}
        afterwards = {LAST: [digest], PREVIOUS: becomes_previous}
        if keep_as:
            meanwhile[keep_as], afterwards[keep_as] = [digest, *sums.get(keep_as, [])], [digest]
        _write_sums(self._folder, sums | meanwhile)
        if keep_as:
            # This comes first, because a run that resumes from the new last.pt does not write `keep_as` again.
            _give_another_name(partial, self._folder / keep_as)
        if self._last_is_good and last.exists():
            last.replace(previous)
        partial.replace(last)
        self._last_is_good = True
        sync(self._folder)
        _write_sums(self._folder, sums | afterwards)


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Writes a checkpoint in the calling thread. `path` is never an incomplete file. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with _removed_on_failure(partial):
        write_file(partial, contents)
        partial.replace(path)


def to_host(value: Any) -> Any:
    """Returns a copy of `value` with all tensors in nested dicts, lists and tuples in host memory.

    Starts all copies from the GPU and then synchronises with the device once.
    """
    copies = _to_host(value)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copies


def _to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # torch caches pinned memory, so later calls allocate none.
        copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
        return copy.copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, dict):
        return {name: _to_host(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_host(part) for part in value)
    return value


class _HashedFile:
    """File to write to, with its SHA-256. It keeps the OSError that torch.save replaces by a RuntimeError."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 (see close)
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.digest.update(data)
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # a failed write fails again on close
            self._file.close()


@contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    """Removes an incomplete file after an OSError, which frees its space on a full disk."""
    try:
        yield
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def write_file(path: Path, contents: dict[str, Any]) -> str:
    """Writes `contents` to the disk and returns the SHA-256 of the file. Raises OSError."""
    file = _HashedFile(path)
    try:
        torch.save(contents, cast("IO[bytes]", file))
        file.sync()
    except RuntimeError:
        if file.error is not None:
            raise file.error from None
        raise
    finally:
        file.close()
    return file.digest.hexdigest()


def _give_another_name(path: Path, other: Path) -> None:
    """Makes `other` a hard link to `path`, or a copy if the storage has no hard links."""
    partial = other.with_name(f"{other.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        partial.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, partial)
        sync(partial)
    partial.replace(other)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk. Ignores a missing path.

    Windows writes the names of a folder by itself, and flushes only files that are open for writing.
    """
    if path.exists() and not (sys.platform == "win32" and path.is_dir()):
        descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_sums(folder: Path, sums: dict[str, list[str]]) -> None:
    """Writes SHA256SUMS in the format that the command `sha256sum --check` reads."""
    write_text(folder / SUMS, "".join(f"{digest}  {name}\n" for name in sums for digest in dict.fromkeys(sums[name])))
