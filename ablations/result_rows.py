"""Results on the disk: JSON lines that survive a crash, in a folder that one process at a time writes to."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from config.errors import ConfigError
from utils.files import InUseError, lock_file

RESULTS = "results.jsonl"


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Inside, `folder` exists and no other process holds it; raises ConfigError if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_file(folder / ".lock")
    except InUseError as holder:
        raise ConfigError(f"{folder} is in use by {holder}: wait for it to end, or choose another") from None
    with lock:
        yield


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that `append_row` wrote, oldest first; empty if there is none. Lines cut by a crash are skipped.

    Every row has a "digest" of all that its result depends on.
    """
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("digest"), str):
                rows.append(row)
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Write `row` at once, on a line of its own even if a crash has cut the last line."""
    last_byte = path.read_bytes()[-1:] if path.exists() else b""
    with open(path, "a") as file:
        file.write(("" if last_byte in (b"", b"\n") else "\n") + json.dumps(row) + "\n")
