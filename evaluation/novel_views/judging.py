"""Generated views of test objects, their scores beside those of the baselines, and the tables of `test.py`.

A target is a test image, and its sources are other images of the same object. All ranks share the work.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from datasets.images import DatasetError
from evaluation.encoders import baselines, encode_with
from evaluation.features import Features, extract_features
from evaluation.measures.base import Measured, Rows
from evaluation.measures.recording import Record, report
from evaluation.novel_views.baselines import NEAREST, SOURCE, Baselines
from evaluation.novel_views.identity import score_identity
from evaluation.novel_views.scenes import NEAR, SAME, Scenes, Target, choose_targets
from evaluation.novel_views.similarity import MAX_PSNR, Masks, similarity
from evaluation.protocols import config_protocols
from experiment.batch import evaluation_view
from experiment.opening import Experiment
from experiment.posed import PosedPixels
from experiment.sampling import sample_from_views
from model.soda import SODA
from utils.cli import require
from utils.device import memory_for
from utils.distributed.collectives import all_reduce
from utils.distributed.processes import my_range

NUM_SAMPLING_STEPS = 50
BATCH = 32  # targets per batch; the same for any number of ranks, so that samples do not depend on that number
WHOLE_IMAGE = 0.98  # if the object fills more of the images than this, there is no background

NO_RING = "no object has views all around it at the height of a target"
ROWS = {
    "PSNR (dB)": "there are no targets",
    "PSNR of the object (dB)": "no target shows an object",
    "SSIM": "there are no targets",
    "SSIM of the object": "no target shows an object",
    "colour error of the object": "no target shows an object",
    "within 15 degrees (%)": NO_RING,
    "azimuth error (degrees)": NO_RING,
    "true side nearer than the opposite one (%)": "no target at the side has a view from the opposite side",
}
"""Rows of the table of `score_views`, in the order of the columns of the scores: {name: reason if no target has it}."""

OF_OBJECT = [row for row in ROWS if "object" in row]

Generate = Callable[[PosedPixels, range], Tensor]
"""Function (targets with their sources, positions) -> views (N, 3, D, D) in [-1, 1]. It may not use target pixels."""

logger = logging.getLogger(__name__)


def view_sampler(experiment: Experiment, soda: SODA, seed: int, num_sampling_steps: int) -> Generate:
    """Returns the function that samples the target views, from clean source views. It raises OutOfMemoryError."""

    def generate(pixels: PosedPixels, positions: range) -> Tensor:
        source_rays, target_rays = pixels.rays(experiment.config, experiment.device)
        seen = pixels.pixels[:, 1:]
        views = experiment.views.evaluation(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
        x_source = torch.cat([views, source_rays], dim=2)
        # The batch size is fixed, because samples depend on it.
        with memory_for(lambda: "use another device, or set evaluation.num_novel_views=0 to leave out novel views"):
            return sample_from_views(
                experiment, soda, x_source, target_rays, positions, seed, "novel view", num_sampling_steps
            )

    return generate


def generate_all(generate: Generate, pixels: PosedPixels, experiment: Experiment) -> Tensor:
    """Collective. Returns the views (N, 3, D, D) of all targets, on the device. The ranks divide the batches."""
    count, size, device = len(pixels.pixels), experiment.config.decoder_size, experiment.device
    out = torch.zeros(count, 3, size, size, device=device)
    for part in my_range(-(-count // BATCH)):
        positions = range(part * BATCH, min((part + 1) * BATCH, count))
        here = slice(positions.start, positions.stop)
        out[here] = generate(PosedPixels(pixels.pixels[here], pixels.cameras[here]), positions)
    return all_reduce(out)


def score_views(experiment: Experiment, models: Mapping[str, tuple[int, Generate]], count: int, seed: int) -> Measured:
    """Collective. Scores generated views of `count` test images, and the baselines.

    Args:
        models: {name: (number of sources, function that generates the views)}.
    """
    targets = choose_targets(Scenes(experiment), count, seed)
    masks, compared = Masks(targets), Baselines(targets)
    config, device, x_start = experiment.config, experiment.device, experiment.views.x_start

    def score(pixels: PosedPixels, positions: range) -> Features:
        here = targets[positions]
        truth = x_start(pixels.pixels[:, 0].to(device))
        answers = {
            name: generate(PosedPixels(pixels.pixels[:, : 1 + used], pixels.cameras[:, : 1 + used]), positions)
            for name, (used, generate) in models.items()
        }
        answers |= compared.views(here, x_start(pixels.pixels[:, 1].to(device)))
        answers = {name: images.float().clamp(-1, 1) for name, images in answers.items()}
        inside = masks.of(positions, truth)
        azimuths = _azimuth_scores(targets.scenes, here, answers)
        found: Features = {"inside": inside.float().mean(dim=(1, 2))[:, None]}
        for name, images in answers.items():
            scores = similarity(images, truth, inside, inside if masks.files else None)
            found[name] = torch.cat([scores, torch.tensor(azimuths[name], device=device)], dim=1)
        return found

    scores = extract_features(score, targets, BATCH, device)
    inside = scores.pop("inside")
    copies = int((scores[NEAREST][:, 0] >= MAX_PSNR).sum()) if NEAREST in scores else 0
    what = "new objects" if config.data.split == "objects" else "known objects"
    protocol = (
        f"novel views of {what}: {len(targets)} test images as targets, {config.decoder_size} px, "
        f"{num_steps(experiment)} DDIM steps, {config.sampling}; azimuth of the nearest true view at the same height: "
        f"{sum(bool(each.around) for each in targets)} targets; object: {masks.rule}"
        + (f"; {copies} targets equal a training image" if copies else "")
    )
    return Measured(protocol, _mean_rows(scores, [*models, *compared.names], inside), decimals=3)


def _mean_rows(scores: Features, names: list[str], inside: Tensor) -> Rows:
    """Returns the rows of the table, means over the targets that have a score. Logs which rows have no score.

    Args:
        scores: (N, rows) for each name. The baseline `source` is a true image. If its score is NaN, the target has no
            such score. NaN under another name means that the generated view is not finite.
        inside: (N, 1) share of each target's pixels that belong to the object.
    """
    no_background, num_empty = inside.mean().item() > WHOLE_IMAGE, int((inside == 0).sum())
    if no_background:
        logger.info(
            "novel views: the scores of the object are left out, because objects fill the images: without masks, the "
            "background has to be white"
        )
    elif num_empty:
        logger.info(
            "novel views: %d of the %d targets show no pixels of an object: the scores of the object leave them out",
            num_empty,
            len(inside),
        )
    rows: Rows = {}
    for column, (row, reason) in enumerate(ROWS.items()):
        if no_background and row in OF_OBJECT:
            continue
        kept = scores[SOURCE][:, column].isfinite()
        if kept.any():
            values = {name: scores[name][kept, column] for name in names}
            rows[row] = {name: {"value": value.mean().item()} for name, value in values.items()}
            failed = [name for name, value in values.items() if not value.isfinite().all()]
            if failed:
                logger.warning("novel views: %s is not a number, because views of %s are not", row, ", ".join(failed))
        else:
            logger.info("novel views: %s is left out, because %s", row, reason)
    return rows


def _azimuth_scores(
    scenes: Scenes, targets: Sequence[Target], answers: Mapping[str, Tensor]
) -> dict[str, list[list[float]]]:
    """Returns, by name, (100 if within 15 degrees else 0, azimuth error, 100 if the side is right else 0) per target.

    The azimuth of an image is that of the true view at the same height that is nearest to it, by squared error. Sides
    are views at azimuths of 45 to 135 and of 225 to 315 degrees. Other views have NaN, as have targets without views
    all around.

    Args:
        answers: {name: views (N, 3, D, D) of the targets}.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in answers}
    for position, target in enumerate(targets):
        if not target.around:
            for scores in found.values():
                scores.append([math.nan] * 3)
            continue
        around = torch.tensor(target.around)
        true_views, turns = scenes.x_start(around), scenes.turns(around, target.index)
        is_side = abs(float(scenes.azimuth[target.index]) % 180 - 90) <= 45 + SAME
        opposite = ((turns.abs() - 180).abs() <= SAME).nonzero().flatten()
        for name, images in answers.items():
            distances = (true_views - images[position]).square().mean(dim=(1, 2, 3)).cpu()
            if not distances.isfinite().all():
                found[name].append([math.nan] * 3)
                continue
            error, right = float(turns[distances.argmin()].abs()), math.nan
            if is_side and len(opposite):
                right = 100.0 * bool(distances[turns.abs() <= SAME].min() < distances[opposite[0]])
            found[name].append([100.0 * (error <= NEAR + SAME), error, right])
    return found


