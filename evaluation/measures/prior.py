"""Latents drawn from a prior over z, against latents of real images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.measures.base import Inputs, Measure, Measured, Rows, too_few

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.measures.subjects import Subjects
    from experiment.opening import Experiment

MIN_LATENTS, MAX_LATENTS = 10, 5000  # in each sample
REAL = "real images"


class Prior(Measure):
    """Fréchet distance and two-sample test of latents drawn from each prior over z, against latents of real images.

    `distances.py` has the formulas. All samples have the same number of latents, so that they can be compared. Against
    the training latents, a prior that repeats them is perfect; against the test latents, it is not. The column "real
    images" compares training and test latents with each other: a prior cannot be expected to be closer than that. The
    distance to the nearest training latent shows repetitions: it should not be below that of the test latents.
    """

    name = "prior"
    meaning = "latents drawn from the priors over z against latents of real images: Fréchet distance, two-sample test"
    cost = "encodes both splits, draws latents, then one support-vector machine per pair of samples"

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        return too_few(experiment, MIN_LATENTS)

    def measure(self, subjects: Subjects) -> Measured:
        import torch

        from evaluation.distances import FOLDS, frechet_distance, two_sample_accuracy
        from evaluation.knn import neighbour_distances
        from utils.distributed.collectives import map_over_ranks
        from utils.randomness import derive_seed, generator

        codec, experiment = subjects.model, subjects.experiment
        real = {"training": codec.train_z} | ({} if experiment.test is None else {"test": codec.test_z})
        count = min(MAX_LATENTS, *(len(z) for z in real.values()))
        samples: dict[str, Tensor] = {}
        for split, z in real.items():
            order = torch.randperm(len(z), generator=generator(codec.seed, f"{split} latents"))
            samples[split] = z[order[:count].to(z.device)]
        drawn = {name: draw(count, codec.seed) for name, draw in subjects.priors.items()}

        pairs = {(name, split): (z, samples[split]) for name, z in drawn.items() for split in samples}
        if "test" in samples:
            pairs[REAL, "training"] = samples["test"], samples["training"]
        seed = derive_seed(codec.seed, "two-sample test") % 2**32

        def compare(pair: tuple[str, str]) -> tuple[float, float]:
            return frechet_distance(*pairs[pair]), two_sample_accuracy(*pairs[pair], seed)

        found = dict(zip(pairs, map_over_ranks(compare, list(pairs)), strict=True))
        if "test" in samples:
            found[REAL, "test"] = found[REAL, "training"]
        rows: Rows = {}
        for place, title in enumerate(("Fréchet distance", "two-sample accuracy (%)")):
            for split in samples:
                cells = {name: {"value": found[name, split][place]} for name, of in found if of == split}
                rows[f"{title} to {split} latents"] = cells
        compared = drawn | ({REAL: samples["test"]} if "test" in samples else {})
        rows["median distance to the nearest training latent"] = {
            name: {"value": neighbour_distances(codec.train_z, z, 1).median().item()} for name, z in compared.items()
        }
        protocol = (
            f"{count} latents of each prior against as many of real images; two-sample test: {FOLDS}-fold accuracy of "
            "a support-vector machine, 50 if the samples cannot be told apart"
        )
        return Measured(protocol, rows, decimals=2)
