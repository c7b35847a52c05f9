"""The encoders that measures are applied to, and their features."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from datasets.images import DatasetError, Images
from datasets.sources import open_unlabelled
from evaluation.encoders import Encode, baselines, encode_with
from evaluation.features import Features, Subset, extract_features
from evaluation.protocols import config_protocols
from evaluation.shapes import Shapes
from experiment.opening import Experiment
from model.soda import SODA
from utils.distributed.collectives import SharedError, first_on_each_node
from utils.distributed.processes import local_world_size

NUM_SHAPES = 2000

MakeView = Callable[[Tensor, range], Tensor]
"""Function (pixels (N, 3, H, W) uint8, their indices) -> views (N, 3, S, S) for an encoder."""


@dataclass(frozen=True)
class Subjects:
    """Encoders with names, of which one kind of features is measured.

    Attributes:
        encoders: {name: encoder}; each returns features of the name `feature`.
        feature: name of the features, such as "z" or "z@500".
        others: name and images of another data set, for measures that compare the two.
    """

    experiment: Experiment
    encoders: Mapping[str, Encode]
    feature: str
    others: tuple[str, Images] | None = None

    @cached_property
    def train(self) -> dict[str, Tensor]:
        """Collective at the first use. Features (N, D) of the training images, without augmentation, by encoder."""
        return self.features(self.experiment.train)

    @cached_property
    def test(self) -> dict[str, Tensor]:
        """Collective at the first use. Features of the test images, as `train`."""
        assert self.experiment.test is not None, "the measure needs test images"
        return self.features(self.experiment.test)

    @property
    def train_labels(self) -> Tensor:
        """Labels (N,) of the training images, on the device."""
        assert self.experiment.train.labels is not None, "the measure needs labels"
        return self.experiment.train.labels.to(self.experiment.device)

    @property
    def test_labels(self) -> Tensor:
        """Labels (N,) of the test images, on the device."""
        assert self.experiment.test is not None and self.experiment.test.labels is not None, "the measure needs labels"
        return self.experiment.test.labels.to(self.experiment.device)

    def features(self, images: Images | Subset, make_view: MakeView | None = None) -> dict[str, Tensor]:
        """Collective. Returns the features (N, D) float32 of `images` on the device, by encoder.

        Raises SharedError if a feature is not finite.

        Args:
            make_view: makes the views that are encoded; None: views without augmentation.
        """

        def encode(pixels: Tensor, indices: range) -> Features:
            views = make_view(pixels, indices) if make_view else self.experiment.views.evaluation(pixels)
            return {name: encoder(views, indices)[self.feature].float() for name, encoder in self.encoders.items()}

        batch_size, device = self.experiment.config.evaluation.batch_size, self.experiment.device
        found = extract_features(encode, images, batch_size, device)
        features = {name: found[name] for name in self.encoders}
        for name, each in features.items():
            if not each.isfinite().all():
                raise SharedError(
                    f"{self.feature} of the encoder {name!r} is not finite, so it cannot be measured: use a checkpoint "
                    "of a run that has not diverged"
                )
        return features


def subjects_of(
    experiment: Experiment, soda: SODA, timestep: int | None, others: tuple[str, Images] | None = None
) -> Subjects:
    """Collective. Returns the trained encoder of `soda`, the untrained one, and the raw pixels, as `baselines` does.

    The features are those that `evaluation.features` names.

    Args:
        timestep: timestep of a time-dependent encoder.
    """
    if timestep is not None:
        judged = experiment.config.evaluation.model_copy(update={"timesteps": [timestep]})
        experiment = replace(experiment, config=experiment.config.model_copy(update={"evaluation": judged}))
    encoders = {"trained": encode_with(experiment, soda), **baselines(experiment)}
    return Subjects(experiment, encoders, config_protocols(experiment.config)[0].feature_name, others)


def open_others(folder: Path | None, experiment: Experiment) -> tuple[str, Images]:
    """Collective. Returns a name and the images of `folder`, decoded as the experiment's; None: synthetic shapes.

    Raises DatasetError if the folder has no images that can be used.
    """
    config = experiment.config
    if folder is None:
        return "synthetic shapes", Shapes(NUM_SHAPES, config.encoder_size, config.seed)
    if not folder.is_dir():
        raise DatasetError(f"no folder {folder}: set --others to a folder with images")
    images = first_on_each_node(lambda: open_unlabelled(folder, config.data, local_world_size()))
    return folder.resolve().name, images


def standardized(features: Tensor, reference: Tensor) -> Tensor:
    """Standardises features (N, D) by mean and standard deviation of reference features (M, D).

    Features that are constant in the reference become 0.
    """
    std, mean = torch.std_mean(reference, dim=0, correction=0)
    # The standard deviation of a constant feature may be a rounding error instead of 0.
    varies = std > 10 * torch.finfo(std.dtype).eps * mean.abs()
    return (features - mean) * torch.where(varies, 1 / std, 0)
