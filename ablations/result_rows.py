"""Results on disk: JSON lines that survive a crash, and the lock of a folder that only one process may use."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from config.errors import ConfigError
from utils.files import InUseError, lock_file

RESULTS = "results.jsonl"


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Creates `folder` and holds its lock inside the context. Raises ConfigError if another process holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_file(folder / ".lock")
    except InUseError as holder:
        raise ConfigError(f"{folder} is in use by {holder}: wait until it ends, or choose another --out") from None
    with lock:
        yield


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows that `append_row` wrote to a file, oldest first; an empty list if the file does not exist.

    Every row must have a "digest" of everything that its result depends on. Other lines are skipped, for example
    those that a crash has cut.
    """
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("digest"), str):
                rows.append(row)
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends `row` to the file as one JSON line. Starts a new line first if a crash has cut the last one."""
    last_byte = b"\n"
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            last_byte = file.read(1)
    line = ("" if last_byte == b"\n" else "\n") + json.dumps(row) + "\n"
    with open(path, "ab", buffering=0) as file:  # one write, so that lines of several processes do not mix
        file.write(line.encode())
