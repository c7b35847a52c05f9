"""Records results of runs in docs/results, and fills the tables of the pages with them.

A file in docs/results has one JSON line for each time that a run was judged. A line holds accuracies, measures, images
seen and training time, but no weights, paths or times of day. A run that is recorded again replaces its lines. Measures
that only the old line has are kept if config, checkpoint, images seen and images judged are the same, as far as they
are known. So are accuracies of the same checkpoint, in files of test.py.

python -m docs.record runs/digits                                       # a run of train.py or finetune.py
python -m docs.record runs/seed_0 runs/seed_1 runs/seed_2 --name digits   # runs of one table
python -m docs.record runs/cifar10_cpu_runs                             # an ablation
python -m docs.record published.json                                    # a file that test.py --results has written
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from ablations import result_rows
from config.errors import ConfigError
from docs import fill_tables
from docs.rows import RESULTS
from evaluation.measures.recording import with_cells
from utils import cli
from utils.files import write_text
from utils.run_folder.results import read_results
from utils.run_folder.run_log import read_reports

# Entries of an ablation's result that are kept.
KEPT = (
    *("run", "stage", "variant", "seed", "overrides", "digest", "complete", "epochs", "images", "seconds"),
    *("step_gflop", "table", "data", "machine", "amp"),
)


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns the results of a run, of the runs of an ablation, or of test.py, as rows of docs/results, oldest first.

    Args:
        folder: folder of a run or of an ablation, or file of test.py --results.
        name: name of the file in docs/results, for the names of runs.

    Raises ConfigError if the folder has no results.
    """
    if (folder / result_rows.RESULTS).exists():
        rows = ablation_rows(folder / result_rows.RESULTS)
        if not rows:
            raise ConfigError(f"{folder / result_rows.RESULTS} has no accuracies: name an ablation of ablations.ablate")
        return rows
    config = folder / "config.yaml"
    if folder.is_file():
        return [judged_row(folder, name)]
    if not config.exists():
        raise ConfigError(f"{folder} has neither config.yaml nor {result_rows.RESULTS}: name a run folder")
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    rows = [finetune_row(folder, settings)] if "method" in settings else train_rows(folder, settings)
    if not rows:
        raise ConfigError(f"{folder} was not judged yet: record it after its first evaluation")
    return [{**row, "run": f"{name}-{row['run']}"} for row in rows]


def judged_row(file: Path, name: str) -> dict[str, Any]:
    """Returns the row of a file that test.py --results has written. Raises ConfigError if it is another file."""
    row = {"run": f"{name}-{file.stem}", "stage": "judged", "variant": file.stem, "digest": "", "complete": False}
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
        kept = {key: found[key] for key in ("checkpoint", "step", "data")}
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{file} is not a file of test.py --results: name another one") from None
    return {**row, **kept, "table": found.get("table", {}), "measures": found.get("measures", {})}


def ablation_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of an ablation that have accuracies, with the number of epochs of the whole run.

    A run may also have rows of an earlier config, or several rows after the same number of images. Of these, the rows
    of the newest config are returned, and the last one for each number of images.
    """
    judged = [row for row in result_rows.read_rows(path) if "table" in row]
    newest = {row["run"]: row["digest"] for row in judged}
    rows = {}
    for row in (row for row in judged if row["digest"] == newest[row["run"]]):
        config = yaml.safe_load(row.get("config", "{}")).get("training", {})
        kept = {key: row[key] for key in KEPT if key in row}
        rows[row["run"], row.get("images")] = {**kept, "of_epochs": config.get("epochs")}
    return list(rows.values())


def train_rows(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each evaluation of a run of train.py.

    That of the last judged step has the baselines and the measures of test.py as well. Evaluations without accuracies,
    of images without labels, have a row only if they have measures. `seconds` is the time of training, without
    evaluations and checkpoints.
    """
    batch_size, results, rows = config["training"]["batch_size"], read_results(folder), []
    seconds, step, measures = 0.0, 0, results.get("measures", {})

    def add(entry: dict[str, Any], judged: dict[str, Any]) -> None:
        is_last = results.get("step") == entry["step"]  # maybe of fewer epochs than the config has now
        complete = is_last and entry["epoch"] == config["training"]["epochs"]
        rows.append(
            {
                **{"run": str(config["seed"]), "stage": "train", "variant": "run", "seed": config["seed"]},
                **{"digest": results.get("config_digest", ""), "complete": complete, "epochs": entry["epoch"]},
                **{"seconds": seconds, "of_epochs": config["training"]["epochs"]},
                "images": entry["step"] * batch_size,
                "table": results["table"] if is_last else judged,
                **({"measures": measures} if is_last and measures else {}),
            }
        )

    for entry in read_reports(folder, 2**62):
        if entry["kind"] == "train" and entry.get("images_per_s"):
            seconds += (entry["step"] - step) * batch_size / entry["images_per_s"]
            step = entry["step"]
        protocols = [key for key in entry if f"{key}_top1" in entry and isinstance(entry[key], str)]
        is_measured = measures and entry["step"] == results["step"]
        if entry["kind"] == "evaluation" and (protocols or is_measured):
            add(entry, {entry[p]: {"trained": {t: entry[f"{p}_{t}"] for t in ("top1", "top3")}} for p in protocols})
    return rows


