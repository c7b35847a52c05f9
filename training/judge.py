"""What was learned: accuracies of encoders under named protocols, and grids of samples."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from evaluation import CLEAN, MakeView, Protocol, evaluate
from model import SODA, UNetDecoder
from training.experiment import Experiment, initial_soda
from training.step import draw_source, draws, read_pixels
from utils.config import KNN, Probe, ProbeView
from utils.device import autocast
from utils.distributed import all_reduce, share
from utils.randomness import CHUNK, generator, image_noise

SETTLING_PASSES = 20
MAX_RAW_PIXELS = 2**30  # numbers, 4 GB, of a whole data set

Encode = Callable[[Tensor, range], dict[str, Tensor]]


def encode_with(experiment: Experiment, soda: SODA) -> Encode:
    """The features of `soda` as the evaluation uses them: in evaluation mode, under the experiment's autocast.

    "z" and "pooled" of the encoder; of the decoder, if `evaluation.features` names them.
    """
    features = experiment.config.evaluation.features

    def encode(views: Tensor, indices: range) -> dict[str, Tensor]:
        soda.eval()
        with torch.no_grad(), autocast(experiment.device, experiment.amp_dtype):
            found = soda.encoder.features(views)
            if features.startswith("decoder."):
                found[features] = decoder_features(experiment, soda.decoder, views, indices, features)
        return found

    return encode


def decoder_features(experiment: Experiment, decoder: UNetDecoder, views: Tensor, indices: range, name: str) -> Tensor:
    """Activations of the decoder without a latent, averaged over the pixels: views (N, 3, H, W) -> (N, C) float32.

    The probe of Denoising Diffusion Autoencoders (Xiang et al. 2023), on a decoder that trains without a latent with
    probability `training.mask.latent_probability`. `name` is decoder.<block>@<timestep>: of which block, for images
    with how much noise. The noise belongs to a sample's index, in either split, and is the same each time.
    """
    block, timestep = name.removeprefix("decoder.").split("@")
    x_start = experiment.views.denormalize(views) * 2 - 1
    noise = image_noise(views.shape[1:], indices, experiment.config.seed, "features", device=views.device)
    timesteps = torch.full((len(views),), int(timestep), device=views.device)
    z = torch.zeros(len(views), experiment.config.encoder.latent_dim, device=views.device)
    x_t = experiment.diffusion.q_sample(x_start, timesteps, noise)
    return decoder.features(x_t, timesteps, z, block).float().mean(dim=(2, 3))


@torch.no_grad()
def settled(experiment: Experiment, soda: SODA) -> SODA:
    """`soda` with other BatchNorm statistics: those of forward passes over source views, in training mode.

    Each process sees whole batches: split ones would give numbers that depend on how many processes there are.
    """
    encoder = copy.deepcopy(soda.encoder).train()
    positions = range(experiment.config.training.batch_size)
    steps = range(SETTLING_PASSES)
    for step, pixels in zip(steps, read_pixels(experiment, ((step, positions) for step in steps)), strict=True):
        encoder(draw_source(experiment, pixels, step, positions))
    return SODA(encoder, soda.decoder)


def raw_pixels(views: Tensor, num_images: int) -> Tensor:
    """(N, 3, H, W) -> (N, 3 * size * size), averaged down to 32 px, or less for a large data set."""
    size = min(views.shape[-1], 32)
    while 3 * size**2 * num_images > MAX_RAW_PIXELS:
        size //= 2
    return F.adaptive_avg_pool2d(views, size).flatten(1)


def baselines(experiment: Experiment) -> dict[str, Encode]:
    """The model as this run started it, and the raw pixels.

    BatchNorm's running statistics start at mean 0 and variance 1: unless they settle first, the untrained encoder
    is a straw man. The raw pixels stand where the config's features do; nothing comes before them.
    """
    untrained = settled(experiment, initial_soda(experiment.config, experiment.device))
    features = experiment.config.evaluation.features
    return {
        "untrained": encode_with(experiment, untrained),
        "raw pixels": lambda views, _: {features: raw_pixels(views, len(experiment.train))},
    }


def config_protocols(experiment: Experiment) -> list[Protocol]:
    """The k-NN and the probe that the config's `evaluation` section asks for."""
    config, augmented = experiment.config.evaluation, str(experiment.config.views.probe)
    knn_view = augmented if config.knn.bank == "augmented" else CLEAN
    probe_view = augmented if config.probe.transform == "augmented" else CLEAN
    return [
        Protocol("knn", config.knn, knn_view, config.features, config.normalize),
        Protocol("probe", config.probe, probe_view, config.features, config.normalize),
    ]


