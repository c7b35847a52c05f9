"""Alignment and uniformity of features on the unit hypersphere (Wang & Isola, ICML 2020, arXiv 2005.10242)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.encoders import Encode
from evaluation.features import Features, extract_features, random_subset
from experiment.batch import view_draw
from experiment.opening import Experiment

MAX_IMAGES = 2000  # the pairs of these images are enough for three digits of both


def alignment(first: Tensor, second: Tensor) -> float:
    """Returns the mean of |x - y|^2 over pairs (x, y) of two views of an image: 0 if both have the same features.

    Args:
        first, second: (N, D) features of the two views. They are scaled to length 1.
    """
    return (F.normalize(first.cpu()) - F.normalize(second.cpu())).square().sum(dim=1).mean().item()


def uniformity(features: Tensor) -> float:
    """Returns log mean exp(-2 |x - y|^2) over pairs of different images, from -4 (about uniform) to 0 (all equal).

    Args:
        features: (N, D) features. They are scaled to length 1.
    """
    return torch.pdist(F.normalize(features.cpu())).square().mul(-2).exp().mean().log().item()


def alignment_and_uniformity(
    experiment: Experiment, encoders: Mapping[str, Encode], feature: str
) -> dict[str, tuple[float, float]]:
    """Collective. Returns (alignment, uniformity) of each encoder on test images, or on training images without test.

    At most MAX_IMAGES images are used, the same in each call. The two views of an image are augmented as the source
    views of the training are, without noise. Uniformity is that of the first views' features, as in the paper.

    Args:
        feature: name of the features.
    """
    images = experiment.train if experiment.test is None else experiment.test
    seed, augmentation = experiment.config.seed, experiment.config.views.source
    chosen = random_subset(images, MAX_IMAGES, seed, "alignment images")

    def encode(pixels: Tensor, positions: range) -> Features:
        found: Features = {}
        for number in (0, 1):
            draw = view_draw(seed, positions, "alignment view", number)
            views = experiment.views.augmented(pixels, draw, augmentation)
            found |= {(name, number): encode(views, positions)[feature].float() for name, encode in encoders.items()}
        return found

    features = extract_features(encode, chosen, experiment.config.evaluation.batch_size, experiment.device)
    return {name: (alignment(features[name, 0], features[name, 1]), uniformity(features[name, 0])) for name in encoders}
