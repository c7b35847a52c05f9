"""The report: one HTML file with the results of a run. It loads no other files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from analysis import svg
from analysis.grid import Grid
from analysis.pictures import Directions, Interpolate, Mix, Nearest, Picture, Reconstruct
from analysis.templates import data_uri, render
from config.schema import KNN, Config
from evaluation.codec import Codec
from evaluation.features import feature_name
from evaluation.judge import Table
from evaluation.knn import knn_votes
from evaluation.measures import MEASURES, Measured
from evaluation.measures.recording import recorded_measures
from evaluation.protocols import METRICS, KNNProtocol, Protocol, config_protocols
from experiment.models import describe_model
from experiment.trained import Trained
from utils.cli import gather_user_errors
from utils.distributed.processes import rank
from utils.files import write_text
from utils.randomness import derive_seed, generator
from utils.run_folder.run_log import read_reports

MAX_TSNE = 2000  # largest number of points; more points cannot be distinguished
MAX_CELLS = 20  # largest number of classes for which a confusion matrix is shown as a table of numbers

BASELINES = ("raw pixels", "untrained")

NEEDS = ("torchmetrics", "matplotlib", "jinja2")  # packages needed in addition to requirements.txt


@dataclass(frozen=True)
class Comparison:
    """Top-1 accuracies, in per cent, of the trained encoder and of the baselines under one protocol of the config.

    Attributes:
        protocol: the protocol, without a note.
        top1: accuracy by encoder: "trained", and those of BASELINES that were judged.
    """

    protocol: Protocol
    top1: dict[str, float]

    @property
    def label(self) -> str:
        """Name of the kind of classifier."""
        return METRICS[self.protocol.metric]

    @property
    def gains(self) -> dict[str, float]:
        """Accuracy of the trained encoder minus that of each baseline, of the values as they are printed."""
        printed = {name: round(value, 1) for name, value in self.top1.items()}
        return {name: printed["trained"] - value for name, value in printed.items() if name != "trained"}


def comparisons(config: Config, protocols: Sequence[Protocol], table: Table, timestep: int | None) -> list[Comparison]:
    """Returns one comparison for each protocol of the config.

    Those of a time-dependent encoder are at `timestep`, or, if that is not judged, at the first judged one. Raw pixels
    do not depend on the timestep.
    """
    names = {str(replace(protocol, note="")): str(protocol) for protocol in protocols}
    by_metric: dict[str, list[Protocol]] = {}
    for protocol in config_protocols(config):
        by_metric.setdefault(protocol.metric, []).append(protocol)
    found = []
    for group in by_metric.values():
        own = next((protocol for protocol in group if protocol.timestep == timestep), group[0])
        raw = [cells for each in group if "raw pixels" in (cells := table[names[str(each)]])]
        cells = {**(raw[0] if raw else {}), **table[names[str(own)]]}
        found.append(Comparison(own, {name: cells[name]["top1"] for name in ("trained", *BASELINES) if name in cells}))
    return found


def draw_learning(compared: Sequence[Comparison], reports: list[dict[str, Any]], epoch: float) -> str:
    """Draws top-1 accuracies over epochs, as an SVG element: those that the run has reported up to `epoch`.

    If the run was judged by the same protocol, the untrained encoder is added at epoch 0, the checkpoint at `epoch`.
    """
    lines = {}
    for each in compared:
        name = each.protocol.logged_as
        entries = [entry for entry in reports if entry["kind"] == "evaluation" and f"{name}_top1" in entry]
        points = {entry["epoch"]: entry[f"{name}_top1"] for entry in entries}
        if all(entry.get(name) == str(each.protocol) for entry in entries):
            start = {0: each.top1["untrained"]} if "untrained" in each.top1 else {}
            points = {**start, **points, epoch: each.top1["trained"]}
        lines[each.label] = (list(points), list(points.values()))
    return svg.curves("accuracy", "top-1 (%)", lines)


@dataclass
class Confusions:
    """A confusion matrix of the test images.

    Attributes:
        counts: (C, C) number of images by true class (row) and predicted class (column).
        protocol: description of the protocol that made the predictions.
        classes: names of the classes.
    """

    counts: np.ndarray
    protocol: str
    classes: list[str]

    def most_frequent(self, count: int) -> list[tuple[str, str, int]]:
        """Returns up to `count` of the most frequent confusions, as (class, predicted class, number of images)."""
        off = self.counts * (1 - np.eye(len(self.counts), dtype=self.counts.dtype))
        places = np.argsort(-off, axis=None, kind="stable")[:count]
        rows, columns = np.unravel_index(places, off.shape)
        found = zip(rows.tolist(), columns.tolist(), strict=True)
        return [(self.classes[r], self.classes[c], int(off[r, c])) for r, c in found if off[r, c]]


def confusions(codec: Codec) -> Confusions:
    """Collective. Computes the confusion matrix of k-NN on z with k=20 and uniform votes, as in the table."""
    train, test = codec.experiment.train, codec.experiment.test
    assert train.labels is not None and test is not None and test.labels is not None, "the evaluation needs labels"
    k, count, device = min(20, len(train)), len(train.classes), codec.train_z.device
    bank, queries = F.normalize(codec.train_z), F.normalize(codec.test_z)
    votes = knn_votes(bank, train.labels.to(device), queries, k, count)
    guesses = votes.sort(dim=1, descending=True, stable=True).indices[:, 0].cpu()  # breaks ties like the accuracy
    counts = torch.bincount(test.labels * count + guesses, minlength=count**2).view(count, count)
    protocol = KNNProtocol(settings=KNN(k=k), timestep=codec.timestep)
    return Confusions(counts.numpy(), str(protocol), train.classes)


def draw_pictures(codec: Codec) -> dict[str, Grid]:
    """Collective. Draws the report's pictures and returns them by name."""
    experiment = codec.experiment
    num_train, config = len(experiment.train), experiment.config
    assert experiment.test is not None, "the evaluation needs test images"
    num_images = min(6, len(experiment.test))
    even = num_images // 2 * 2
    components = min(5, config.encoder.latent_dim, num_train)
    pictures: list[Picture[Any]] = [
        Reconstruct(num_images=num_images),
        *([Interpolate(num_steps=7, num_images=even)] if num_images > 1 else []),
        Directions(num_components=components, random=True),  # the image's own x_T would hide part of z's effect
        Nearest(num_images=num_images, num_neighbours=min(6, num_train)),
        *([Mix(random=True, num_images=even)] if num_images > 1 and config.decoder.num_sections > 1 else []),
    ]
    # The decoder of a time-dependent encoder expects z at its own timesteps, so pictures that can use them all do.
    over_time = codec if codec.timestep is None else Codec(experiment, codec.soda, codec.seed)
    return {
        picture.name: picture.draw(codec if picture.needs_one_z else over_time, picture.find(experiment))
        for picture in pictures
    }


