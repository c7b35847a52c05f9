"""Identity across views: how well features identify an object that is seen from another side."""

import logging
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.cameras import azimuth_of
from evaluation.knn import MAX_DISTANCES, true_float32
from evaluation.logistic_regression import LogisticProbe
from evaluation.measures.base import Measured, Rows
from evaluation.novel_views.scenes import SAME
from experiment.opening import Experiment
from utils.distributed.collectives import all_reduce
from utils.distributed.processes import my_range
from utils.randomness import generator

APART = 45.0  # degrees between two views of an object for the identity across views

logger = logging.getLogger(__name__)


def score_identity(experiment: Experiment, features: Mapping[str, Tensor], feature: str) -> Measured:
    """Collective. Returns how well features identify the objects of the test images, across views.

    - k-NN: share of the images whose nearest image, by cosine, shows the same object. Images of this object that are
      less than 45 degrees of azimuth away do not take part.
    - Probe: logistic regression, trained on the views with azimuths from 0 to 180 degrees, tested on the others.

    A row that cannot be measured is left out, and the log says why.

    Args:
        features: (N, D) features of the test images on the device, by encoder.
        feature: name of the features, for the protocol.
    """
    test, device = experiment.test, experiment.device
    assert test is not None and test.cameras is not None and test.objects is not None
    azimuth = azimuth_of(test.cameras.double()).rad2deg().float().to(device)
    azimuth = (azimuth + SAME) % 360 - SAME  # from -SAME, so that 360 minus a rounding error is about 0
    numbers = test.objects.unique(return_inverse=True)[1].to(device)
    count = int(numbers.max()) + 1
    front = azimuth < 180 - SAME
    shown = numbers[front].unique()
    judged = ~front & torch.isin(numbers, shown)
    rows: Rows = {}
    protocol = [f"object of a view among {count} objects of the test images"]
    if count < 2:
        logger.info("identity: not measured, because all test images show one object")
        return Measured(protocol[0], rows)
    nearest = {name: _share_of_nearest(each, numbers, azimuth) for name, each in features.items()}
    if any(map(math.isnan, nearest.values())):
        logger.info("identity: k-NN is left out, because no object has views %g degrees apart", APART)
    else:
        protocol.append(
            f"k-NN of unit {feature}: views of the same object less than {APART:g} degrees away are left out"
        )
        rows["k-NN k=1 (%)"] = {name: {"value": value} for name, value in nearest.items()}
    if judged.any() and len(shown) > 1:
        protocol.append(
            f"probe of standardised {feature}: logistic regression, trained at azimuths 0-180, tested at the others"
        )
        rows["probe (%)"] = {}
        for name, each in features.items():
            source = generator(experiment.config.seed, "identity")
            probe = LogisticProbe(each.shape[1], count, generator=source, device=device)
            probe.train_epoch(each[front].float(), numbers[front])
            hits = probe.scores(each[judged].float()).argmax(dim=1) == numbers[judged]
            rows["probe (%)"][name] = {"value": 100 * hits.float().mean().item()}
    else:
        logger.info("identity: the probe is left out, because it needs views with azimuths below and above 180 degrees")
    return Measured("; ".join(protocol), rows)


def _share_of_nearest(features: Tensor, numbers: Tensor, azimuth: Tensor) -> float:
    """Collective. Returns the share (%) of images whose nearest image, of those that take part, shows their object.

    NaN if no object has views that are far enough apart. The ranks divide the images.

    Args:
        numbers: (N,) number of the object of each image.
        azimuth: (N,) in degrees.
    """
    unit = F.normalize(features.float())
    tally = torch.zeros(2, device=unit.device)  # right answers, and images that can be judged
    size = max(1, MAX_DISTANCES // len(unit))
    with true_float32():
        for block in my_range(-(-len(unit) // size)):
            here = slice(block * size, (block + 1) * size)
            same = numbers[here, None] == numbers
            far = same & (((azimuth[here, None] - azimuth + 180) % 360 - 180).abs() >= APART - SAME)
            nearest = (unit[here] @ unit.T).masked_fill(same & ~far, -2).argmax(dim=1)
            can_be_right = far.any(dim=1)
            right = can_be_right & (numbers[nearest] == numbers[here])
            tally += torch.stack([right.sum(), can_be_right.sum()])
    right_answers, judged = all_reduce(tally).tolist()
    return 100 * right_answers / judged if judged else math.nan
