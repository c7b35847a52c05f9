"""Distribution of the features: alignment and uniformity on the unit hypersphere, and effective rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.measures.base import Measure, Measured, Rows

if TYPE_CHECKING:
    from evaluation.measures.subjects import Subjects


class Uniformity(Measure):
    """Alignment and uniformity (Wang & Isola, ICML 2020), and effective rank (RankMe, Garrido et al., ICML 2023).

    Alignment is the mean of |x - y|^2 over pairs of two views x, y of an image. Uniformity is the logarithm of the mean
    of exp(-2 |x - y|^2) over pairs of different images. Both are lower for features that are better in this respect.
    These features have length 1. The effective rank is that of the images' features without augmentation. Test images
    are used, or training images if there are no test images. train.py logs the same three at each evaluation, always of
    z, with the effective rank of at most 10,000 images.
    """

    name = "uniformity"
    meaning = "alignment of two views of an image, uniformity on the hypersphere, and effective rank"
    cost = "encodes the test images, and two views of at most 2000 of them"

    def measure(self, subjects: Subjects) -> Measured:
        from evaluation.hypersphere import MAX_IMAGES, alignment_and_uniformity
        from evaluation.spectrum import effective_rank

        experiment = subjects.experiment
        features = subjects.train if experiment.test is None else subjects.test
        found = alignment_and_uniformity(experiment, subjects.encoders, subjects.feature)
        rows: Rows = {
            "alignment (lower is better)": {name: {"value": each} for name, (each, _) in found.items()},
            "uniformity (lower is better)": {name: {"value": each} for name, (_, each) in found.items()},
            "effective rank": {name: {"value": effective_rank(each)} for name, each in features.items()},
        }
        images = "training" if experiment.test is None else "test"
        protocol = (
            f"alignment and uniformity (t = 2) of unit {subjects.feature}: two source views of at most {MAX_IMAGES} "
            f"{images} images; effective rank (RankMe) of {subjects.feature}, all {images} images without augmentation"
        )
        return Measured(protocol, rows, decimals=3)
