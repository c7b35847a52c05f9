"""Generated images against real images: distances in a feature space, and the distance to the training images."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from evaluation.measures.base import NUM_SAMPLES, Inputs, Measure, Measured, Rows, too_few

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from evaluation.measures.subjects import Subjects
    from experiment.opening import Experiment

logger = logging.getLogger(__name__)

MAX_REFERENCE = 10_000  # training images in the Fréchet and kernel distances
MIN_IMAGES = 10
CHUNK = 100  # generated images per pass of a network
COST = f"samples at most {NUM_SAMPLES} images (--num_samples) of each prior, and as many from z of test images"


class _DistanceOfSamples(Measure):
    """Fréchet and kernel distance of generated images to training images, in the feature space of a network.

    `distances.py` has the formulas. The columns are the sources of z: each prior, and z of test images, which shows the
    share of the decoder alone. "test images" is the distance of as many real test images, the lowest value that can be
    expected.
    """

    standardizes: ClassVar[bool] = False  # True: features are standardised by those of the training images

    @abstractmethod
    def network(self, inputs: Inputs) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """Returns name and function pixels (N, 3, D, D) uint8 -> features (N, F), or None if there is no network."""

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        return too_few(experiment, MIN_IMAGES)

    def measure(self, subjects: Subjects) -> Measured:
        import torch

        from evaluation.distances import frechet_distance, kernel_distance
        from evaluation.features import random_subset
        from evaluation.measures.subjects import standardized

        found = self.network(subjects.inputs)
        assert found is not None, "the measure needs a network"
        (title, encode), experiment = found, subjects.experiment
        chosen = random_subset(experiment.train, MAX_REFERENCE, experiment.config.seed, "reference images")
        reference = subjects.images(chosen, encode)
        compared = {
            name: torch.cat([encode(part) for part in pixels.split(CHUNK)])
            for name, pixels in subjects.generated.items()
        }
        if subjects.real is not None:
            compared["test images"] = subjects.images(subjects.real, encode)
        if self.standardizes:
            compared = {name: standardized(features, reference) for name, features in compared.items()}
            reference = standardized(reference, reference)
        width = reference.shape[1]
        if subjects.num_samples < width:
            logger.info(
                "%s: the Fréchet distance of %d images in %d features is far too high: compare the columns only",
                *(self.name, subjects.num_samples, width),
            )
        rows: Rows = {
            "Fréchet distance": {n: {"value": frechet_distance(f, reference)} for n, f in compared.items()},
            "kernel distance x 1000": {n: {"value": 1000 * kernel_distance(f, reference)} for n, f in compared.items()},
        }
        protocol = (
            f"distance of {subjects.num_samples} images to {len(chosen)} training images, features of {title}; "
            f"{subjects.sampling}"
        )
        return Measured(protocol, rows, decimals=2)


class FID(_DistanceOfSamples):
    """FID (Heusel et al., NeurIPS 2017) and KID (Bińkowski et al., ICLR 2018) of generated images.

    The features are the 2048 of the Inception network of the original FID, by torch-fidelity, which also resizes the
    images. With fewer than 50,000 images, FID is higher than published values, and cannot be compared with them.
    """

    name = "fid"
    meaning = "FID and KID of generated images, by Inception weights of --inception"
    cost = f"{COST}; then one pass of Inception over these, the test images and {MAX_REFERENCE} training images"
    needs = ("torch_fidelity",)

    def network(self, inputs: Inputs) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        return None if inputs.inception is None else ("Inception (FID, KID)", inputs.inception)

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        needed = "it needs torch-fidelity's Inception weights, which are not downloaded: add --inception FILE"
        return super().obstacle(experiment, inputs) if inputs.inception else needed


class FeatureDistance(_DistanceOfSamples):
    """Fréchet and kernel distance of generated images in the feature space of another encoder of this program.

    The features are the encoder's z, of the images at its own size, standardised by mean and standard deviation of the
    training images: z has no natural unit, and the kernel distance depends on it. An encoder that was trained on the
    same kind of images needs no download. Do not use the encoder of the generator itself, which makes images that this
    encoder finds right.
    """

    name = "feature_distance"
    standardizes = True
    meaning = "Fréchet and kernel distance of generated images, in z of the encoder of --features_of"
    cost = f"{COST}; then one pass of the encoder over these, the test images and {MAX_REFERENCE} training images"

    def network(self, inputs: Inputs) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        return inputs.other_encoder

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        needed = "it needs another encoder: add --features_of CHECKPOINT"
        return super().obstacle(experiment, inputs) if inputs.other_encoder else needed


class Memorization(Measure):
    """Distance of generated images to their nearest training image, against that of test images.

    The distance is the root of the mean squared difference of the values in [0, 1], of images reduced to at most 32 px.
    Copies of training images have smaller distances than test images have. "within the 1st percentile of test
    images" is the percentage of images whose distance is at most the 1st percentile of the test images' distances: 1 is
    expected without copies.
    """

    name = "memorization"
    meaning = "distance of generated images to their nearest training image, against that of test images"
    cost = f"{COST}; then one search among all training images"

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        return "it needs test images" if experiment.test is None else None

    def measure(self, subjects: Subjects) -> Measured:
        from evaluation.encoders import raw_pixels
        from evaluation.knn import neighbour_distances

        experiment = subjects.experiment
        num_train, device = len(experiment.train), experiment.device

        def reduced(pixels: Tensor) -> Tensor:
            return raw_pixels(pixels.to(device).float() / 255, num_train)

        bank = subjects.images(experiment.train, reduced)
        compared = {name: reduced(pixels) for name, pixels in subjects.generated.items()}
        assert subjects.real is not None, "the measure needs test images"
        compared["test images"] = subjects.images(subjects.real, reduced)
        distances = {
            name: neighbour_distances(bank, images, 1)[:, 0] / bank.shape[1] ** 0.5 for name, images in compared.items()
        }
        close = distances["test images"].quantile(0.01)
        rows: Rows = {
            "median distance x 100": {n: {"value": 100 * each.quantile(0.5).item()} for n, each in distances.items()},
            "smallest distance x 100": {n: {"value": 100 * each.min().item()} for n, each in distances.items()},
            "within the 1st percentile of test images (%)": {
                name: {"value": 100 * (each <= close).float().mean().item()} for name, each in distances.items()
            },
        }
        protocol = (
            f"distance of {subjects.num_samples} images to the nearest of {num_train} training images: root mean "
            f"squared difference of values in [0, 1]; {subjects.sampling}"
        )
        return Measured(protocol, rows, decimals=2)
