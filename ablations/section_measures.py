"""Measures of a latent's sections: the information in each section, and its effect on a decoded image.

All random numbers come from one fixed seed, so that runs with different seeds are measured on the same draws.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config.keys import result_digest
from config.schema import Config
from evaluation.encoders import encode_with
from evaluation.judge import judge
from evaluation.protocols import config_protocols
from experiment.models import build_on_meta
from experiment.opening import Experiment
from model.diffusion import squared_errors
from model.guidance import guided_denoiser
from model.soda import SODA
from utils.device import autocast
from utils.randomness import generator, image_noise

SEED = 0
NUM_PAIRS = 256
NUM_SAMPLING_STEPS = 20
COARSE = 4  # pixels


def measure_sections(experiment: Experiment, soda: SODA) -> dict[str, Any]:
    """Returns the measures that ablations/sections.py explains, by name.

    A measure is a number, or a list with one number per entry of `sections_of`.
    """
    sections = sections_of(experiment.config)
    soda.eval()
    (knn, probe), probes = probe_sections(experiment, soda, sections)
    loss, *without = losses_without(experiment, soda, sections)
    swapped, coarse = swap_sections(experiment, soda, sections)
    return {
        "loss": loss,
        "k-NN": knn,
        "probe": probe,
        "decoder parameters": sum(parameter.numel() for parameter in soda.decoder.parameters()),
        "probe of": probes,
        "swapped": swapped,
        "coarse": coarse,
        "own": [100 * share for share in own_variance(experiment, soda, sections)],
        "without": [100 * (each / loss - 1) for each in without],
    }


def digest_of(config: Config) -> str:
    """Returns the digest of everything that the measures of a run depend on, except the content of the images."""
    return result_digest(config, also=str((SEED, NUM_PAIRS, NUM_SAMPLING_STEPS)))


def sections_of(config: Config) -> dict[str, slice]:
    """Returns {name: dimensions of the latent} for each section. The last entry, "whole latent", has all dimensions.

    A name holds the number of the section and the sizes of the feature maps that it modulates. If the config has shared
    modulation, the latent is split as sectioned modulation would split it.
    """
    decoder = config.decoder.model_copy(update={"modulation": "sectioned"})
    layers = list(build_on_meta(config.model_copy(update={"decoder": decoder})).decoder.layers())
    named: dict[str, slice] = {}
    for section in range(decoder.num_sections):
        own_layers = [layer for layer in layers if layer.section == section]
        sizes = " and ".join(str(size) for size in dict.fromkeys(layer.resolution for layer in own_layers))
        place = f"{sizes} px" + (", middle" if section == decoder.num_sections - 1 else "")
        named[f"{section} ({place})"] = own_layers[0].dims
    return named | {"whole latent": slice(None)}


def _clean_views(experiment: Experiment, indices: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Yields one batch at a time: clean views (N, 3, H, W) of test images, and their positions in `indices`."""
    assert experiment.test is not None
    parts, start = indices.split(experiment.config.evaluation.batch_size), 0
    for part, pixels in zip(parts, experiment.test.batches(parts, pin_memory=False), strict=True):
        yield experiment.views.evaluation(pixels), slice(start, start + len(part))
        start += len(part)


def probe_sections(experiment: Experiment, soda: SODA, sections: dict[str, slice]) -> tuple[list[float], list[float]]:
    """Returns two lists of top-1 accuracies in per cent.

    The first is [k-NN, probe] of z under the config's protocols. The second is the probe of each section, with
    features that are not scaled to length 1.
    """
    encode = encode_with(experiment, soda)

    def encode_sections(views: Tensor, indices: range) -> dict[str, Tensor]:
        features = dict(encode(views, indices))
        return features | {name: features["z"][:, dims] for name, dims in sections.items()}

    protocols = [replace(protocol, features="z") for protocol in config_protocols(experiment.config)]
    of_sections = [replace(protocols[1], features=name, normalize=False) for name in sections]
    table = judge(experiment, {"trained": encode_sections}, [*protocols, *of_sections])
    top1 = [table[str(protocol)]["trained"]["top1"] for protocol in [*protocols, *of_sections]]
    return top1[:2], top1[2:]


