"""What a run tells: TensorBoard, one JSON line a report, the time each phase took, the table at the end."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from utils.files import write_text


class RunLog:
    """Reports of one run, to `folder`/metrics.jsonl and `folder`/tensorboard.

    A run that resumes at `step` drops what was reported after it, so that no step is there twice.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._jsonl = folder / "metrics.jsonl"
        if self._jsonl.exists():
            lines = self._jsonl.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_text(self._jsonl, "".join(kept))
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def report(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Scalars by name, as in report("train", 100, {"loss": 0.1})."""
        with open(self._jsonl, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        self._writer.flush()

    def has(self, kind: str, step: int) -> bool:
        """Whether this run, or the one that it resumes, has reported `kind` at `step`."""
        lines = self._jsonl.read_text().splitlines() if self._jsonl.exists() else []
        return any((entry["kind"], entry["step"]) == (kind, step) for entry in map(json.loads, lines))

    def image(self, name: str, step: int, image: Tensor) -> None:
        """(3, H, W) uint8."""
        self._writer.add_image(name, image, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
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
