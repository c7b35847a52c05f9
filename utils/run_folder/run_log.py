"""Reports of a run, as JSON lines and in TensorBoard."""

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
GLANCE = "at_a_glance"  # the group of charts that TensorBoard shows first, because it sorts groups by name
SPRITE_PIXELS = 8192  # the projector's limit on width and height of the image of all thumbnails

# Tags of reported values whose tag is not `kind/name`. docs/training.md describes all tags.
TAGS = {
    "train/loss": f"{GLANCE}/loss",
    "train/lr/encoder": f"{GLANCE}/lr_encoder",
    "train/lr/decoder": f"{GLANCE}/lr_decoder",
    "train/images_per_s": f"{GLANCE}/images_per_s",
    "train/hours_left": f"{GLANCE}/hours_left",
    "evaluation/effective_rank": f"{GLANCE}/effective_rank",
    "evaluation/epoch": "train/epoch",
}

# Charts of the page "Custom Scalars", by category: regular expressions of the tags in each chart.
LAYOUT = {
    "Progress": {
        "loss": [f"{GLANCE}/loss"],
        "learning rates": [f"{GLANCE}/lr_.*", "train/lr/.*"],
        "images per second": [f"{GLANCE}/images_per_s"],
        "hours left": [f"{GLANCE}/hours_left"],
        "effective rank of z": [f"{GLANCE}/effective_rank"],
        "top-1 accuracy (%)": ["evaluation/(.*_)?top1"],
    },
    "Stability": {
        "gradient norm": ["train/grad_norm"],
        "skipped steps": ["train/skipped_steps"],
        "alignment and uniformity of z": ["evaluation/(alignment|uniformity)"],
    },
    "Cost": {"seconds by phase": ["seconds/.*"], "peak memory (MB)": ["train/peak_memory_mb"]},
}

logger = logging.getLogger(__name__)


def tag_of(kind: str, name: str) -> str:
    """Returns TensorBoard's tag of the value `name` in a report of this kind."""
    tag = f"{kind}/{name}"
    return TAGS.get(tag, tag.removeprefix("train/") if name.startswith("seconds/") else tag)


def _say_nothing_of_tensorboard(args: threading.ExceptHookArgs) -> None:
    """Handles errors in threads. Ignores those of TensorBoard's threads: its next call raises the same error again."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)


def read_reports(folder: Path, step: int) -> list[dict[str, Any]]:
    """Returns the reports of the run in `folder` up to `step`. Ignores damaged lines, which a crash may have left."""
    entries, path = [], folder / METRICS
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            if type(entry["step"]) is int and isinstance(entry["kind"], str) and entry["step"] <= step:
                entries.append(entry)
        except (ValueError, TypeError, KeyError):
            pass
    return entries


def _for_json(value: Any) -> Any:
    """Returns `value`, a single value or a list, with None in place of infinity and NaN, which JSON does not have."""
    if isinstance(value, list):
        return [_for_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """Reports of one run, written to `folder`/metrics.jsonl and `folder`/tensorboard. A context manager.

    A run that resumes at `step` removes the reports of later steps, so that no step is reported twice. Raises
    FolderError if metrics.jsonl cannot be written. If TensorBoard fails, a warning is logged and the run continues
    without TensorBoard.
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
            charts = {
                category: {chart: ["Multiline", tags] for chart, tags in charts.items()}
                for category, charts in LAYOUT.items()
            }
            self._writer.add_custom_scalars(charts)

    @contextmanager
    def _tensorboard(self) -> Iterator[None]:
        """Context in which an error ends the use of TensorBoard, but not the run."""
        try:
            yield
        except Exception as error:  # no error of TensorBoard may end the run
            self._writer = None
            logger.warning(
                "TensorBoard failed (%s): the run continues without it, and %s has all numbers", error, METRICS
            )

    def report(self, kind: str, step: int, values: Mapping[str, float], **notes: str | list[float]) -> None:
        """Reports scalars by name, as in report("train", 100, {"loss": 0.1}). `notes` go only into the JSON line."""
        entry = {"kind": kind, "step": step, **values, **notes}
        with writing_to(self._jsonl.parent), open(self._jsonl, "a", encoding="utf-8") as file:
            file.write(json.dumps({name: _for_json(value) for name, value in entry.items()}) + "\n")
        self._reported.add((kind, step))
        with self._tensorboard():
            if self._writer:
                for name, value in values.items():
                    self._writer.add_scalar(tag_of(kind, name), value, step)
                self._writer.flush()

    def has(self, kind: str, step: int) -> bool:
        """Returns True if this run, or the run that it resumes, has reported `kind` at `step`."""
        return (kind, step) in self._reported

    def image(self, name: str, step: int, image: Tensor) -> None:
        """Shows an image (3, H, W) uint8 in TensorBoard."""
        with self._tensorboard():
            if self._writer:
                self._writer.add_image(name, image, step)

    def histogram(self, name: str, step: int, values: Tensor) -> None:
        """Shows the distribution of numbers in TensorBoard, unless one of them is not finite."""
        with self._tensorboard():
            if self._writer and values.isfinite().all():
                self._writer.add_histogram(name, values, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Shows a text in Markdown in TensorBoard."""
        with self._tensorboard():
            if self._writer:
                self._writer.add_text(name, text, step)

    def embedding(
        self, name: str, step: int, points: Callable[[], tuple[Tensor, list[str], list[list[str]], Tensor]]
    ) -> None:
        """Shows points in TensorBoard's projector, in place of the points of an earlier step.

        Args:
            points: function that returns vectors (N, D); a header of at least two column names; a row of labels for
                each vector, one label per column; and thumbnails (N, 3, size, size) in [0, 1]. The thumbnails are
                arranged in a square, whose sides may be at most SPRITE_PIXELS long.
        """
        with self._tensorboard():
            if self._writer:
                vectors, header, rows, thumbnails = points()
                folder = Path(self._writer.log_dir)
                for outdated in folder.glob(f"*/{name}"):
                    shutil.rmtree(outdated.parent)
                (folder / "projector_config.pbtxt").unlink(missing_ok=True)  # else the projector lists them twice
                # Tabs and line breaks separate the cells of the table, so labels must not contain them.
                clean = [[" ".join(word.split()) or "-" for word in row] for row in rows]
                self._writer.add_embedding(vectors, clean, thumbnails, step, name, header)

    def hyperparameters(self, values: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """Shows the settings in TensorBoard, with the metrics of the run that have the tags `metrics`.

        SummaryWriter.add_hparams is not used because it would create a second run.
        """
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
