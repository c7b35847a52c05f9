"""Pictures of the space of latents: its directions, its arithmetic, and new points of it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from analysis.codec import Codec
from analysis.picture import Cell, Picture, cells
from analysis.pictures import INVERTED
from analysis.references import Chosen
from utils.distributed import from_rank_0
from utils.randomness import derive_seed

RIDGE = 1e-3  # of the latents' mean variance, added to each component's covariance


def principal_components(latents: Tensor, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of latents (N, D): unit directions (count, D), deviations along them, shares of the variance; largest first."""
    from sklearn.decomposition import PCA

    pca = PCA(count, svd_solver="covariance_eigh").fit(latents.double().cpu().numpy())
    found = pca.components_, np.sqrt(pca.explained_variance_), pca.explained_variance_ratio_
    return from_rank_0(found)  # eigenvectors may turn on another machine


def class_direction(latents: Tensor, labels: Tensor, label: int) -> tuple[np.ndarray, float]:
    """The unit direction (D,) in which a linear classifier's score of a class rises most, and the deviation along it.

    Logistic regression of scikit-learn (one class against the others) on latents of deviation 1 in each dimension.
    """
    from sklearn.linear_model import LogisticRegression

    z = latents.double().cpu().numpy()
    std = z.std(axis=0).clip(1e-12)
    model = LogisticRegression(max_iter=1000).fit((z - z.mean(axis=0)) / std, labels.cpu().numpy() == label)
    direction = model.coef_[0] * std  # a step of equal size in each scaled dimension, seen in z
    direction /= np.linalg.norm(direction)
    return from_rank_0((direction, float((z @ direction).std())))


def directions(
    codec: Codec, chosen: Chosen, num_components: int, num_steps: int, reach: float, label: int | None
) -> Picture:
    """Each image's z moved both ways along principal components, or towards a class, its x_T staying.

    Args:
        reach: how far, in deviations of the training latents along the direction.
        label: of the class to move towards, instead of along components.
    """
    train = codec.experiment.train
    if label is None:
        units, deviations, shares = principal_components(codec.train_z, num_components)
        names = [f"component {i + 1}: {100 * share:.1f} % of the variance" for i, share in enumerate(shares)]
    else:
        assert train.labels is not None, "a class has been found"
        unit, deviation = class_direction(codec.train_z, train.labels, label)
        units, deviations, names = unit[None], np.array([deviation]), [f"towards class {train.classes[label]}"]
    z = codec.encode(chosen.pixels)
    x_T = codec.invert(chosen.pixels, z)
    steps = torch.tensor(units * deviations[:, None], dtype=torch.float32, device=z.device)
    amounts = torch.linspace(-reach, reach, num_steps).tolist()
    moved = torch.stack([z[:, None] + amount * steps for amount in amounts], dim=2)  # (N, directions, amounts, D)
    each = len(units) * len(amounts)
    decoded = codec.decode(moved.flatten(0, 2), x_T.repeat_interleave(each, dim=0)).split(len(amounts))
    rows = []
    for i, images in enumerate(decoded):
        image, direction = divmod(i, len(units))
        source = Cell(chosen.pixels[image], chosen.names[image]) if direction == 0 else Cell()
        rows.append([source, *cells(images)])
    title = "Along the principal components of the latents" if label is None else f"{names[0].capitalize()} and away"
    return Picture(
        "directions",
        title,
        "z moves by so many deviations of the training latents along each direction; "
        f"{INVERTED} of the image, the same in all columns.",
        ["image", *(f"{amount:+.1f}" if amount else "0" for amount in amounts)],
        names * len(chosen),
        rows,
    )


def arithmetic(codec: Codec, terms: Sequence[Chosen | int], num_samples: int) -> Picture:
    """z(a) - z(b) + z(c), each of one image or, where a class is named, the mean of its training latents.

    Decoded from the x_T of the image among c, a and b, in this order, if there is one, and from random ones.
    """
    train = codec.experiment.train
    latents, names, sources = [], [], []
    for letter, term in zip("abc", terms, strict=True):
        if isinstance(term, Chosen):
            latents.append(codec.encode(term.pixels))
            names.append(f"{letter}: {' '.join(term.names[0].split())}")
            sources.append(Cell(term.pixels[0]))
        else:
            assert train.labels is not None, "a class has been found"
            latents.append(codec.train_z[train.labels.to(codec.train_z.device) == term].mean(dim=0, keepdim=True))
            names.append(f"{letter}: mean of {train.classes[term]}")
            sources.append(Cell())
    a, b, c = latents
    z = torch.cat([a, b, c, a - b + c])
    rows, labels = [], []
    of_images = [i for i in (2, 0, 1) if isinstance(terms[i], Chosen)]
    if of_images:
        kept = of_images[0]
        x_T = codec.invert(terms[kept].pixels, latents[kept])  # type: ignore[union-attr]
        rows += [[*sources, Cell()], cells(codec.decode(z, x_T.expand(4, -1, -1, -1)))]
        labels += ["image", f"decoded, x_T of {'abc'[kept]}"]
    noise = codec.noise(num_samples, "sample 0").repeat_interleave(4, dim=0)
    if num_samples:
        rows += [cells(images) for images in codec.sample(z.repeat(num_samples, 1), noise).split(4)]
        labels += [f"sampled, random x_T {i + 1}" for i in range(num_samples)]
    return Picture(
        "arithmetic",
        "a - b + c, of latents",
        "A row decodes four latents from one x_T. Where that is the DDIM-inverted noise of an image, the image itself "
        "comes back in its own column.",
        [*names, "a - b + c"],
        labels,
        rows,
    )


def generate(codec: Codec, num_components: int, num_samples: int) -> Picture:
    """Images of no image: z from a Gaussian mixture fitted to the training latents, x_T at random."""
    from sklearn.mixture import GaussianMixture

    train, latents = codec.experiment.train, codec.train_z.double().cpu().numpy()
    random_state = derive_seed(codec.seed, "mixture") % 2**32
    ridge = RIDGE * float(latents.var(axis=0).mean())
    mixture = GaussianMixture(num_components, reg_covar=ridge, random_state=random_state).fit(latents)
    order = np.argsort(-mixture.weights_, kind="stable")
    source = np.random.default_rng(random_state)
    drawn = np.concatenate(
        [
            source.multivariate_normal(mixture.means_[i], mixture.covariances_[i], num_samples, method="cholesky")
            for i in order
        ]
    )
    names = [f"component {row + 1}: {100 * mixture.weights_[i]:.0f} %" for row, i in enumerate(order)]
    if train.labels is not None:
        assigned = mixture.predict(latents)
        for row, i in enumerate(order):
            counts = np.bincount(train.labels.numpy()[assigned == i], minlength=len(train.classes))
            names[row] += f"\n{100 * counts.max() / max(1, counts.sum()):.0f} % {train.classes[int(counts.argmax())]}"
    drawn, names = from_rank_0((drawn, names))  # the fit may end elsewhere on another machine
    z = torch.tensor(drawn, dtype=torch.float32, device=codec.train_z.device)
    sampled = codec.sample(z, codec.noise(len(z), "generated")).split(num_samples)
    return Picture(
        "generate",
        "New images",
        f"z is drawn from a mixture of {num_components} Gaussians, fitted to the training latents; x_T is random. "
        "A row is a component, with its weight"
        + (" and its most frequent class." if train.labels is not None else "."),
        [""] * num_samples,
        names,
        [cells(images) for images in sampled],
    )
