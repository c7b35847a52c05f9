"""results.json: the closing table of a run, with the config and the step that it belongs to."""

import json
from pathlib import Path
from typing import Any

from config.reading import result_digest
from config.schema import Config
from utils.files import write_text, writing_to

RESULTS = "results.json"


def read_results(folder: Path) -> dict[str, Any]:
    """Contents of results.json of the run in `folder`; empty if there is none that can be read."""
    try:
        results = dict(json.loads((folder / RESULTS).read_text()))
        return results if isinstance(results.get("table"), dict) else {}
    except (OSError, ValueError, TypeError):
        return {}


def write_results(folder: Path, config: Config, step: int, **contents: Any) -> None:
    """Write results.json with `contents`, among them the table; raises FolderError."""
    results = {"config_digest": result_digest(config), "step": step, **contents}
    with writing_to(folder):
        write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")


def belongs_to(results: dict[str, Any], config: Config, step: int) -> bool:
    """True if `results` are those of this config at this step."""
    return (results.get("config_digest"), results.get("step")) == (result_digest(config), step)
