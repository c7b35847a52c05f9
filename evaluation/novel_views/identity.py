"""Identity across views: how well features tell objects apart that are seen from other sides."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.cameras import azimuth_of
from evaluation.logistic_regression import LogisticProbe
from evaluation.measures.base import Measured, Rows
from evaluation.novel_views.scenes import SAME
from experiment.opening import Experiment
from utils.randomness import generator

APART = 45.0  # degrees between two views of an object for the identity across views
PART = 1024  # images per block of the matrix of cosines


def score_identity(experiment: Experiment, features: Mapping[str, Tensor], feature: str) -> Measured:
    """Returns how well features tell the objects of the test images apart, across views.

    - k-NN: share of the images whose nearest image, by cosine, shows the same object. Images of this object that are
      less than 45 degrees of azimuth away do not take part.
    - Probe: logistic regression, trained on the views with azimuths from 0 to 180 degrees, tested on the others.

    Args:
        feature: name of the features, for the protocol.
    """
    test = experiment.test
    assert test is not None and test.cameras is not None and test.objects is not None
    cameras, objects = test.cameras.double(), test.objects
    azimuth, device = azimuth_of(cameras).rad2deg() % 360, experiment.device
    numbers = objects.unique(return_inverse=True)[1]
    rows: Rows = {"k-NN k=1 (%)": {}, "probe (%)": {}}
    front = azimuth < 180 - SAME
    shown = numbers[front].unique()
    judged = ~front & torch.isin(numbers, shown)
    for name, each in features.items():
        unit = F.normalize(each.float()).cpu()
        hits: list[Tensor] = []
        for start in range(0, len(unit), PART):
            here = slice(start, start + PART)
            cosines = unit[here] @ unit.T
            same = numbers[here, None] == numbers
            turns = ((azimuth[here, None] - azimuth + 180) % 360 - 180).abs()
            far = same & (turns >= APART - SAME)
            nearest = cosines.masked_fill(same & ~far, -2).argmax(dim=1)
            hits.append((numbers[nearest] == numbers[here])[far.any(dim=1)])
        if numbers.max() > 0:  # with one object, every neighbour would be right
            rows["k-NN k=1 (%)"][name] = {"value": 100 * torch.cat(hits).float().mean().item()}
        if judged.any() and len(shown) > 1:
            source = generator(experiment.config.seed, "identity")
            probe = LogisticProbe(each.shape[1], int(numbers.max()) + 1, generator=source, device=device)
            probe.train_epoch(each[front.to(device)].float(), numbers[front].to(device))
            guesses = probe.scores(each[judged.to(device)].float()).argmax(dim=1).cpu()
            rows["probe (%)"][name] = {"value": 100 * (guesses == numbers[judged]).float().mean().item()}
    rows = {row: cells for row, cells in rows.items() if cells and all(map(_is_number, cells.values()))}
    protocol = (
        f"object of a view among {int(numbers.max()) + 1} objects of the test images: nearest view at least {APART:g} "
        f"degrees away, unit {feature}; logistic regression, azimuths 0-180 to the others"
    )
    return Measured(protocol, rows)


def _is_number(cell: dict[str, float]) -> bool:
    return not math.isnan(cell["value"])