def tsne(codec: Codec) -> tuple[np.ndarray, np.ndarray]:
    """Returns the t-SNE, (n, 2), of at most MAX_TSNE test latents scaled to length 1, and their labels (n,)."""
    from sklearn.manifold import TSNE

    test = codec.experiment.test
    assert test is not None and test.labels is not None, "the evaluation needs labels"
    chosen = torch.randperm(len(test), generator=generator(codec.seed, "t-SNE images"))[:MAX_TSNE].sort().values
    z = F.normalize(codec.test_z)[chosen.to(codec.test_z.device)].cpu().numpy()
    if len(z) < 4:
        return np.zeros((len(z), 2)), test.labels[chosen].numpy()
    perplexity = min(30.0, (len(z) - 1) / 3)
    start = "pca" if z.shape[1] > 1 else "random"
    plane = TSNE(perplexity=perplexity, init=start, random_state=derive_seed(codec.seed, "t-SNE") % 2**32)
    return plane.fit_transform(z), test.labels[chosen].numpy()


def draw_curves(reports: list[dict[str, Any]], features: str) -> list[str]:
    """Draws loss, gradient norm, learning rates and effective rank of a run over epochs, each as an SVG element.

    For a time-dependent encoder, accuracies are drawn as well, with one line per timestep.

    Args:
        features: kind of features whose accuracies are reported.
    """

    def series(kind: str, name: str) -> tuple[list[float], list[float]]:
        entries = [entry for entry in reports if entry["kind"] == kind and name in entry]
        return [entry["epoch"] for entry in entries], [entry[name] for entry in entries]

    drawn = []
    if series("train", "loss")[0]:
        drawn.append(svg.curves("loss", "loss", {"loss": series("train", "loss")}, log=True))
        drawn.append(svg.curves("norm", "gradient norm", {"norm": series("train", "grad_norm")}, log=True))
        rates = {part: series("train", f"lr/{part}") for part in ("encoder", "decoder")}
        if rates["encoder"] == rates["decoder"]:
            rates = {"encoder and decoder": rates["encoder"]}
        drawn.append(svg.curves("rates", "learning rate", rates, from_0=True))
    if series("evaluation", "effective_rank")[0]:
        rank = {"rank": series("evaluation", "effective_rank")}
        drawn.append(svg.curves("rank", "effective rank of z", rank, from_0=True))
    names = {name for entry in reports if entry["kind"] == "evaluation" for name in entry}
    for metric, label in METRICS.items():
        timesteps = sorted(int(each[1]) for name in names if (each := re.fullmatch(rf"{metric}@(\d+)_top1", name)))
        lines = {feature_name(features, t): series("evaluation", f"{metric}@{t}_top1") for t in timesteps}
        if lines:
            drawn.append(svg.curves(f"accuracy-{metric}", f"{label}, top-1 (%)", lines))
    return drawn


