"""The judge: applies named protocols to encoders and gives their accuracies."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from config.schema import View
from datasets.images import Images
from evaluation.features import Features, extract_features
from evaluation.knn import topk_accuracy
from evaluation.protocols import Classifier, Protocol
from experiment.batch import draw_source, read_pixels, view_draw
from experiment.models import initial_soda
from experiment.opening import Experiment
from model.decoder import UNetDecoder
from model.soda import SODA
from utils.device import autocast
from utils.randomness import generator, image_noise

SETTLING_PASSES = 20
MAX_RAW_PIXELS = 2**30  # numbers of a whole data set, 4 GB in float32

Encode = Callable[[Tensor, range], Mapping[str, Tensor]]
"""(views (N, 3, H, W), their indices in the split) -> features (N, D) by name."""

MakeView = Callable[[Tensor, range, View | None, int], Tensor]
"""(pixels (N, 3, H, W) uint8, their indices in the split, augmentation, epoch) -> views (N, 3, H, W)."""

Table = dict[str, dict[str, dict[str, float]]]
"""Accuracies in per cent: {protocol: {encoder: {"top1": ..., "top3": ...}}}."""


@dataclass(frozen=True)
class _Cell:
    """One cell of the table under way: a protocol applied to an encoder, by name, and the key of its features."""

    protocol: Protocol
    encoder: str
    key: tuple[str, str, bool]
    classifier: Classifier


def judge(experiment: Experiment, encoders: Mapping[str, Encode], protocols: list[Protocol]) -> Table:
    """Collective. Accuracies of encoders on the experiment's test images."""
    config, views = experiment.config, experiment.views

    def make_view(pixels: Tensor, indices: range, view: View | None, epoch: int) -> Tensor:
        if view is None:
            return views.evaluation(pixels)
        return views.augmented(pixels, view_draw(config.seed, indices, "probe view", epoch), view)

    assert experiment.test is not None, "images that are judged have labels"
    return accuracy_table(
        encoders,
        experiment.train,
        experiment.test,
        make_view,
        protocols,
        num_classes=len(experiment.info.classes),
        batch_size=config.evaluation.batch_size,
        source=lambda: generator(config.seed, "probe"),
        device=experiment.device,
    )


def accuracy_table(
    encoders: Mapping[str, Encode],
    train: Images,
    test: Images,
    make_view: MakeView,
    protocols: list[Protocol],
    *,
    num_classes: int,
    batch_size: int,
    source: Callable[[], torch.Generator],
    device: torch.device,
) -> Table:
    """Collective. Accuracies of encoders under protocols, which share each pass over the views.

    An encoder that lacks a protocol's features is left out under it.

    Args:
        source: makes each classifier's source of randomness, the same for all.
    """
    wanted = list(dict.fromkeys((protocol.features, protocol.normalize) for protocol in protocols))

    def extract(split: Images, view: View | None, epoch: int) -> Features:
        def encode(pixels: Tensor, indices: range) -> Features:
            batch = make_view(pixels, indices, view, epoch)
            features: Features = {}
            for name, encoder in encoders.items():
                found = encoder(batch, indices)
                for kind, normalize in wanted:
                    if kind in found:
                        values = found[kind].float()
                        features[name, kind, normalize] = F.normalize(values, dim=1) if normalize else values
            return features

        return extract_features(encode, split, batch_size, device)

    assert train.labels is not None and test.labels is not None, "images that are judged have labels"
    train_labels, test_labels = train.labels.to(device), test.labels.to(device)
    queries = extract(test, None, 0)
    table: Table = {str(protocol): {} for protocol in protocols}
    for view in unique([protocol.view for protocol in protocols]):
        cells = [
            _Cell(protocol, name, key, protocol.classifier(queries[key].shape[1], num_classes, source(), device))
            for protocol in protocols
            for name in encoders
            if protocol.view == view and (key := (name, protocol.features, protocol.normalize)) in queries
        ]
        features: Features = {}
        for epoch in range(max((cell.protocol.epochs for cell in cells), default=0)):
            if epoch == 0 or view is not None:  # views that are not augmented are the same in each epoch
                features = {}  # frees the last epoch's before the next takes as much memory
                features = extract(train, view, epoch)
            for cell in cells:
                cell.classifier.train_epoch(features[cell.key], train_labels)
                if epoch == cell.protocol.epochs - 1:
                    scores = cell.classifier.scores(queries[cell.key])
                    table[str(cell.protocol)][cell.encoder] = topk_accuracy(scores, test_labels)
            cells = [cell for cell in cells if epoch < cell.protocol.epochs - 1]  # frees those that are done
    return table