def finetune_row(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a finished run of finetune.py. Raises ConfigError if it is not finished."""
    results = read_results(folder)
    if not results:
        raise ConfigError(f"{folder} is not finished: run its command again")
    start = "encoder" if config["encoder"]["weights"] else "scratch"
    method, labels, split = config["method"], config["num_labels"], config["label_split"]
    return {
        **{"run": f"{method}-{start}-{labels}-{split}-{config['seed']}", "stage": "finetune", "variant": method},
        **{"seed": config["seed"], "digest": "", "complete": True, "start": start, "labels": labels, "split": split},
        "images": results["step"] * config["training"]["batch_size"],
        "table": results["table"],
    }


def rounded(value: Any) -> Any:
    """Returns a value with all its numbers rounded to 9 decimals."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return round(value, 9) if isinstance(value, float) else value


def main(argv: list[str] | None = None) -> int:
    """Runs the command with the arguments `argv` (None: those of the command line) and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders",
        nargs="+",
        type=cli.path_option,
        metavar="PATH",
        help="folders of runs, or files of --results",
    )
    parser.add_argument("--name", help="name of the file in docs/results; default: name of the first one")
    parser.add_argument("--out", type=cli.path_option, default=RESULTS, help="folder of the files")
    args = parser.parse_args(argv)
    with cli.gather_user_errors():
        first = args.folders[0].resolve()
        name = args.name or (first.stem if first.is_file() else first.name)
        rows = [rounded(row) for folder in args.folders for row in rows_of(folder, name)]
        keys = [(row["run"], row.get("images")) for row in rows]
        if len(set(keys)) < len(keys):
            raise ConfigError(
                "two of these runs have the same name (the seed, or the name of the file): record them one by one, "
                "with different --name"
            )
        path = args.out / f"{name}.jsonl"
        original = path.read_bytes() if path.exists() else None
        before = result_rows.read_rows(path)
        rows = merged(before, rows)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        if args.out == RESULTS:
            try:
                fill_tables.main([])
            except OSError:  # a page cannot be written; `python -m docs.fill_tables` fills the others later
                raise
            except Exception as error:
                path.unlink() if original is None else path.write_bytes(original)
                raise ConfigError(
                    f"the tables of {name} need other results ({error!r}): nothing was changed; set --name"
                ) from None
        print(f"{len(rows)} results in {path}")
    return 0


def merged(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the earlier rows of other runs, then `rows`. Prints which results are lost.

    A row keeps the measures that the earlier row of the same run has in addition, provided that config, checkpoint,
    images seen and images judged are the same. It keeps additional accuracies if the checkpoint is known.
    """
    by_origin = {_origin(row): row for row in rows}
    kept = [row for row in before if row["run"] not in {new["run"] for new in rows}]
    for old in (row for row in before if row not in kept):
        if new := by_origin.get(_origin(old)):
            if "checkpoint" in old:
                new["table"] = with_cells(old["table"], new["table"])
            new["table"] = new["table"] or old["table"]
            if old.get("measures"):
                new["measures"] = {**old["measures"], **new.get("measures", {})}
            continue
        same_run = [row for row in rows if row["run"] == old["run"]]
        measured = {name for row in same_run for name in row.get("measures", {})}
        lost = [name for name in old.get("measures", {}) if name not in measured]
        if (images := old.get("images")) and all(row.get("images") != images for row in same_run):
            lost.insert(0, f"those after {images:,} images")
        if lost:
            print(f"earlier results of {old['run']} are removed: {', '.join(lost)}")
    return kept + rows


def _origin(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in ("run", "images", "digest", "checkpoint", "data"))


if __name__ == "__main__":
    cli.run(main)
