"""Pictures of the space of latents: its directions, its arithmetic, and new points of it."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from analysis.codec import Codec
from analysis.picture import Cell, Picture, cells
from analysis.pictures import INVERTED
from analysis.references import Chosen
from utils.distributed import from_rank_0, rank
from utils.randomness import derive_seed, generator

T = TypeVar("T")

MAX_FIT = 50_000  # latents: of more, copies in float64 take gigabytes
RIDGE = 1e-3  # of the latents' mean variance, added to each component's covariance


def principal_components(latents: Tensor, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of latents (N, D): unit directions (count, D), deviations along them, shares of the variance; largest first."""
    from sklearn.decomposition import PCA

    pca = PCA(count, svd_solver="covariance_eigh").fit(latents.cpu().double().numpy())
    return pca.components_, np.sqrt(pca.explained_variance_), pca.explained_variance_ratio_


def class_direction(latents: Tensor, labels: Tensor, label: int) -> tuple[np.ndarray, float]:
    """The unit direction (D,) of a linear classifier of a class, and the deviation of the latents along it.

    The classifier is scikit-learn's logistic regression, of the class against all others, on latents scaled to
    deviation 1 in each dimension; the direction is that of its weights there, as in Diffusion Autoencoders
    (Preechakul et al. 2022).
    """
    from sklearn.linear_model import LogisticRegression

    z = latents.cpu().double().numpy()
    std = z.std(axis=0).clip(1e-12)
    model = LogisticRegression(max_iter=1000).fit((z - z.mean(axis=0)) / std, labels.cpu().numpy() == label)
    direction = model.coef_[0] * std  # from the scaled space back to z
    direction /= np.linalg.norm(direction)
    return direction, float((z @ direction).std())


def fit_latents(codec: Codec) -> tuple[Tensor, Tensor | None]:
    """z and labels of the training images that something is fitted to: of MAX_FIT at most, chosen by the run's seed."""
    train = codec.experiment.train
    order = torch.randperm(len(train), generator=generator(codec.experiment.config.seed, "fit"))[:MAX_FIT].sort().values
    return codec.train_z.cpu()[order], None if train.labels is None else train.labels[order]


def on_rank_0(fit: Callable[[], T]) -> T:
    """What rank 0 finds, for all: elsewhere it might come out otherwise."""
    return from_rank_0(fit() if rank() == 0 else None)  # type: ignore[return-value]


def directions(
    codec: Codec,
    chosen: Chosen,
    num_components: int,
    num_steps: int,
    reach: float,
    label: int | None,
    random: bool = False,
) -> Picture:
    """Each image's z moved both ways along principal components, or towards a class, its x_T staying.

    Args:
        random: start from random noise, the same for all of an image's, instead of the image's own x_T.
        reach: how far, in deviations of the training latents along the direction.
        label: of the class to move towards, instead of along components.
    """
    classes, (latents, labels) = codec.experiment.train.classes, fit_latents(codec)
    if label is None:
        units, deviations, shares = on_rank_0(lambda: principal_components(latents, num_components))
        names = [f"component {i + 1}: {100 * share:.1f} % of the variance" for i, share in enumerate(shares)]
    else:
        assert labels is not None, "a class has been found"
        unit, deviation = on_rank_0(lambda: class_direction(latents, labels, label))
        units, deviations, names = unit[None], np.array([deviation]), [f"towards class {classes[label]}"]
    z = codec.encode(chosen.pixels)
    x_T = codec.noise(len(chosen), "sample 0") if random else codec.invert(chosen.pixels, z)
    decode = codec.sample if random else codec.decode
    steps = torch.tensor(units * deviations[:, None], dtype=torch.float32, device=z.device)
    amounts = torch.linspace(-reach, reach, num_steps).tolist()
    moved = torch.stack([z[:, None] + amount * steps for amount in amounts], dim=2)  # (N, directions, amounts, D)
    each = len(units) * len(amounts)
    decoded = decode(moved.flatten(0, 2), x_T.repeat_interleave(each, dim=0)).split(len(amounts))
    rows = []
    for i, images in enumerate(decoded):
        image, direction = divmod(i, len(units))
        source = Cell(chosen.pixels[image], chosen.names[image]) if direction == 0 else Cell()
        rows.append([source, *cells(images)])
    title = (
        "Along the principal components of the latents"
        if label is None
        else f"Towards class {classes[label]}, and away"
    )
    return Picture(
        "directions",
        title,
        "z moves by so many deviations of the training latents along each direction; "
        + ("x_T is random noise" if random else f"{INVERTED} of the image")
        + ", the same in all columns.",
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
    if num_samples:
        noise = codec.noise(num_samples, "sample 0").repeat_interleave(4, dim=0)
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

    (latents, labels), classes = fit_latents(codec), codec.experiment.train.classes
    random_state = derive_seed(codec.seed, "mixture") % 2**32

    def draw() -> tuple[np.ndarray, list[str]]:
        z = latents.double().numpy()
        ridge = RIDGE * float(z.var(axis=0).mean())
        mixture = GaussianMixture(num_components, reg_covar=ridge, random_state=random_state).fit(z)
        order = np.argsort(-mixture.weights_, kind="stable")
        source = np.random.default_rng(random_state)
        parameters = [(mixture.means_[i], mixture.covariances_[i]) for i in order]
        drawn = [source.multivariate_normal(*each, num_samples, method="cholesky") for each in parameters]
        names = [f"component {row + 1}: {100 * mixture.weights_[i]:.0f} %" for row, i in enumerate(order)]
        if labels is not None:
            assigned = mixture.predict(z)
            for row, i in enumerate(order):
                counts = np.bincount(labels.numpy()[assigned == i], minlength=len(classes))
                names[row] += f"\n{100 * counts.max() / max(1, counts.sum()):.0f} % {classes[int(counts.argmax())]}"
        return np.concatenate(drawn), names

    drawn, names = on_rank_0(draw)
    z = torch.tensor(drawn, dtype=torch.float32, device=codec.experiment.device)
    sampled = codec.sample(z, codec.noise(len(z), "generated")).split(num_samples)
    return Picture(
        "generate",
        "New images",
        f"z is drawn from a mixture of {num_components} Gaussians, fitted to the training latents; x_T is random. "
        "A row is a component, with its weight" + (" and its most frequent class." if labels is not None else "."),
        [""] * num_samples,
        names,
        [cells(images) for images in sampled],
    )
