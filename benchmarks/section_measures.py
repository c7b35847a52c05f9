"""How much each section of a latent holds, and what it decides in a decoded image.

All draws come from one seed, whatever that of the run is, so that runs are measured alike.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model import SODA
from training.experiment import Experiment, build_on_meta
from training.judge import config_protocols, encode_with, judge
from utils.config import Config
from utils.device import autocast
from utils.randomness import generator, image_noise

SEED = 0
NUM_PAIRS = 256
NUM_SAMPLING_STEPS = 20
COARSE = 4  # pixels


def sections_of(config: Config) -> dict[str, slice]:
    """Dimensions of each section, under its number and the feature maps that it modulates; "whole latent" comes last.

    A latent that all layers share is cut where its sections would be.
    """
    decoder = config.decoder.model_copy(update={"modulation": "sectioned"})
    layers = list(build_on_meta(config.model_copy(update={"decoder": decoder})).decoder.layers())
    named: dict[str, slice] = {}
    for section in range(decoder.num_sections):
        mine = [layer for layer in layers if layer.section == section]
        sizes = " and ".join(str(size) for size in dict.fromkeys(layer.resolution for layer in mine))
        place = f"{sizes} px" + (", middle" if section == decoder.num_sections - 1 else "")
        named[f"{section} ({place})"] = mine[0].dims
    return named | {"whole latent": slice(None)}


def test_views(experiment: Experiment, indices: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Clean views (N, 3, H, W) of the test images `indices`, a batch at a time, and where these lie among them."""
    assert experiment.test is not None
    parts, start = indices.split(experiment.config.evaluation.batch_size), 0
    for part, pixels in zip(parts, experiment.test.batches(parts, pin_memory=False), strict=True):
        yield experiment.views.evaluation(pixels), slice(start, start + len(part))
        start += len(part)


def accuracies(experiment: Experiment, soda: SODA, sections: dict[str, slice]) -> tuple[list[float], list[float]]:
    """Top-1 (k-NN, probe) of z as the config says, and of the same probe on each section, not scaled to length 1."""
    encode = encode_with(experiment, soda)

    def encode_sections(views: Tensor, indices: range) -> dict[str, Tensor]:
        features = encode(views, indices)
        return features | {name: features["z"][:, dims] for name, dims in sections.items()}

    protocols = [replace(protocol, features="z") for protocol in config_protocols(experiment)]
    of_sections = [replace(protocols[1], features=name, normalize=False) for name in sections]
    table = judge(experiment, {"trained": encode_sections}, [*protocols, *of_sections])
    top1 = [table[str(protocol)]["trained"]["top1"] for protocol in [*protocols, *of_sections]]
    return top1[:2], top1[2:]


@torch.no_grad()
def own_variance(experiment: Experiment, soda: SODA, sections: dict[str, slice]) -> list[float]:
    """The share of a section's variance that no linear function of all others explains; 1 for the whole latent.

    Of the clean test images; the function is fitted to one half of them (least squares) and judged on the other.
    """
    assert experiment.test is not None
    order = torch.randperm(len(experiment.test), generator=generator(SEED, "halves"))
    with autocast(experiment.device, experiment.amp_dtype):
        parts = [soda.encoder(views).double() for views, _ in test_views(experiment, order)]
    z = torch.cat(parts).cpu()
    fitted, judged = z.chunk(2)
    shares = []
    for dims in sections.values():
        others = torch.ones(z.shape[1], dtype=torch.bool)
        others[dims] = False
        mean = fitted.mean(dim=0)
        weights = torch.linalg.lstsq((fitted - mean)[:, others], (fitted - mean)[:, dims]).solution
        left = (judged - mean)[:, dims] - (judged - mean)[:, others] @ weights
        shares.append((left.square().sum() / (judged - mean)[:, dims].square().sum()).item())
    return shares


@torch.no_grad()
def losses(experiment: Experiment, soda: SODA, sections: dict[str, slice]) -> list[float]:
    """With nothing dropped, then without each section: of clean test images, source and target alike.

    Timesteps are spread evenly over the images.
    """
    assert experiment.test is not None
    device = experiment.device
    dropped = [slice(0), *sections.values()]
    totals = [0.0] * len(dropped)
    order = torch.randperm(len(experiment.test), generator=generator(SEED, "test loss"))
    for views, here in test_views(experiment, order):
        places = range(here.start, here.stop)
        timesteps = torch.tensor(places, device=device) * experiment.diffusion.num_timesteps // len(order)
        noise = image_noise(views.shape[1:], places, SEED, "test loss", device=device)
        x_start = experiment.views.denormalize(views) * 2 - 1
        with autocast(device, experiment.amp_dtype):
            z = soda.encoder(views).float()
            for i, dims in enumerate(dropped):
                kept = z.clone()
                kept[:, dims] = 0
                totals[i] += experiment.diffusion.loss(soda.denoiser(kept), x_start, timesteps, noise).item() * len(z)
    return [total / len(order) for total in totals]


@torch.no_grad()
def swaps(experiment: Experiment, soda: SODA, sections: dict[str, slice]) -> tuple[list[float], list[float]]:
    """What changes in a decoded image when a section is another image's, x_T and all else being equal.

    Root mean square over pixels, as a share of that for the whole latent; and how much of the square lies in means over
    squares of COARSE pixels.
    """
    assert experiment.test is not None
    device = experiment.device
    chosen = torch.randperm(len(experiment.test), generator=generator(SEED, "pairs"))[: 2 * NUM_PAIRS]
    pairs = zip(*(test_views(experiment, half) for half in chosen.chunk(2)), strict=True)
    squares = torch.zeros(2, len(sections), dtype=torch.float64)  # of the change, of its coarse part
    for (views, here), (others, _) in pairs:
        x_T = image_noise(views.shape[1:], range(here.start, here.stop), SEED, "x_T", device=device)
        with autocast(device, experiment.amp_dtype):
            own, other = soda.encoder(views).float(), soda.encoder(others).float()
            before = experiment.diffusion.ddim_sample(soda.denoiser(own), x_T, NUM_SAMPLING_STEPS)
            for i, dims in enumerate(sections.values()):
                z = own.clone()
                z[:, dims] = other[:, dims]
                change = experiment.diffusion.ddim_sample(soda.denoiser(z), x_T, NUM_SAMPLING_STEPS) - before
                for j, part in enumerate((change, F.avg_pool2d(change, COARSE))):
                    squares[j, i] += part.square().mean(dim=(1, 2, 3)).sum().item()
    change, coarse = squares
    return (change / change[-1]).sqrt().tolist(), (coarse / change).nan_to_num().tolist()
