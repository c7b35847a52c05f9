"""What was learned: accuracies of encoders under named protocols, and grids of samples."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from evaluation import Protocol, calibrate_batch_norm, evaluate, protocols_of
from model import SODA, ResNetEncoder
from training.experiment import Experiment, initial_soda
from training.step import draw_source
from utils.config import KNN, Probe
from utils.device import autocast
from utils.randomness import CHUNK, generator, image_noise, sample_seeds

CALIBRATION_PASSES = 20

Encode = Callable[[Tensor], dict[str, Tensor]]


def encode_with(experiment: Experiment, encoder: ResNetEncoder) -> Encode:
    """The encoder as the evaluation uses it: in evaluation mode, under the experiment's autocast."""

    def encode(views: Tensor) -> dict[str, Tensor]:
        encoder.eval()
        with torch.no_grad(), autocast(experiment.device, experiment.amp_dtype):
            return encoder.features(views)

    return encode


def baselines(experiment: Experiment) -> dict[str, Encode]:
    """The untrained encoder, its BatchNorm statistics settled on source views, and the raw pixels."""
    untrained = initial_soda(experiment.config, experiment.device).encoder
    positions = range(experiment.config.training.batch_size)
    calibrate_batch_norm(untrained, [draw_source(experiment, step, positions) for step in range(CALIBRATION_PASSES)])
    return {
        "untrained": encode_with(experiment, untrained),
        "raw pixels": lambda views: {"pixels": views.flatten(1)},
    }


def all_protocols(experiment: Experiment) -> list[Protocol]:
    """What test.py prints: the reference's protocol, the config's own, and the usual ones of the field.

    The reference implementation's bank and probe see the augmented views of `views.probe`. k = 200 with
    temperature 0.1 is lightly's benchmark (Wu et al. 2018).
    """
    wide = KNN(k=min(200, len(experiment.train)), weights="temperature", temperature=0.1)
    narrow = KNN(k=min(20, len(experiment.train)))
    augmented_bank = narrow.model_copy(update={"bank": "augmented"})
    candidates = [
        Protocol("knn", augmented_bank, "z", True, note="the reference's"),
        Protocol("probe", Probe(), "z", True, note="the reference's"),
        *protocols_of(experiment.config.evaluation),
        *(
            Protocol(kind, settings, features, True)
            for features in ("z", "pooled")
            for kind, settings in (("knn", narrow), ("knn", wide), ("probe", Probe(transform="clean")))
        ),
    ]
    different = {(c.kind, c.settings, c.features, c.normalize): c for c in reversed(candidates)}
    return list(reversed(different.values()))


def judge(
    experiment: Experiment, encoders: dict[str, Encode], protocols: list[Protocol]
) -> dict[str, dict[str, dict[str, float]]]:
    """Top-1 and top-3 in per cent: {protocol: {encoder: {"top1": ..., "top3": ...}}}."""
    seed = experiment.config.seed

    def augmented_view(pixels: Tensor, indices: range, epoch: int) -> Tensor:
        return experiment.views.probe(pixels, sample_seeds(indices, seed, "probe view", epoch))

    return evaluate(
        encoders,
        experiment.train,
        experiment.test,
        experiment.views.evaluation,
        augmented_view,
        protocols,
        num_classes=len(experiment.info.classes),
        batch_size=experiment.config.evaluation.batch_size,
        generator=lambda: generator(seed, "probe"),
        device=experiment.device,
    )


@torch.no_grad()
def sample_grid(experiment: Experiment, soda: SODA) -> Tensor:
    """A picture (3, H, W) uint8 of three rows: source views, DDIM samples guided by them, target views.

    Images, views and noise depend on the seed alone, so that grids of different epochs compare.
    """
    config, seed, device = experiment.config.sampling, experiment.config.seed, experiment.device
    images = experiment.train if experiment.test is None else experiment.test
    positions = range(min(config.num_images, len(images) // CHUNK * CHUNK))
    chosen = torch.randperm(len(images), generator=generator(seed, "grid images"))[: len(positions)]
    pixels = images.pixels[chosen]
    shape = pixels.shape[1:]

    noise = image_noise(shape, positions, seed, "grid source noise", device=device)
    x_source = experiment.views.source(pixels, sample_seeds(positions, seed, "grid source view"), noise)
    x_target = experiment.views.target(pixels, sample_seeds(positions, seed, "grid target view"))
    x_T = image_noise(shape, positions, seed, "grid noise", device=device)
    soda.eval()
    with autocast(device, experiment.amp_dtype):
        samples = experiment.diffusion.ddim_sample(
            soda.denoiser(soda.encoder(x_source), config.guidance_scale),
            x_T,
            config.num_sampling_steps,
            config.eta,
            generator=generator(seed, "grid eta", device=device),
        )
    rows = torch.cat([experiment.views.denormalize(x_source) * 2 - 1, samples, x_target])
    rows = (rows.clamp(-1, 1) * 127.5 + 127.5).round().byte()
    enlarge = max(1, round(64 / shape[-1]))  # small images are enlarged to about 64 px
    grid = make_grid(
        F.interpolate(rows, scale_factor=enlarge, mode="nearest"), nrow=len(positions), padding=2, pad_value=255
    )
    return grid.cpu()


def save_png(path: Path, image: Tensor) -> None:
    """Write an image (3, H, W) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
