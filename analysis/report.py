"""The report: one HTML file with everything that a run has shown, which loads nothing from elsewhere."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from analysis import figures, latent_space, pictures
from analysis.codec import Codec
from analysis.picture import Picture
from analysis.references import choose_images
from evaluation import CLEAN, Protocol
from evaluation.knn import knn_votes
from training.experiment import describe_model
from training.trained import Trained
from utils.config import KNN
from utils.files import write_text
from utils.randomness import derive_seed, generator
from utils.run_log import read_reports

MAX_TSNE = 2000  # points: what one can still see
MAX_CELLS = 20  # classes of a confusion matrix with numbers in it
LOSSLESS = 64  # pixels of an image that is not compressed

NEEDS = ("torchmetrics", "matplotlib", "jinja2")

Table = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass
class Confusions:
    """How often test images of a class (row) are taken for another (column), (C, C), and by which protocol."""

    counts: np.ndarray
    protocol: str
    classes: list[str]

    def most_frequent(self, count: int) -> list[tuple[str, str, int]]:
        """(class, what it was taken for, how often), most often first."""
        off = self.counts * (1 - np.eye(len(self.counts), dtype=self.counts.dtype))
        places = np.argsort(-off, axis=None, kind="stable")[:count]
        rows, columns = np.unravel_index(places, off.shape)
        found = zip(rows.tolist(), columns.tolist(), strict=True)
        return [(self.classes[r], self.classes[c], int(off[r, c])) for r, c in found if off[r, c]]


def confusions(codec: Codec) -> Confusions:
    """Of the k-NN with 20 uniform votes on z, one of the protocols of the table."""
    train, test = codec.experiment.train, codec.experiment.test
    assert train.labels is not None and test is not None and test.labels is not None, "what is judged has labels"
    k, count, device = min(20, len(train)), len(train.classes), codec.train_z.device
    bank, queries = F.normalize(codec.train_z), F.normalize(codec.test_z)
    votes = knn_votes(bank, train.labels.to(device), queries, k, count)
    guesses = votes.sort(dim=1, descending=True, stable=True).indices[:, 0].cpu()  # as the accuracy breaks ties
    counts = torch.bincount(test.labels * count + guesses, minlength=count**2).view(count, count)
    return Confusions(counts.numpy(), str(Protocol("knn", KNN(k=k), CLEAN, "z", True)), train.classes)


def draw_pictures(codec: Codec) -> list[Picture]:
    """All processes work."""
    experiment = codec.experiment
    six, one = (choose_images(experiment, None, count) for count in (6, 1))
    components = min(5, experiment.config.encoder.latent_dim, len(experiment.train))
    drawn = [
        pictures.reconstruct(codec, six, 3),
        latent_space.directions(codec, one, components, 7, 3.0, None, random=True),  # in which z shows more
        pictures.nearest(codec, six, min(7, len(experiment.train))),
    ]
    if len(six) > 1:
        pairs = choose_images(experiment, None, len(six) // 2 * 2)
        drawn.insert(1, pictures.interpolate(codec, pairs, 7))
        if len(codec.soda.decoder.section_dims) > 1:
            drawn.append(pictures.mix(codec, pairs, None, random=True))
    return drawn


def tsne(codec: Codec) -> tuple[np.ndarray, np.ndarray]:
    """Places (n, 2) of test latents of length 1 in the plane, and their labels; of MAX_TSNE images at most."""
    from sklearn.manifold import TSNE

    test = codec.experiment.test
    assert test is not None and test.labels is not None, "what is judged has labels"
    chosen = torch.randperm(len(test), generator=generator(codec.seed, "t-SNE images"))[:MAX_TSNE].sort().values
    z = F.normalize(codec.test_z)[chosen.to(codec.test_z.device)].cpu().numpy()
    if len(z) < 4:
        return np.zeros((len(z), 2)), test.labels[chosen].numpy()
    perplexity = min(30.0, (len(z) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=derive_seed(codec.seed, "t-SNE") % 2**32)
    return plane.fit_transform(z), test.labels[chosen].numpy()


def draw_curves(reports: list[dict[str, Any]]) -> list[str]:
    """Loss, gradient norm, learning rates and accuracies over epochs, as SVG, of a run's reports."""

    def series(kind: str, name: str) -> tuple[list[float], list[float]]:
        entries = [entry for entry in reports if entry["kind"] == kind and name in entry]
        return [entry["epoch"] for entry in entries], [entry[name] for entry in entries]

    drawn = []
    if series("train", "loss")[0]:
        drawn.append(figures.curves("loss", "loss", {"loss": series("train", "loss")}, log=True))
        drawn.append(figures.curves("norm", "gradient norm", {"norm": series("train", "grad_norm")}, log=True))
        rates = {part: series("train", f"lr/{part}") for part in ("encoder", "decoder")}
        drawn.append(figures.curves("rates", "learning rate", rates, from_0=True))
    names = {"knn_top1": "k-NN", "probe_top1": "linear probe"}
    lines = {label: series("evaluation", name) for name, label in names.items()}
    if any(epochs for epochs, _ in lines.values()):
        drawn.append(figures.curves("accuracy", "top-1 (%)", lines))
    return drawn


def data_uri(image: Tensor, lossless: bool = False) -> str:
    """(3, H, W) uint8 as PNG, or, of more than LOSSLESS pixels a side, as JPEG."""
    out = io.BytesIO()
    lossless = lossless or max(image.shape[1:]) <= LOSSLESS
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, format="PNG" if lossless else "JPEG", quality=90)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def heat_map(counts: np.ndarray) -> str:
    """A confusion matrix of many classes as an image: the darker, the larger the share of the row."""
    share = counts / counts.sum(axis=1, keepdims=True).clip(1)
    grey = torch.from_numpy((255 * (1 - np.sqrt(share))).round().astype(np.uint8))
    return data_uri(grey.expand(3, -1, -1), lossless=True)


def write_report(
    path: Path, trained: Trained, codec: Codec, table: Table, found: Confusions, drawn: list[Picture]
) -> None:
    """Write the HTML file; only one process need call it."""
    import jinja2

    experiment, config = codec.experiment, trained.config
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["data_uri"] = data_uri
    columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
    test = experiment.test
    assert test is not None, "what is judged has test images"
    html = environment.get_template("report.html").render(
        config=config,
        checkpoint=trained,
        epoch=trained.contents["step"] / experiment.loader.steps_per_epoch,
        digest=trained.digest,
        model=describe_model(config),
        num_train=len(experiment.train),
        num_test=len(test),
        torch_version=torch.__version__,
        device=str(experiment.device),
        columns=columns,
        table=table,
        curves=draw_curves(read_reports(trained.folder, trained.contents["step"])),
        confusions=found,
        max_cells=MAX_CELLS,
        heat_map=heat_map(found.counts),
        tsne=figures.scatter("tsne", *tsne(codec), found.classes),
        num_tsne=min(MAX_TSNE, len(test)),
        pictures=drawn,
        side=min(max(72, config.data.image_size), 128),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
