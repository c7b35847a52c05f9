"""Judging of novel views: generated views of objects beside the true ones and beside baselines.

A target is a test image, and its sources are other images of the same object. All ranks share the work.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.cameras import azimuth_of, polar_of
from datasets.images import DatasetError, group_by_object
from evaluation.encoders import baselines, encode_with
from evaluation.features import Features, Subset, extract_features, random_subset
from evaluation.identity import SAME, score_identity
from evaluation.measures.base import Measured, Rows
from evaluation.measures.recording import Record
from evaluation.protocols import config_protocols
from evaluation.view_similarity import BACKGROUND, MAX_PSNR, Masks, similarity
from experiment.batch import evaluation_view
from experiment.opening import Experiment
from experiment.posed import PosedPixels, draw_sources, read_with_sources, source_images
from experiment.trained import Trained
from model.guidance import guided_denoiser
from model.soda import SODA
from utils.cli import gather_user_errors, require
from utils.device import autocast
from utils.distributed.collectives import all_reduce
from utils.distributed.processes import my_range, rank
from utils.randomness import image_noise

NUM_SAMPLING_STEPS = 50
BATCH = 32  # targets per batch; the same for any number of ranks, so that samples do not depend on that number
NEAREST_SIZE = 32  # source images are compared at no more than this size, in pixels
NEAR = 15.0  # degrees from the pose that was asked for
FEWEST_AROUND = 4  # views of an object at one height, for the azimuth tests
WHOLE_IMAGE = 0.98  # if the object fills more of the images than this, there is no background

Generate = Callable[[PosedPixels, range], Tensor]
"""Function (targets with their sources, positions) -> views (N, 3, D, D) in [-1, 1]. It may not use target pixels."""

logger = logging.getLogger(__name__)


def view_sampler(experiment: Experiment, soda: SODA, seed: int, num_sampling_steps: int) -> Generate:
    """Returns the function that samples the target views by DDIM, with clean source views.

    The other settings are those of the config's `sampling` section.
    """
    config, device, diffusion = experiment.config, experiment.device, experiment.diffusion
    sampling, size = config.sampling, config.decoder_size

    @torch.no_grad()
    def generate(pixels: PosedPixels, positions: range) -> Tensor:
        soda.eval()
        source_rays, target_rays = pixels.rays(config, device)
        seen = pixels.pixels[:, 1:]
        views = experiment.views.evaluation(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
        x_source = torch.cat([views, source_rays], dim=2)

        def noise(purpose: str, *counters: int) -> Tensor:
            return image_noise((3, size, size), positions, seed, purpose, *counters, device=device)

        with autocast(device, experiment.amp_dtype):
            denoise = guided_denoiser(
                soda.decoder,
                soda.condition(x_source),
                sampling.guidance_scale,
                sampling.sections,
                target_rays,
                soda.tokens(x_source),
            )
            return diffusion.ddim_sample(
                denoise,
                noise("novel view"),
                num_sampling_steps,
                sampling.eta,
                draw_noise=lambda t: noise("novel view eta", t),
            )

    return generate


def generate_all(generate: Generate, pixels: PosedPixels, experiment: Experiment) -> Tensor:
    """Collective. Returns the views (N, 3, D, D) of all targets, on the device. The ranks divide the batches."""
    count, size, device = len(pixels.pixels), experiment.config.decoder_size, experiment.device
    out = torch.zeros(count, 3, size, size, device=device)
    parts = list(_parts(count, BATCH))
    mine = my_range(len(parts))
    for positions in parts[mine.start : mine.stop]:
        here = slice(positions.start, positions.stop)
        out[here] = generate(PosedPixels(pixels.pixels[here], pixels.cameras[here]), positions)
    return all_reduce(out)


class Scenes:
    """All images of an experiment, training images before test images, with their objects and angles.

    Attributes:
        objects: (N,) int64 number of the object of each image.
        polar, azimuth: (N,) angles of each camera in degrees.
    """

    def __init__(self, experiment: Experiment) -> None:
        assert experiment.test is not None, "novel views are judged on test images"
        self.experiment, self.train, self.test = experiment, experiment.train, experiment.test
        cameras = torch.cat([_needed(self.train.cameras), _needed(self.test.cameras)])
        self.objects = torch.cat([_needed(self.train.objects), _needed(self.test.objects)])
        self.polar, self.azimuth = polar_of(cameras.double()).rad2deg(), azimuth_of(cameras.double()).rad2deg()

    @cached_property
    def members(self) -> Tensor:
        """Indices (number of objects, largest number of views) of the images of each object, padded by -1."""
        return group_by_object(self.objects)

    @cached_property
    def poses(self) -> Tensor:
        """Number (N,) of the pose of each image. Images with the same angles have the same number."""
        azimuth = self.azimuth % 360
        azimuth = torch.where((azimuth > 360 - SAME) | (self.polar < SAME) | (self.polar > 180 - SAME), 0, azimuth)
        # Rounded to tenths, because the last bits of angles differ.
        return torch.stack([self.polar, azimuth]).mul(10).round().unique(dim=1, return_inverse=True)[1]

    @cached_property
    def known(self) -> dict[int, dict[int, int]]:
        """{pose: {object: index of the training image}}, for poses that training images have."""
        found: dict[int, dict[int, int]] = {}
        objects, poses = self.objects.tolist(), self.poses.tolist()
        for index in range(len(self.train)):
            found.setdefault(poses[index], {})[objects[index]] = index
        return found

    def around(self, index: int) -> Tensor:
        """Returns the indices of all views of the same object at the same height, with the image itself."""
        members = self.members[self.objects[index]]
        members = members[members >= 0]
        return members[(self.polar[members] - self.polar[index]).abs() <= SAME]

    def turns(self, indices: Tensor, index: int) -> Tensor:
        """Returns the azimuths of images minus that of the image `index`, in degrees from -180 to 180."""
        return (self.azimuth[indices] - self.azimuth[index] + 180) % 360 - 180

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Returns pixels (n, 3, P, P) uint8 and cameras (n, 3, 4) of images, on the host."""
        size, count = self.experiment.config.data.kept_size, len(self.train)
        pixels, cameras = torch.zeros(len(indices), 3, size, size, dtype=torch.uint8), torch.zeros(len(indices), 3, 4)
        for images, chosen, first in ((self.train, indices < count, 0), (self.test, indices >= count, count)):
            if chosen.any():
                (found,) = images.batches([indices[chosen] - first])
                pixels[chosen], cameras[chosen] = found.cpu(), _needed(images.cameras)[indices[chosen] - first]
        return pixels, cameras

    def x_start(self, indices: Tensor) -> Tensor:
        """Returns images (n, 3, D, D) in [-1, 1], on the device."""
        return self.experiment.views.x_start(self.read(indices)[0].to(self.experiment.device))


