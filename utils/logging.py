"""Log messages, progress bars, times of phases, and the table of accuracies."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from utils.distributed.processes import rank

phase_log = logging.getLogger("phases")  # says what a process is about to do, in its log file but not on the console


_early = MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)


def start_logging() -> None:
    """Starts logging: messages of rank 0 and warnings of all ranks are shown on the console.

    All messages, including those of `phase_log`, are kept in memory until `log_to` writes them to a file.
    """
    console = logging.StreamHandler(sys.stderr)
    console.addFilter(lambda record: record.name != "phases")
    console.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[console, _early])


@contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Writes all messages of this process, with their time, to `folder`/rank_<rank>.log until the context ends.

    The messages logged before are written first. If the process hangs or dies, the last line of the file says what it
    was doing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / f"rank_{rank()}.log", encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    setattr(file, "handleError", lambda record: None)  # noqa: B010 (mypy) a full disk is reported elsewhere
    root = logging.getLogger()
    file.handle(logging.makeLogRecord({"msg": f"process {os.getpid()} on {socket.gethostname()}"}))
    _early.setTarget(file)
    _early.flush()
    root.removeHandler(_early)
    root.addHandler(file)
    try:
        yield
    finally:
        root.removeHandler(file)
        with suppress(OSError):
            file.close()


def progress(total: int, what: str, unit: str, done: int | None = None) -> Any:
    """Returns a progress bar on rank 0, and a disabled one on other ranks.

    On a terminal, it appears after 1 s and is redrawn at most once every 0.5 s. Elsewhere, it appears after 30 s and is
    printed again at most once every 15 s.

    Args:
        what: text in front of the bar.
        unit: name of the things that are counted.
        done: number of things that were done before, for a bar that appears immediately and stays at the end.
    """
    from tqdm import tqdm

    every = 1 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=True,
        initial=done or 0,
        leave=done is not None,
        delay=0 if done is not None else every,
        mininterval=every / 2,
        disable=rank() > 0,
    )


class PhaseTimer:
    """Wall time in seconds that each phase has taken since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside the context to the phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> tuple[float, dict[str, float]]:
        """Returns (seconds since the last call, seconds by phase) and resets both."""
        now = time.perf_counter()
        total, seconds = now - self._since, dict(self._seconds)
        self._since = now
        self._seconds.clear()
        return total, seconds


def format_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Returns {protocol: {encoder: {"top1": ..., "top3": ...}}} as a text table of top-1 / top-3 in per cent."""
    columns = list(dict.fromkeys(column for cells in results.values() for column in cells))
    rows = [["top-1 / top-3 (%)", *columns]]
    for protocol, cells in results.items():
        shown = [f"{cells[c]['top1']:.1f} / {cells[c]['top3']:.1f}" if c in cells else "" for c in columns]
        rows.append([protocol, *shown])
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of texts as a text table. The first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
