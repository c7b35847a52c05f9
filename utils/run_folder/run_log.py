"""Reports of a run: one JSON line each, and TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import write_text, writing_to

if TYPE_CHECKING:
    from torch import Tensor

METRICS = "metrics.jsonl"
SPRITE_PIXELS = 8192  # that the projector shows, either way, of all thumbnails side by side

logger = logging.getLogger(__name__)


def _say_nothing_of_tensorboard(args: threading.ExceptHookArgs) -> None:
    """Its thread's errors are met again by whoever uses it next."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)


def read_reports(folder: Path, step: int) -> list[dict[str, Any]]:
    """Reports of the run in `folder` up to `step`; a line that a crash cut short is ignored."""
    entries, path = [], folder / METRICS
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            if type(entry["step"]) is int and isinstance(entry["kind"], str) and entry["step"] <= step:
                entries.append(entry)
        except (ValueError, TypeError, KeyError):
            pass
    return entries


class RunLog:
    """Reports of one run, to `folder`/metrics.jsonl and `folder`/tensorboard; a context that closes them.

    A run that resumes at `step` drops what was reported after it, so that no step is there twice. Raises FolderError
    where the former cannot be written; the latter is then given up, with a line.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._jsonl = folder / METRICS
        with writing_to(folder):
            kept = read_reports(folder, step)
            write_text(self._jsonl, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._reported = {(entry["kind"], entry["step"]) for entry in kept}
        self._writer: Any = None
        with self._tensorboard():
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _say_nothing_of_tensorboard
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    @contextmanager
    def _tensorboard(self) -> Iterator[None]:
        """An error inside ends the use of TensorBoard, not the run."""
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
        """True if this run, or the one that it resumes, has reported `kind` at `step`."""
        return (kind, step) in self._reported

    def image(self, name: str, step: int, image: Tensor) -> None:
        """(3, H, W) uint8."""
        with self._tensorboard():
            if self._writer:
                self._writer.add_image(name, image, step)

    def text(self, name: str, text: str, step: int) -> None:
        with self._tensorboard():
            if self._writer:
                self._writer.add_text(name, text, step)

    def embedding(
        self, name: str, step: int, points: Callable[[], tuple[Tensor, list[str], list[list[str]], Tensor]]
    ) -> None:
        """Points for the projector, in place of those of an earlier step.

        Args:
            points: gives vectors (N, D); a header of at least two columns; what each vector is called, by column; and
                thumbnails (N, 3, size, size) on the scale of [0, 1], which side by side in a square take at most
                SPRITE_PIXELS either way.
        """
        with self._tensorboard():
            if self._writer:
                vectors, header, rows, thumbnails = points()
                folder = Path(self._writer.log_dir)
                for outdated in folder.glob(f"*/{name}"):
                    shutil.rmtree(outdated.parent)
                (folder / "projector_config.pbtxt").unlink(missing_ok=True)  # which would list it once more
                clean = [
                    [" ".join(word.split()) or "-" for word in row] for row in rows
                ]  # in a table of tabs and lines
                self._writer.add_embedding(vectors, clean, thumbnails, step, name, header)

    def hyperparameters(self, values: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """The settings, beside scalars that the run reports. (SummaryWriter.add_hparams would make it a second run.)"""
        with self._tensorboard():
            if self._writer:
                from torch.utils.tensorboard.summary import hparams

                shown = {
                    name: value if isinstance(value, bool | int | float) else str(value)
                    for name, value in values.items()
                }
                for summary in hparams(shown, dict.fromkeys(metrics, 0)):
                    self._writer.file_writer.add_summary(summary)
                self._writer.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        with self._tensorboard():
            if self._writer:
                self._writer.close()