@dataclass(frozen=True)
class Target:
    """A target view, its sources and what it is compared with. All are indices into `Scenes`.

    Attributes:
        sources: indices into the split that sources come from (`source_images`).
        around: views of the same object at the same height; empty: they are too few for the azimuth tests.
        beside: another view of the object, 15 degrees off; None: there is none.
        candidates: pairs of training images of one object, from the first source's pose and from the target's.
    """

    index: int
    sources: list[int]
    around: list[int]
    beside: int | None
    candidates: list[tuple[int, int]]


def choose_targets(scenes: Scenes, count: int, seed: int) -> tuple[Subset, list[Target]]:
    """Returns `count` test images, drawn by the seed, or all if they are fewer, and what each is compared with."""
    experiment = scenes.experiment
    config, test, first = experiment.config, scenes.test, len(scenes.train)
    subset = random_subset(test, count, seed, "novel views")
    others = source_images(scenes.train, test, config)
    but = subset.indices if others is test else None
    objects = _needed(test.objects)[subset.indices]
    sources = draw_sources(others, objects, but, config.views.num_sources, range(len(subset)), seed, "novel view ")
    targets = []
    for index, of_target in zip((subset.indices + first).tolist(), sources.tolist(), strict=True):
        around = scenes.around(index)
        turns = scenes.turns(around, index)
        beside = around[(turns.abs() - NEAR).abs() <= SAME].tolist()
        is_ring = len(around) >= FEWEST_AROUND and SAME < scenes.polar[index] < 180 - SAME
        of_source = of_target[0] + (first if others is test else 0)
        here = scenes.known.get(int(scenes.poses[of_source]), {})
        there = scenes.known.get(int(scenes.poses[index]), {})
        own = int(scenes.objects[index])
        pairs = [(here[each], there[each]) for each in sorted(here.keys() & there.keys()) if each != own]
        targets.append(Target(index, of_target, around.tolist() if is_ring else [], next(iter(beside), None), pairs))
    return subset, targets