def all_protocols(experiment: Experiment) -> list[Protocol]:
    """What test.py prints: the reference's protocol, the config's own, and the usual ones of the field.

    The reference implementation's bank and probe see the views that are the defaults of `views.probe`. k = 200
    with temperature 0.1 is lightly's benchmark (Wu et al. 2018).
    """
    few, many = (min(k, len(experiment.train)) for k in (20, 200))
    usual = [
        ("knn", KNN(k=few)),
        ("knn", KNN(k=many, weights="temperature", temperature=0.1)),
        ("probe", Probe()),
    ]
    candidates = [
        *(Protocol(kind, s, str(ProbeView()), "z", True, "the reference's") for kind, s in (usual[0], usual[2])),
        *config_protocols(experiment),
        *(Protocol(kind, s, CLEAN, features, True) for features in ("z", "pooled") for kind, s in usual),
    ]
    # The config's own may be one of the others.
    return list({str(replace(protocol, note="")): protocol for protocol in reversed(candidates)}.values())[::-1]


def judge(
    experiment: Experiment, encoders: dict[str, Encode], protocols: list[Protocol]
) -> dict[str, dict[str, dict[str, float]]]:
    """Top-1 and top-3 in per cent: {protocol: {encoder: {"top1": ..., "top3": ...}}}."""
    seed, views = experiment.config.seed, experiment.views

    def augmented_by(view: ProbeView) -> MakeView:
        def make(pixels: Tensor, indices: range, epoch: int) -> Tensor:
            return views.augmented(pixels, draws(experiment, indices, "probe view", epoch), view)

        return make

    return evaluate(
        encoders,
        experiment.train,
        experiment.test,
        {str(view): augmented_by(view) for view in (ProbeView(), experiment.config.views.probe)}
        | {CLEAN: lambda pixels, indices, epoch: views.evaluation(pixels)},
        protocols,
        num_classes=len(experiment.info.classes),
        batch_size=experiment.config.evaluation.batch_size,
        generator=lambda: generator(seed, "probe"),
        device=experiment.device,
        share=share,
        all_reduce=all_reduce,
    )


@torch.no_grad()
def sample_grid(experiment: Experiment, soda: SODA) -> Tensor:
    """A picture (3, H, W) uint8 of three rows: source views, DDIM samples guided by them, target views.

    Images, views and noise depend on the seed alone, so that grids of different epochs compare. Processes share the
    sampling.
    """
    config, seed, device = experiment.config.sampling, experiment.config.seed, experiment.device
    images = experiment.train if experiment.test is None else experiment.test
    num_images = min(config.num_images, len(images))
    chosen = torch.randperm(len(images), generator=generator(seed, "grid images"))[:num_images]
    (pixels,) = images.batches([chosen], pin_memory=device.type == "cuda")
    positions = range(num_images)
    mine = share(num_images, CHUNK)

    def noise(positions: range, purpose: str, *counters: int) -> Tensor:
        return image_noise(pixels.shape[1:], positions, seed, purpose, *counters, device=device)

    x_source, x_target = experiment.views.pair(
        pixels,
        draws(experiment, positions, "grid source view"),
        draws(experiment, positions, "grid target view"),
        noise(positions, "grid source noise"),
    )
    samples = torch.zeros_like(x_target)
    soda.eval()
    if mine:
        with autocast(device, experiment.amp_dtype):
            samples[mine.start : mine.stop] = experiment.diffusion.ddim_sample(
                soda.denoiser(soda.encoder(x_source[mine.start : mine.stop]), config.guidance_scale, config.sections),
                noise(mine, "grid noise"),
                config.num_sampling_steps,
                config.eta,
                draw_noise=lambda t: noise(mine, "grid eta", t),
            )
    rows = torch.cat([experiment.views.denormalize(x_source) * 2 - 1, all_reduce(samples), x_target])
    rows = (rows.clamp(-1, 1) * 127.5 + 127.5).round().byte()
    enlarge = max(1, round(64 / rows.shape[-1]))  # small images are enlarged to about 64 px
    grid = make_grid(
        F.interpolate(rows, scale_factor=enlarge, mode="nearest"), nrow=num_images, padding=2, pad_value=255
    )
    return grid.cpu()


def save_png(path: Path, image: Tensor) -> None:
    """Write an image (3, H, W) uint8."""
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
