"""What a run tells: each process's log, TensorBoard, one JSON line a report, the time of phases, the closing table."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.distributed import rank
from utils.files import write_text, writing_to

if TYPE_CHECKING:
    from torch import Tensor

METRICS = "metrics.jsonl"

logger = logging.getLogger(__name__)
phases = logging.getLogger("phases")  # what a process is about to do: in its own log, and not on the console


_early = MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)


def start_logging() -> None:
    """The console shows what rank 0 says and all warnings; `log_to` keeps what each process says, phases too."""
    console = logging.StreamHandler(sys.stderr)
    console.addFilter(lambda record: record.name != "phases")
    console.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[console, _early])


@contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Inside, and from the start, what this process says goes to `folder`/rank_<rank>.log, with the time.

    Its last line tells what the process was doing when it hung or died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(folder / f"rank_{rank()}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    setattr(file, "handleError", lambda record: None)  # noqa: B010 (mypy) a full disk is told of elsewhere
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
        file.close()


class RunLog:
    """Reports of one run, to `folder`/metrics.jsonl and `folder`/tensorboard; a context that closes them.

    A run that resumes at `step` drops what was reported after it, so that no step is there twice. Raises FolderError
    where the former cannot be written; the latter is then given up, with a line.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._jsonl = folder / METRICS
        kept = [entry for entry in self._read() if entry["step"] <= step]
        with writing_to(folder):
            write_text(self._jsonl, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._reported = {(entry["kind"], entry["step"]) for entry in kept}
        self._writer: SummaryWriter | None = None
        with self._tensorboard():
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    @contextmanager
    def _tensorboard(self) -> Iterator[None]:
        """What fails inside ends TensorBoard, not the run."""
        try:
            yield
        except Exception as error:  # whatever it is, it is not worth a run
            self._writer = None
            logger.warning("TensorBoard is given up (%s): training goes on, and %s has all numbers", error, METRICS)

    def report(self, kind: str, step: int, values: Mapping[str, float], **notes: str) -> None:
        """Scalars by name, as in report("train", 100, {"loss": 0.1}), and notes to stand beside them in the JSON."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        with writing_to(self._jsonl.parent), open(self._jsonl, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **finite, **notes}) + "\n")
        self._reported.add((kind, step))
        with self._tensorboard():
            if self._writer:
                for name, value in values.items():
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
                self._writer.flush()

    def has(self, kind: str, step: int) -> bool:
        """Whether this run, or the one that it resumes, has reported `kind` at `step`."""
        return (kind, step) in self._reported

    def _read(self) -> list[dict[str, Any]]:
        """The reports so far; a line that a crash cut short is passed over."""
        entries = []
        for line in self._jsonl.read_text(errors="replace").splitlines() if self._jsonl.exists() else []:
            try:
                entry = json.loads(line)
                if isinstance(entry["step"], int) and isinstance(entry["kind"], str):
                    entries.append(entry)
            except (ValueError, TypeError, KeyError):
                pass
        return entries

    def image(self, name: str, step: int, image: Tensor) -> None:
        """(3, H, W) uint8."""
        with self._tensorboard():
            if self._writer:
                self._writer.add_image(name, image, step)

    def text(self, name: str, text: str, step: int) -> None:
        with self._tensorboard():
            if self._writer:
                self._writer.add_text(name, text, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        with self._tensorboard():
            if self._writer:
                self._writer.close()


class PhaseTimer:
    """Seconds of wall time spent in each phase since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> tuple[float, dict[str, float]]:
        """(seconds since the last call, seconds by phase), and start anew."""
        now = time.perf_counter()
        total, seconds = now - self._since, dict(self._seconds)
        self._since = now
        self._seconds.clear()
        return total, seconds


def format_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """{protocol: {encoder: {"top1": ..., "top3": ...}}} as lines of text, top-1 / top-3 in per cent."""
    columns = list(dict.fromkeys(column for cells in results.values() for column in cells))
    rows = [["top-1 / top-3 (%)", *columns]]
    for protocol, cells in results.items():
        shown = [f"{cells[c]['top1']:.1f} / {cells[c]['top3']:.1f}" if c in cells else "" for c in columns]
        rows.append([protocol, *shown])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