def score_views(experiment: Experiment, models: Mapping[str, tuple[int, Generate]], count: int, seed: int) -> Measured:
    """Collective. Scores generated views of `count` test images, and the baselines.

    Args:
        models: {name: (number of sources, function that generates the views)}.
    """
    scenes = Scenes(experiment)
    subset, targets = choose_targets(scenes, count, seed)
    masks = Masks(experiment, subset)
    means, small = _training_images(scenes, targets)
    baselines = ["source", *_possible_baselines(targets)]
    config, device = experiment.config, experiment.device
    others = source_images(scenes.train, scenes.test, config)

    def encode(_: Tensor, positions: range) -> Features:
        here = targets[positions.start : positions.stop]
        sources = torch.tensor([each.sources for each in here])
        pixels = read_with_sources(scenes.test, others, subset.indices[positions.start : positions.stop], sources)
        truth = experiment.views.x_start(pixels.pixels[:, 0].to(device))
        answers = {
            name: generate(PosedPixels(pixels.pixels[:, : 1 + used], pixels.cameras[:, : 1 + used]), positions)
            for name, (used, generate) in models.items()
        }
        answers["source"] = experiment.views.x_start(pixels.pixels[:, 1].to(device))
        if "mean object" in baselines:
            answers["mean object"] = torch.stack([means[int(scenes.poses[each.index])] for each in here]).to(device)
        if "nearest object" in baselines:
            seen = _small(answers["source"]).cpu()
            chosen = [_nearest(small, image, each.candidates) for image, each in zip(seen, here, strict=True)]
            answers["nearest object"] = scenes.x_start(torch.tensor(chosen))
        if BESIDE in baselines:
            answers[BESIDE] = scenes.x_start(torch.tensor([_needed(each.beside) for each in here]))
        inside = masks.of(positions, truth)
        rings = [(scenes.x_start(torch.tensor(each.around)) if each.around else None) for each in here]
        found: Features = {"inside": inside.float().mean(dim=(1, 2))[:, None]}
        for name, images in answers.items():
            images = images.float().clamp(-1, 1)
            scores = similarity(images, truth, inside, inside if masks.files else None)
            azimuths = [_azimuth_scores(scenes, *each) for each in zip(here, rings, images, strict=True)]
            found[name] = torch.cat([scores, torch.tensor(azimuths, device=device)], dim=1)
        return found

    found = extract_features(encode, subset, BATCH, device)
    whole_image = found.pop("inside").mean().item() > WHOLE_IMAGE
    if whole_image:
        logger.info("the images have no masks and no light background: the scores of the object alone are left out")
    copies = int((found["nearest object"][:, 0] >= MAX_PSNR).sum()) if "nearest object" in found else 0
    names = [*models, *baselines]
    rows: Rows = {}
    num_around = sum(bool(each.around) for each in targets)
    for column, row in enumerate(ROWS):
        values = {name: found[name][:, column] for name in names}
        if whole_image and "object" in row:
            continue
        cells = {name: value[value.isfinite()].mean().item() for name, value in values.items()}
        if any(map(math.isnan, cells.values())):
            logger.info("novel views: %s is left out, because the views of an object do not go around it", row)
            continue
        rows[row] = {name: {"value": value} for name, value in cells.items()}
    sampling = config.sampling
    scales = " ".join(f"{scale:g}" for scale in sampling.guidance_scale)
    what = "new objects" if config.data.split == "objects" else "known objects"
    protocol = (
        f"novel views of {what}: {len(targets)} test images as targets, {config.decoder_size} px, "
        f"{num_steps(experiment)} DDIM steps, guidance {scales}, eta {sampling.eta:g}; azimuth of the nearest true "
        f"view at the same height: {num_around} targets; object: "
        + ("masks" if masks.files else f"pixels whose darkest channel is below {BACKGROUND:g}")
        + (f"; {copies} targets equal a training image" if copies else "")
    )
    return Measured(protocol, rows, decimals=3)


BESIDE = "15 degrees off"
ROWS = (
    "PSNR (dB)",
    "PSNR of the object (dB)",
    "SSIM",
    "SSIM of the object",
    "colour error of the object",
    "within 15 degrees (%)",
    "azimuth error (degrees)",
    "side told from its opposite (%)",
)
"""Rows of the table of `score_views`, in the order of the columns of the scores."""


def _azimuth_scores(scenes: Scenes, target: Target, around: Tensor | None, image: Tensor) -> list[float]:
    """Returns (100 if within 15 degrees else 0, azimuth error in degrees, 100 if the side is right else 0).

    The azimuth of the image is that of the true view at the same height that is nearest to it, by squared error. Sides
    are views at azimuths of 45 to 135 and of 225 to 315 degrees. Other views, and objects without `around`, have NaN.
    """
    if around is None:
        return [math.nan] * 3
    distances = (around - image).square().mean(dim=(1, 2, 3)).cpu()
    turns = scenes.turns(torch.tensor(target.around), target.index)
    error = float(turns[distances.argmin()].abs())
    is_side = abs(float(scenes.azimuth[target.index]) % 180 - 90) <= 45 + SAME
    opposite = ((turns.abs() - 180).abs() <= SAME).nonzero().flatten()
    right = math.nan
    if is_side and len(opposite):
        own = distances[turns.abs() <= SAME].min()
        right = 100.0 * bool(own < distances[opposite[0]])
    return [100.0 * (error <= NEAR + SAME), error, right]


