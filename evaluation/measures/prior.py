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
FRECHET, SVM = "Fréchet distance", "two-sample accuracy (%)"
NEAREST = "median distance to the nearest training latent"


class Prior(Measure):
    """Fréchet distance and two-sample test of latents drawn from each prior over z, against latents of real images.

    `distances.py` has the formulas. There are 5 draws from each prior, each of as many latents as there are test images
    (without test images, training images), at most 5000. Fréchet distances are those to all training latents and to as
    many test latents. The two-sample test compares a draw with a random sample of as many training latents, drawn anew
    each time, and with the test latents. It uses at most 1000 of each. Against the training latents, a prior that
    repeats them is perfect; against the test latents, it is not. The column "real images" has the test latents in place
    of a draw. Against the test latents, it has samples of training latents. The distance to the nearest training latent
    shows repetitions: it should not be below that of the test latents.
    """

    name = "prior"
    meaning = "latents drawn from the priors over z against latents of real images: Fréchet distance, two-sample test"
    cost = f"encodes both splits, draws latents {DRAWS} times, then one support-vector machine per pair of samples"

    def obstacle(self, experiment: Experiment, inputs: Inputs) -> str | None:
        return too_few(experiment, MIN_LATENTS)

    def measure(self, subjects: Subjects) -> Measured:
        from evaluation.distances import FOLDS, MAX_TESTED, frechet_distance, two_sample_accuracy
        from evaluation.knn import neighbour_distances
        from utils.distributed.collectives import map_over_ranks
        from utils.randomness import derive_seed

        codec, experiment = subjects.model, subjects.experiment
        train, test = codec.train_z, None if experiment.test is None else codec.test_z
        count = min(MAX_LATENTS, len(train), len(train if test is None else test))
        seeds = [derive_seed(codec.seed, "draws of latents", i) for i in range(DRAWS)]
        drawn = {name: [draw(count, seed) for seed in seeds] for name, draw in subjects.priors.items()}
        of_train = [_sample(train, count, seed, "training latents") for seed in seeds]
        of_test = None if test is None else _sample(test, count, codec.seed, "test latents")
        svm_seed = derive_seed(codec.seed, "two-sample test") % 2**32

        def classify(a: Tensor, b: Tensor) -> float:
            return two_sample_accuracy(a, b, svm_seed)

        def nearest(a: Tensor, b: Tensor) -> float:
            return neighbour_distances(b, a, 1).quantile(0.5).item()

        frechet, tested = ([f"{title} to {each} latents" for each in ("training", "test")] for title in (FRECHET, SVM))
        tasks: list[tuple[str, str, Callable[[Tensor, Tensor], float], Tensor, Tensor]] = []
        for i, of_split in enumerate(of_train):  # tasks of all kinds alternate, because ranks get consecutive ones
            for name, draws in drawn.items():
                tasks.append((frechet[0], name, frechet_distance, draws[i], train))
                tasks.append((tested[0], name, classify, draws[i], of_split))
                tasks.append((NEAREST, name, nearest, draws[i], train))
                if of_test is not None:
                    tasks.append((frechet[1], name, frechet_distance, draws[i], of_test))
                    tasks.append((tested[1], name, classify, draws[i], of_test))
            if of_test is not None:
                tasks.append((frechet[1], REAL, frechet_distance, of_split, of_test))
                tasks.append((tested[0], REAL, classify, of_split, of_test))
        if of_test is not None:
            tasks.append((frechet[0], REAL, frechet_distance, of_test, train))
            tasks.append((NEAREST, REAL, nearest, of_test, train))
        found: dict[str, dict[str, list[float]]] = {row: {} for row in (*frechet, *tested, NEAREST)}
        for (row, name, *_), value in zip(tasks, map_over_ranks(lambda t: t[2](t[3], t[4]), tasks), strict=True):
            found[row].setdefault(name, []).append(value)
        if of_test is not None:  # the same samples
            found[tested[1]][REAL] = found[tested[0]][REAL]
        rows: Rows = {row: {name: _cell(each) for name, each in of.items()} for row, of in found.items() if of}
        to_test = "" if of_test is None else f", and to {count} test latents"
        protocol = (
            f"mean ± standard deviation of {DRAWS} draws of {count} latents from each prior (real images: of {DRAWS} "
            f"samples of training latents); Fréchet distance to all {len(train)} training latents{to_test}; two-sample "
            f"test of {min(count, MAX_TESTED)} latents of each sample: {FOLDS}-fold accuracy of a support-vector "
            "machine, 50 if the samples cannot be told apart"
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
