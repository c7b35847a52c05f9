"""results.json: the final table of a run, with the digest of the config and the step that the table belongs to."""

import json
from pathlib import Path
from typing import Any

from config.keys import result_digest
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


def write_results(folder: Path, config: RunConfig, step: int, **contents: Any) -> None:
    """Writes `contents` into results.json, which must include the table, now or before. Raises FolderError.

    Other contents that belong to the same config and step are kept.
    """
    before = read_results(folder)
    kept = before if belongs_to(before, config, step) else {}
    results = {**kept, "config_digest": result_digest(config, without=STARTING_FILES), "step": step, **contents}
    with writing_to(folder):
        write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")


def belongs_to(results: dict[str, Any], config: RunConfig, step: int) -> bool:
    """Returns True if `results` belong to this config and this step."""
    return (results.get("config_digest"), results.get("step")) == (result_digest(config, without=STARTING_FILES), step)