def _possible_baselines(targets: list[Target]) -> list[str]:
    """Returns the baselines that exist for all targets. Logs the others."""
    exists = {
        "mean object": sum(bool(each.candidates) for each in targets),
        "nearest object": sum(bool(each.candidates) for each in targets),
        BESIDE: sum(each.beside is not None for each in targets),
    }
    for name, count in exists.items():
        if count < len(targets):
            logger.info(
                "novel views: the baseline %r is left out, because only %d of %d targets have it",
                name,
                count,
                len(targets),
            )
    return [name for name, count in exists.items() if count == len(targets)]


def _training_images(scenes: Scenes, targets: list[Target]) -> tuple[dict[int, Tensor], Tensor]:
    """Returns the mean training image (3, D, D) of each target's pose, and all training images at NEAREST_SIZE.

    Each rank reads all training images once.
    """
    wanted = {int(scenes.poses[each.index]) for each in targets}
    total: dict[int, Tensor] = {}
    count: dict[int, int] = {}
    small = []
    poses = scenes.poses.tolist()
    for part in _parts(len(scenes.train), 1024):
        images = scenes.x_start(torch.arange(part.start, part.stop))
        small.append(_small(images).mul(127.5).add(127.5).round().byte().cpu())
        for index, image in zip(part, images, strict=True):
            if poses[index] in wanted:
                total[poses[index]] = total.get(poses[index], 0) + image
                count[poses[index]] = count.get(poses[index], 0) + 1
    return {pose: image / count[pose] for pose, image in total.items()}, torch.cat(small)


def _parts(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _small(images: Tensor) -> Tensor:
    """Averages images (N, 3, D, D) down to at most NEAREST_SIZE pixels."""
    return F.adaptive_avg_pool2d(images, min(NEAREST_SIZE, images.shape[-1]))


def _nearest(small: Tensor, image: Tensor, candidates: list[tuple[int, int]]) -> int:
    """Returns the index of the training image from the target's pose, of the object nearest in the source's pose."""
    seen = small[torch.tensor([here for here, _ in candidates])].float() / 127.5 - 1
    return candidates[int((seen - image).square().mean(dim=(1, 2, 3)).argmin())][1]


def num_steps(experiment: Experiment) -> int:
    """Returns the number of DDIM steps of judged views."""
    return min(NUM_SAMPLING_STEPS, experiment.diffusion.num_timesteps)


def _needed(value: Any) -> Any:
    assert value is not None
    return value


def check_can_judge_views(experiment: Experiment) -> None:
    """Raises DatasetError if there are no test images, and ConfigError if a package is missing."""
    if experiment.test is None:
        raise DatasetError(
            f"{experiment.config.data.root} has no test images to judge novel views on: set data.holdout as in training"
        )
    if experiment.config.evaluation.num_novel_views:
        require("torchmetrics")


def judge_novel_views(trained: Trained, experiment: Experiment, soda: SODA) -> dict[str, Measured]:
    """Collective. Scores novel views and the identity across views. Returns their tables by name.

    Each table is printed, and added to the results.json of the run. Ends all ranks with status 2 if that fails.
    """
    config, record, measured = experiment.config, Record(trained, experiment), {}

    def found() -> Iterator[tuple[str, Measured]]:
        if config.evaluation.num_novel_views:
            generate = view_sampler(experiment, soda, config.seed, num_steps(experiment))
            counts = sorted({1, config.views.num_sources})
            models = {f"model, {count} source{'s' * (count > 1)}": (count, generate) for count in counts}
            yield "novel_views", score_views(experiment, models, config.evaluation.num_novel_views, config.seed)
        feature = config_protocols(config)[0].feature_name
        yield "identity", score_identity(experiment, _test_features(experiment, soda, feature), feature)

    for name, each in found():
        measured[name] = each
        with gather_user_errors():
            if rank() == 0:
                print(f"\n{name}: {each}", flush=True)
                record.add(name, each)
    return measured


def _test_features(experiment: Experiment, soda: SODA, feature: str) -> dict[str, Tensor]:
    """Collective. Returns the features (N, D) of the test images, by encoder: trained, untrained and raw pixels."""
    encoders = {"trained": encode_with(experiment, soda), **baselines(experiment)}
    test = _needed(experiment.test)

    def encode(pixels: Tensor, indices: range) -> Features:
        views = evaluation_view(experiment, test, pixels, indices)
        return {name: encoder(views, indices)[feature].float() for name, encoder in encoders.items()}

    features = extract_features(encode, test, experiment.config.evaluation.batch_size, experiment.device)
    return {name: features[name] for name in encoders}
