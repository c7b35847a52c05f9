"""Pictures of given images: decoded, interpolated, mixed, and beside their neighbours."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from analysis import quality
from analysis.codec import Codec, slerp
from analysis.picture import Cell, Picture, cells
from analysis.references import Chosen, describe
from datasets.views import scale
from evaluation.knn import nearest_neighbours

INVERTED = "x_T is the DDIM-inverted noise"


def reconstruct(codec: Codec, chosen: Chosen, num_samples: int) -> Picture:
    """What z and x_T hold of each image: samples from z and random x_T, and the decode from z and its own x_T."""
    z = codec.encode(chosen.pixels)
    x_T = codec.invert(chosen.pixels, z)
    noises = [codec.noise(len(chosen), f"sample {i}") for i in range(num_samples)]
    sampled = codec.sample(z.repeat(num_samples, 1), torch.cat(noises)).split(len(chosen)) if noises else ()
    decoded = codec.decode(z, x_T)

    sources = scale(chosen.pixels).to(z.device)
    deviations = [f"deviation {value:.2f}" for value in x_T.std(dim=(1, 2, 3)).tolist()]
    columns = [cells(chosen.pixels)]
    columns += [cells(images, quality.captions(images, sources)) for images in sampled]
    columns += [cells(x_T / 3, deviations), cells(decoded, quality.captions(decoded, sources))]
    return Picture(
        "reconstruct",
        "What the latent holds, and what it leaves open",
        (
            "Samples share the source's z and start from random noise: what they have in common is in z. "
            if noises
            else ""
        )
        + f"The last column starts from the x_T before it, {INVERTED.removeprefix('x_T is ')} of the source "
        "(shown at a third of its size). PSNR is in dB.",
        ["source", *(f"sample {i + 1}" for i in range(num_samples)), "x_T", "decoded from z and x_T"],
        chosen.names,
        [list(row) for row in zip(*columns, strict=True)],
    )


def interpolate(codec: Codec, chosen: Chosen, num_steps: int) -> Picture:
    """Between the images of each pair: linear in z, on the arc in x_T."""
    first, second = chosen.pairs()
    both = torch.cat([first.pixels, second.pixels])
    z = codec.encode(both)
    x_T = codec.invert(both, z)
    (z_a, z_b), (x_a, x_b) = z.chunk(2), x_T.chunk(2)
    shares = torch.linspace(0, 1, num_steps).tolist()
    decoded = codec.decode(
        torch.cat([z_a.lerp(z_b, share) for share in shares]), torch.cat([slerp(x_a, x_b, share) for share in shares])
    ).split(len(first))
    columns = [cells(first.pixels, first.names), *map(cells, decoded), cells(second.pixels, second.names)]
    return Picture(
        "interpolate",
        "From one image to another",
        f"Linear in z, spherical in x_T; {INVERTED} of each end. 0 and 1 are the reconstructions of the ends.",
        ["image", *(f"{share:.3g}" for share in shares), "image"],
        [],
        [list(row) for row in zip(*columns, strict=True)],
    )


def mix(codec: Codec, chosen: Chosen, sections: Sequence[int] | None, random: bool = False) -> Picture:
    """Sections of one image's z with those of another: switched at each level, or those named.

    `random`: start from random noise, instead of the first image's own x_T.
    """
    first, second = chosen.pairs()
    z_a, z_b = codec.encode(first.pixels), codec.encode(second.pixels)
    x_T = codec.noise(len(first), "sample 0") if random else codec.invert(first.pixels, z_a)
    decode = codec.sample if random else codec.decode
    count = len(codec.soda.decoder.section_dims)
    sets = [list(sections)] if sections is not None else [list(range(k, count)) for k in range(count, -1, -1)]
    mixed = []
    for taken in sets:
        drop_mask = torch.tensor([i in taken for i in range(count)], device=z_a.device).expand(len(z_a), -1)
        mixed.append(codec.soda.decoder.mask(z_a, drop_mask) + codec.soda.decoder.mask(z_b, ~drop_mask))
    decoded = decode(torch.cat(mixed), x_T.repeat(len(sets), 1, 1, 1)).split(len(first))
    columns = [cells(first.pixels, first.names), *map(cells, decoded), cells(second.pixels, second.names)]
    return Picture(
        "mix",
        "Sections of two images' latents",
        "Each column decodes the first image's z with the sections named above it taken from the second's; "
        f"{'x_T is random noise' if random else INVERTED + ' of the first'}. {section_legend(codec)}",
        ["first", *(_section_names(taken, count) for taken in sets), "second"],
        [],
        [list(row) for row in zip(*columns, strict=True)],
    )


def _section_names(sections: list[int], count: int) -> str:
    if len(sections) in (0, count):
        return "all" if sections else "none"
    in_a_row = sections == list(range(sections[0], sections[-1] + 1)) and len(sections) > 2
    listed = f"{sections[0]} to {sections[-1]}" if in_a_row else " and ".join(map(str, sections))
    return f"section {listed}" if len(sections) == 1 else f"sections {listed}"


def section_legend(codec: Codec) -> str:
    """Which feature maps each section modulates."""
    sizes: dict[int, set[int]] = {}
    for layer in codec.soda.decoder.layers():
        sizes.setdefault(layer.section, set()).add(layer.resolution)
    places = (f"{section}: {', '.join(map(str, sorted(at, reverse=True)))} px" for section, at in sorted(sizes.items()))
    return f"Sections modulate layers of {'; '.join(places)}."


def nearest(codec: Codec, chosen: Chosen, num_neighbours: int) -> Picture:
    """The training images nearest to each in z, by the cosine, as k-NN sees them."""
    train = codec.experiment.train
    bank, queries = F.normalize(codec.train_z), F.normalize(codec.encode(chosen.pixels))
    found = nearest_neighbours(bank, queries, num_neighbours)
    rows = []
    for i, (distance, indices) in enumerate(zip(*found, strict=True)):
        own = chosen.train_indices[i]
        if own is not None:  # before its copies, if there are such
            indices = torch.cat([torch.tensor([own]), indices[indices != own]])[:num_neighbours]
            distance = (bank[indices.to(bank.device)] - bank[own]).norm(dim=1).cpu()
        (pixels,) = train.batches([indices])
        cosines = (1 - distance.square() / 2).tolist()
        names = [f"{describe(train, 'train', j)}\n{c:.3f}" for j, c in zip(indices.tolist(), cosines, strict=True)]
        rows.append([Cell(chosen.pixels[i], chosen.names[i]), *cells(pixels, names)])
    return Picture(
        "nearest",
        "Nearest training images in z",
        "By the distance of k-NN, Euclidean between latents of length 1; the number is their cosine.",
        ["query", *(f"{i + 1}" for i in range(num_neighbours))],
        [],
        rows,
    )