def unique(views: list[View | None]) -> list[View | None]:
    """Views that differ, in their order (they hold lists, and have no hash)."""
    return [view for i, view in enumerate(views) if view not in views[:i]]


def encode_with(experiment: Experiment, soda: SODA) -> Encode:
    """The features of `soda` for the judge: in evaluation mode, under the experiment's autocast.

    "z" and "pooled" of the encoder; features of the decoder if `evaluation.features` names them.
    """
    features = experiment.config.evaluation.features

    def encode(views: Tensor, indices: range) -> dict[str, Tensor]:
        soda.eval()
        with torch.no_grad(), autocast(experiment.device, experiment.amp_dtype):
            found = soda.encoder.features(views)
            if features.startswith("decoder."):
                found[features] = decoder_features(experiment, soda.decoder, views, indices, features)
        return found

    return encode


def decoder_features(experiment: Experiment, decoder: UNetDecoder, views: Tensor, indices: range, name: str) -> Tensor:
    """Activations of the decoder without a latent, averaged over the pixels: views (N, 3, H, W) -> (N, C) float32.

    The probe of Denoising Diffusion Autoencoders (Xiang et al. 2023), on a decoder that trains without a latent with
    probability `training.mask.latent_probability`. The noise belongs to a sample's index, in either split, and is the
    same each time.

    Args:
        name: decoder.<block>@<timestep>: the block whose activations are taken, and the timestep of the noise.
    """
    block, timestep = name.removeprefix("decoder.").split("@")
    x_start = experiment.views.denormalize(views) * 2 - 1
    noise = image_noise(views.shape[1:], indices, experiment.config.seed, "features", device=views.device)
    timesteps = torch.full((len(views),), int(timestep), device=views.device)
    z = torch.zeros(len(views), experiment.config.encoder.latent_dim, device=views.device)
    x_t = experiment.diffusion.q_sample(x_start, timesteps, noise)
    return decoder.features(x_t, timesteps, z, block).float().mean(dim=(2, 3))


@torch.no_grad()
def settled(experiment: Experiment, soda: SODA) -> SODA:
    """`soda` with the BatchNorm statistics of forward passes over source views in training mode; shares the decoder.

    Each process sees whole batches: split ones would give numbers that depend on how many processes there are.
    """
    encoder = copy.deepcopy(soda.encoder).train()
    positions = range(experiment.config.training.batch_size)
    steps = range(SETTLING_PASSES)
    for step, pixels in zip(steps, read_pixels(experiment, ((step, positions) for step in steps)), strict=True):
        encoder(draw_source(experiment, pixels, step, positions))
    return SODA(encoder, soda.decoder)


def raw_pixels(views: Tensor, num_images: int) -> Tensor:
    """(N, 3, H, W) -> (N, 3 * size * size), averaged down to 32 px, or to less for a data set of very many images."""
    size = min(views.shape[-1], 32)
    while 3 * size**2 * num_images > MAX_RAW_PIXELS:
        size //= 2
    return F.adaptive_avg_pool2d(views, size).flatten(1)


def baselines(experiment: Experiment) -> dict[str, Encode]:
    """The model as this run started it, and the raw pixels under the name of the config's features.

    BatchNorm's running statistics start at mean 0 and variance 1. They are settled first: without that, the untrained
    encoder would be too weak a baseline.
    """
    untrained = settled(experiment, initial_soda(experiment.config, experiment.device))
    features = experiment.config.evaluation.features
    return {
        "untrained": encode_with(experiment, untrained),
        "raw pixels": lambda views, _: {features: raw_pixels(views, len(experiment.train))},
    }