def num_steps(experiment: Experiment) -> int:
    """Returns the number of DDIM steps of judged views."""
    return min(NUM_SAMPLING_STEPS, experiment.diffusion.num_timesteps)


def check_can_judge_views(experiment: Experiment) -> None:
    """Raises DatasetError if there are no test images, and ConfigError if a package is missing."""
    if experiment.test is None:
        raise DatasetError(
            f"{experiment.config.data.root} has no test images to judge novel views on: set data.holdout as in training"
        )
    if experiment.config.evaluation.num_novel_views:
        require("torchmetrics")


def judge_novel_views(experiment: Experiment, soda: SODA, record: Record) -> dict[str, Measured]:
    """Collective. Scores novel views and the identity across views. Prints, records and returns the tables, by name."""
    config = experiment.config

    def found() -> Iterator[tuple[str, Measured]]:
        if config.evaluation.num_novel_views:
            generate = view_sampler(experiment, soda, config.seed, num_steps(experiment))
            counts = sorted({1, config.views.num_sources})
            models = {f"model, {count} source{'s' * (count > 1)}": (count, generate) for count in counts}
            yield "novel_views", score_views(experiment, models, config.evaluation.num_novel_views, config.seed)
        feature = config_protocols(config)[0].feature_name
        identity = score_identity(experiment, _test_features(experiment, soda, feature), feature)
        if identity.rows:
            yield "identity", identity

    return report(found(), record)


def _test_features(experiment: Experiment, soda: SODA, feature: str) -> dict[str, Tensor]:
    """Collective. Returns the features (N, D) of the test images, by encoder: trained, untrained and raw pixels."""
    encoders = {"trained": encode_with(experiment, soda), **baselines(experiment)}
    test: Any = experiment.test

    def encode(pixels: Tensor, indices: range) -> Features:
        views = evaluation_view(experiment, test, pixels, indices)
        return {name: encoder(views, indices)[feature].float() for name, encoder in encoders.items()}

    features = extract_features(encode, test, experiment.config.evaluation.batch_size, experiment.device)
    return {name: features[name] for name in encoders}