def draw_timesteps(protocols: Sequence[Protocol], table: Table) -> str | None:
    """Draws top-1 of the trained encoder over the timesteps of z, as an SVG element; None if there are no timesteps.

    The figure has one line per kind of classifier, under the first of its protocols.
    """
    lines: dict[str, tuple[list[float], list[float]]] = {}
    first: dict[str, str] = {}
    for protocol in protocols:
        text = str(replace(protocol, timestep=None))
        if protocol.timestep is not None and first.setdefault(protocol.metric, text) == text:
            timesteps, values = lines.setdefault(METRICS[protocol.metric], ([], []))
            timesteps.append(protocol.timestep)
            values.append(table[str(protocol)]["trained"]["top1"])
    return svg.curves("timesteps", "top-1 (%)", lines, xlabel="timestep of z") if lines else None


def heat_map(counts: np.ndarray) -> str:
    """Draws a confusion matrix as an image, returned as a data URI. Darker pixels are larger fractions of their row."""
    share = counts / counts.sum(axis=1, keepdims=True).clip(1)
    grey = torch.from_numpy((255 * (1 - np.sqrt(share))).round().astype(np.uint8))
    return data_uri(grey.expand(3, -1, -1), lossless=True)


def make_report(
    path: Path,
    trained: Trained,
    codec: Codec,
    protocols: Sequence[Protocol],
    table: Table,
    measured: Mapping[str, Measured],
) -> None:
    """Collective. Computes the confusion matrix, draws the pictures and writes the HTML file.

    Ends all ranks with status 2 if the file cannot be written.
    """
    found, drawn = confusions(codec), draw_pictures(codec)
    with gather_user_errors():
        if rank() == 0:
            write_report(path, trained, codec, protocols, table, measured, found, drawn)


def write_report(
    path: Path,
    trained: Trained,
    codec: Codec,
    protocols: Sequence[Protocol],
    table: Table,
    measured: Mapping[str, Measured],
    found: Confusions,
    pictures: dict[str, Grid],
) -> None:
    """Writes the HTML file. Not collective: the ranks have already encoded both splits in `codec`."""
    experiment, config = codec.experiment, trained.config
    columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
    test = experiment.test
    assert test is not None, "the evaluation needs test images"
    is_of_run = trained.saw_images_of(experiment)
    reports = read_reports(trained.folder, trained.step)
    measures = {**(recorded_measures(trained) if is_of_run else {}), **measured}
    compared = comparisons(config, protocols, table, codec.timestep)
    html = render(
        "report.html",
        config=config,
        checkpoint=trained,
        progress=trained.progress(experiment),
        digest=trained.digest,
        model=describe_model(config),
        is_of_run=is_of_run,
        num_train=len(experiment.train),
        num_test=len(test),
        torch_version=torch.__version__,
        device=str(experiment.device),
        columns=columns,
        table=table,
        compared=compared,
        learning=draw_learning(compared, reports, trained.step / experiment.steps_per_epoch) if is_of_run else "",
        measured={MEASURES[name]: each for name, each in measures.items() if name in MEASURES},
        timestep=codec.timestep,
        over_timesteps=draw_timesteps(protocols, table),
        curves=draw_curves(reports, trained.trained_with.evaluation.features),
        confusions=found,
        max_cells=MAX_CELLS,
        heat_map=heat_map(found.counts),
        tsne=svg.scatter("tsne", *tsne(codec), found.classes),
        num_tsne=min(MAX_TSNE, len(test)),
        pictures=pictures,
        side=min(max(72, config.encoder_size), 128),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
