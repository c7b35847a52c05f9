"""Latents drawn from a prior over z, against latents of real images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaluation.measures.base import Cell, Inputs, Measure, Measured, Rows, mean_cell, too_few

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from evaluation.measures.subjects import Subjects
    from experiment.opening import Experiment

MIN_LATENTS, MAX_LATENTS = 10, 5000  # in each sample
DRAWS = 5  # from each prior
REAL = "real images"


class Prior(Measure):
    """Fréchet distance and two-sample test of latents drawn from each prior over z, against latents of real images.

    `distances.py` has the formulas. There are 5 draws from each prior, each of as many latents as there are test images
    (at most 5000). Fréchet distances are those to all training latents and to the test latents. The two-sample test
    compares a draw with as many training latents, other ones for each draw, and with the test latents. Against the
    training latents, a prior that repeats them is perfect; against the test latents, it is not. The column "real
    images" has the test latents in place of a draw, and against the test latents it has samples of training latents.
    The distance to the nearest training latent shows repetitions: it should not be below that of the test latents.
    """

    name = "prior"
    meaning = "latents drawn from the priors over z against latents of real images: Fréchet distance, two-sample test"
    cost = f"encodes both splits, draws latents {DRAWS} times, then one support-vector machine per pair of samples"

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        return too_few(experiment, MIN_LATENTS)

    def measure(self, subjects: Subjects) -> Measured:
        from evaluation.distances import FOLDS, frechet_distance, two_sample_accuracy
        from evaluation.knn import neighbour_distances
        from utils.distributed.collectives import map_over_ranks
        from utils.randomness import derive_seed

        codec, experiment = subjects.model, subjects.experiment
        train, test = codec.train_z, None if experiment.test is None else codec.test_z
        count = min(MAX_LATENTS, len(train), len(train if test is None else test))
        seeds = [derive_seed(codec.seed, "draws of latents", i) for i in range(DRAWS)]
        samples = {name: [draw(count, seed) for seed in seeds] for name, draw in subjects.priors.items()}
        of_train = [_sample(train, count, seed, "training latents") for seed in seeds]
        of_test = None if test is None else _sample(test, count, codec.seed, "test latents")

        svm_seed = derive_seed(codec.seed, "two-sample test") % 2**32

        def classify(a: Tensor, b: Tensor) -> float:
            return two_sample_accuracy(a, b, svm_seed)

        comparisons: list[tuple[str, str, Callable[[Tensor, Tensor], float], Tensor, Tensor]] = []
        for title, compare in (("Fréchet distance", frechet_distance), ("two-sample accuracy (%)", classify)):
            to_train, to_test = (f"{title} to {split} latents" for split in ("training", "test"))
            for name, drawn in samples.items():
                known = of_train if compare is classify else [train] * DRAWS
                comparisons += [(to_train, name, compare, *pair) for pair in zip(drawn, known, strict=True)]
            if of_test is not None:
                known = of_train if compare is classify else [train]
                comparisons += [(to_train, REAL, compare, of_test, each) for each in known]
                for name, drawn in (samples | {REAL: of_train}).items():
                    comparisons += [(to_test, name, compare, each, of_test) for each in drawn]
        values = map_over_ranks(lambda each: each[2](each[3], each[4]), comparisons)
        found: dict[str, dict[str, list[float]]] = {}
        for (row, name, *_), value in zip(comparisons, values, strict=True):
            found.setdefault(row, {}).setdefault(name, []).append(value)
        rows: Rows = {row: {name: _cell(each) for name, each in cells.items()} for row, cells in found.items()}
        medians = {
            name: [neighbour_distances(train, each, 1).median().item() for each in drawn]
            for name, drawn in (samples | ({} if of_test is None else {REAL: [of_test]})).items()
        }
        rows["median distance to the nearest training latent"] = {name: _cell(each) for name, each in medians.items()}
        protocol = (
            f"mean ± standard deviation of {DRAWS} draws of {count} latents from each prior; Fréchet distance to all "
            f"{len(train)} training latents; two-sample test: {FOLDS}-fold accuracy of a support-vector machine, 50 if "
            "the samples cannot be told apart"
        )
        return Measured(protocol, rows, decimals=2)


def _sample(latents: Tensor, count: int, seed: int, purpose: str) -> Tensor:
    """Returns `count` different rows of latents (N, D), drawn at random."""
    import torch

    from utils.randomness import generator

    order = torch.randperm(len(latents), generator=generator(seed, purpose))[:count]
    return latents[order.to(latents.device)]


def _cell(values: list[float]) -> Cell:
    """Returns the mean of values, with their deviation if there are several."""
    return mean_cell(values) if len(values) > 1 else {"value": values[0]}
