"""Checkpoints written: whole or not at all, by a thread, with the one before kept until the new one is on the disk."""

import hashlib
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch

from utils.files import FolderError, write_text, writing_to
from utils.run_folder.checkpoint import LAST, PREVIOUS, SUMS, read_sums

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves the state of a run into `folder`, in a thread, one checkpoint at a time.

    As a context, it waits in the end until the last one is on the disk. What keeps the thread from writing is raised
    where the writer is used next, as FolderError.

    Args:
        resumed_from: the checkpoint that this run goes on from; another last.pt is damaged, and not worth keeping.
        flush_first: a file whose content is to be on the disk before a checkpoint is.
    """

    def __init__(self, folder: Path, resumed_from: Path | None, flush_first: Path) -> None:
        self._folder, self._flush_first = folder, flush_first
        self._last_is_good = resumed_from == folder / LAST
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        for partial in folder.glob("*.partial"):  # of a process that was killed
            with suppress(OSError):
                partial.unlink()

    def save(self, contents: dict[str, Any], keep_as: str | None = None) -> None:
        """Copy tensors and plain values to the host and write them there: last.pt, under `keep_as` as well."""
        self.wait()
        self._writing = self._thread.submit(self._write, to_host(contents), keep_as)

    def check(self) -> None:
        """Raise FolderError if writing has failed."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until what was saved is on the disk; raises FolderError."""
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
        with writing_to(self._folder):
            try:
                digest = _write_file(partial, contents)
                sync(self._flush_first)
                self._put_in_place(partial, digest, keep_as)
            except OSError:
                with suppress(OSError):
                    partial.unlink()  # a full disk has room again
                raise

    def _put_in_place(self, partial: Path, digest: str, keep_as: str | None) -> None:
        """Rename, so that a process killed between any two lines leaves files that are listed, and one that is whole.

        A digest is listed before its file gets its name and until after it has lost it: for a moment a name has two.
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
            _give_another_name(partial, self._folder / keep_as)  # before a run can go on from after this step
        if self._last_is_good and last.exists():
            last.replace(previous)
        partial.replace(last)
        self._last_is_good = True
        sync(self._folder)
        _write_sums(self._folder, sums | afterwards)


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write at once; `path` is at no time half a checkpoint. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    _write_file(partial, contents)
    partial.replace(path)


def to_host(value: Any) -> Any:
    """A copy in host memory of tensors in nested dicts, lists and tuples; from a GPU all at once."""
    copies = _to_host(value)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copies


def _to_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # Pinned memory is kept by torch for the next time.
        copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
        return copy.copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, dict):
        return {name: _to_host(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_host(part) for part in value)
    return value


class _HashedFile:
    """A file being written, its digest, and the error that torch.save would hide behind one of its own."""

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
        with suppress(OSError):  # of what could not be written
            self._file.close()


def _write_file(path: Path, contents: dict[str, Any]) -> str:
    """Its SHA-256; the file is on the disk. Raises OSError."""
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
    """A hard link where the storage has them, else a copy."""
    partial = other.with_name(f"{other.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        partial.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, partial)
        sync(partial)
    partial.replace(other)


def sync(path: Path) -> None:
    """Wait until a file, or what names a folder holds, is on the disk."""
    if path.exists():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_sums(folder: Path, sums: dict[str, list[str]]) -> None:
    """In the format of sha256sum, which can check it."""
    write_text(folder / SUMS, "".join(f"{digest}  {name}\n" for name in sums for digest in dict.fromkeys(sums[name])))