@torch.no_grad()
def own_variance(experiment: Experiment, soda: SODA, sections: dict[str, slice]) -> list[float]:
    """Returns the fraction of each section's variance that no linear function of the other sections explains.

    For the entry "whole latent" it is 1. The latents are those of the clean test images. The linear function is fitted
    to one half of these images by least squares, and evaluated on the other half.
    """
    assert experiment.test is not None
    order = torch.randperm(len(experiment.test), generator=generator(SEED, "halves"))
    with autocast(experiment.device, experiment.amp_dtype):
        parts = [soda.encoder(views).float().cpu() for views, _ in _clean_views(experiment, order)]
    z = torch.cat(parts).double()  # after the copy, because MPS has no float64
    fitted, judged = (z - z.chunk(2)[0].mean(dim=0)).chunk(2)  # (N / 2, latent_dim) each
    shares = []
    for dims in sections.values():
        others = torch.ones(z.shape[1], dtype=torch.bool)
        others[dims] = False
        weights = torch.linalg.lstsq(fitted[:, others], fitted[:, dims]).solution
        unexplained = judged[:, dims] - judged[:, others] @ weights
        shares.append((unexplained.square().sum() / judged[:, dims].square().sum()).item())
    return shares


@torch.no_grad()
def losses_without(experiment: Experiment, soda: SODA, sections: dict[str, slice]) -> list[float]:
    """Returns the test loss with the whole latent, and then the loss with each section set to zero.

    Both source and target are the clean view of a test image. The timesteps are spread evenly over the images.
    """
    assert experiment.test is not None
    device = experiment.device
    dropped = [slice(0), *sections.values()]
    totals = [0.0] * len(dropped)
    order = torch.randperm(len(experiment.test), generator=generator(SEED, "test loss"))
    for views, here in _clean_views(experiment, order):
        positions = range(here.start, here.stop)
        timesteps = torch.tensor(positions, device=device) * experiment.diffusion.num_timesteps // len(order)
        x_start = experiment.views.x_start_of(views)
        noise = image_noise(x_start.shape[1:], positions, SEED, "test loss", device=device)
        x_t = experiment.diffusion.q_sample(x_start, timesteps, noise)
        target = experiment.diffusion.target(x_start, timesteps, noise)
        with autocast(device, experiment.amp_dtype):
            z = soda.encoder(views).float()
            for i, dims in enumerate(dropped):
                kept = z.clone()
                kept[:, dims] = 0
                totals[i] += squared_errors(soda.decoder(x_t, timesteps, kept), target).mean().item() * len(z)
    return [total / len(order) for total in totals]


@torch.no_grad()
def swap_sections(experiment: Experiment, soda: SODA, sections: dict[str, slice]) -> tuple[list[float], list[float]]:
    """Measures how a decoded image changes if one section comes from another image, with the same x_T.

    Returns two lists. The first is the root mean square of the change over all pixels, divided by that for the whole
    latent. The second is the fraction of the squared change that remains after averaging over squares of
    COARSE x COARSE pixels.
    """
    assert experiment.test is not None
    device, diffusion, size = experiment.device, experiment.diffusion, experiment.config.decoder_size

    def decode(z: Tensor, x_T: Tensor) -> Tensor:
        return diffusion.ddim_sample(guided_denoiser(soda.decoder, z), x_T, NUM_SAMPLING_STEPS)

    chosen = torch.randperm(len(experiment.test), generator=generator(SEED, "pairs"))
    chosen = chosen[: 2 * min(NUM_PAIRS, len(chosen) // 2)]
    pairs = zip(*(_clean_views(experiment, half) for half in chosen.chunk(2)), strict=True)
    squares = torch.zeros(2, len(sections), dtype=torch.float64)  # (2, sections): the change, its coarse part
    for (views, here), (other_views, _) in pairs:
        x_T = image_noise((3, size, size), range(here.start, here.stop), SEED, "x_T", device=device)
        with autocast(device, experiment.amp_dtype):
            own, other = soda.encoder(views).float(), soda.encoder(other_views).float()
            before = decode(own, x_T)
            for i, dims in enumerate(sections.values()):
                z = own.clone()
                z[:, dims] = other[:, dims]
                change = decode(z, x_T) - before
                for j, part in enumerate((change, F.avg_pool2d(change, COARSE))):
                    squares[j, i] += part.square().mean(dim=(1, 2, 3)).sum().item()
    change, coarse = squares
    return (change / change[-1]).sqrt().tolist(), (coarse / change).nan_to_num().tolist()
