"""The report of a model of novel views: one HTML file with pictures and scores. It loads no other files."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import torch

from analysis.grid import Grid, write_gif
from analysis.pictures import Views
from analysis.report import draw_curves
from analysis.templates import render
from evaluation.codec import Codec
from evaluation.judge import Table
from evaluation.measures.base import Measured
from experiment.models import describe_model
from experiment.trained import Trained
from utils.cli import gather_user_errors
from utils.distributed.processes import rank
from utils.files import write_text
from utils.run_folder.run_log import read_reports


def make_report(path: Path, trained: Trained, codec: Codec, measured: Mapping[str, Measured], table: Table) -> None:
    """Collective. Draws the picture and writes the HTML file.

    Ends all ranks with status 2 if the file cannot be written.

    Args:
        measured: tables of novel views by name.
        table: accuracies for the classes of the objects; empty: there are no classes.
    """
    picture = Views()
    grid = picture.draw(codec, picture.find(codec.experiment))
    with gather_user_errors():
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, _html(trained, codec, measured, table, grid))


def _html(trained: Trained, codec: Codec, measured: Mapping[str, Measured], table: Table, grid: Grid) -> str:
    animation = io.BytesIO()
    write_gif(grid.frames, animation)
    experiment, config = codec.experiment, trained.config
    train, test = experiment.train, experiment.test
    assert train.objects is not None and test is not None and test.objects is not None
    titles = {"novel_views": "Scores of novel views", "identity": "Objects told apart across views"}
    tables = {titles.get(name, name): each for name, each in measured.items()}
    return render(
        "views_report.html",
        config=config,
        checkpoint=trained,
        progress=trained.progress(experiment),
        is_of_run=trained.saw_images_of(experiment),
        num_train=len(train),
        num_test=len(test),
        num_train_objects=len(train.objects.unique()),
        num_test_objects=len(test.objects.unique()),
        picture=grid,
        gif=f"data:image/gif;base64,{base64.b64encode(animation.getvalue()).decode()}",
        side=max(48, config.decoder_size),
        tables=tables | ({"Classes of the objects": accuracies(table)} if table else {}),
        curves=draw_curves(read_reports(trained.folder, trained.step), trained.trained_with.evaluation.features),
        device=str(experiment.device),
        torch_version=torch.__version__,
        model=describe_model(config),
    )


def accuracies(table: Table) -> Measured:
    """Returns the top-1 accuracies of the judge's table as a table of a measure."""
    rows = {
        protocol: {name: {"value": each["top1"]} for name, each in cells.items()} for protocol, cells in table.items()
    }
    return Measured("top-1 accuracy on the test images in per cent, by protocol", rows)
