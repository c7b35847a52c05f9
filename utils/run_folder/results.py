"""results.json: the final table of a run and the measures of test.py, with the step and digests of the config.

One digest is of all keys that the table depends on. The other is of the experiment keys alone, by which measures belong
to the file. The protocol of a measure names the run keys that it depends on.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.keys import experiment_digest, result_digest
from config.schema import RunConfig
from utils.files import write_text, writing_to

RESULTS = "results.json"
STARTING_FILES = ("encoder.weights", "decoder.weights")  # not needed when a run resumes, so they may be missing


def read_results(folder: Path) -> dict[str, Any]:
    """Returns the contents of results.json in `folder`, or an empty dict if the file is missing or damaged."""
    try:
        results = dict(json.loads((folder / RESULTS).read_text(encoding="utf-8")))
        return results if isinstance(results.get("table"), dict) else {}
    except (OSError, ValueError, TypeError):
        return {}


def write_results(folder: Path, config: RunConfig, step: int, images: Sequence[str | None], **contents: Any) -> None:
    """Writes the table and other `contents` into results.json. Raises FolderError.

    Measures are kept if they are of the same experiment, step and images.

    Args:
        images: digests of the training and the test images.
    """
    before = read_results(folder)
    results = {
        "config_digest": result_digest(config, without=STARTING_FILES),
        "experiment_digest": experiment_digest(config),
        **{"step": step, "images": [*images], **contents},
    }
    is_same = is_of_experiment(before, config, step) and before.get("images", [*images]) == [*images]
    if "measures" in before and is_same:
        results["measures"] = before["measures"]
    _write(folder, results)


def write_measures(folder: Path, measures: dict[str, Any]) -> None:
    """Replaces the measures in results.json, which must be there. Raises FolderError."""
    _write(folder, {**read_results(folder), "measures": measures})


def _write(folder: Path, results: dict[str, Any]) -> None:
    with writing_to(folder):
        write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")


def is_judged_by(results: dict[str, Any], config: RunConfig, step: int) -> bool:
    """Returns True if the table in `results` is of this step, and the keys that it depends on are those of `config`."""
    return (results.get("config_digest"), results.get("step")) == (result_digest(config, without=STARTING_FILES), step)


def is_of_experiment(results: dict[str, Any], config: RunConfig, step: int) -> bool:
    """Returns True if `results` are of this step of the experiment. Run keys, such as data.root, may differ."""
    same = results.get("experiment_digest") == experiment_digest(config) and results.get("step") == step
    return same or is_judged_by(results, config, step)  # earlier versions wrote only config_digest
