"""Tests of the pictures, on a model that is trained long enough to show the expected effects."""

from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import sample as sample_program
import train as train_program
from analysis import latent_space
from analysis.grid import Cell, Grid, save_grid, to_pixels
from analysis.latent_space import slerp
from analysis.pictures import PICTURES, Arithmetic, Directions, Generate, Interpolate, Mix, Nearest, Reconstruct
from analysis.references import Chosen, choose_images
from config.errors import ConfigError
from config.reading import override
from config.schema import Data
from datasets.sources import build_dataset
from evaluation.codec import Codec
from evaluation.quality import psnr, ssim
from experiment.trained import open_trained, read_trained
from model.guidance import guided_denoiser
from tests.conftest import ROOT, launch_two, write_images

SIZE = 8


def train_on_photographs(place: Path, epochs: int) -> Path:
    """Trains a model on squares of scikit-learn's two photographs, which have real colours and textures.

    Returns the run folder. The images are beside it.
    """
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        small = Image.fromarray(photograph).reduce(3)
        corners = [
            (x, y) for y in range(0, small.height - SIZE + 1, SIZE) for x in range(0, small.width - SIZE + 1, SIZE)
        ]
        for index, (x, y) in enumerate(corners):
            folder = place / "images" / ("test" if index % 24 == 0 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            small.crop((x, y, x + SIZE, y + SIZE)).save(folder / f"{index}.png")
    settings = [
        *("data.name=folder", f"data.root={place / 'images'}", f"data.cache_dir={place / 'cache'}"),
        *("diffusion.schedule=linear", "decoder.modulation=sectioned", "training.batch_size=64"),
        *("sampling.num_images=0", "device=cpu", "evaluation.knn.k=5", "evaluation.probe.epochs=1"),
        *(f"training.epochs={epochs}", f"output_dir={place / 'run'}"),
    ]
    assert train_program.main(["--config", str(ROOT / "config" / "digits.yaml"), *settings]) == 0
    return place / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a model that is trained long enough for images to be decoded from their own x_T."""
    return train_on_photographs(tmp_path_factory.mktemp("photographs"), 8)


def codec_of(run: Path, num_sampling_steps: int) -> Codec:
    """Returns a codec of the trained model that samples, inverts and decodes in `num_sampling_steps` steps."""
    steps = f"sampling.num_sampling_steps={num_sampling_steps}"
    return Codec(*open_trained(read_trained(None, run / "checkpoints" / "last.pt", [steps])), seed=0)


@pytest.fixture(scope="module")
def codec(run: Path) -> Codec:
    """A codec with 100 sampling steps."""
    return codec_of(run, 100)


@pytest.fixture(scope="module")
def quick(run: Path) -> Codec:
    """A codec with 10 sampling steps."""
    return codec_of(run, 10)


def choose(codec: Codec, references: list[str] | None, count: int = 0) -> Chosen:
    """Returns images of the data set by reference; if `references` is None, the first `count` default images."""
    experiment = codec.experiment
    assert experiment.test is not None
    splits = {"train": experiment.train, "test": experiment.test}
    return choose_images(splits, references, count, experiment.config.seed)


def all_test_pixels(codec: Codec) -> Tensor:
    """Returns all test images, (N, 3, H, W) uint8."""
    assert codec.experiment.test is not None
    (pixels,) = codec.experiment.test.batches([range(len(codec.experiment.test))])
    return pixels


@pytest.fixture(scope="module")
def inverted(codec: Codec) -> tuple[Tensor, Tensor, Tensor]:
    """All test images in [-1, 1], their z and their x_T."""
    pixels = all_test_pixels(codec)
    z = codec.encode(pixels)
    return pixels.float() / 127.5 - 1, z, codec.invert(pixels, z)


@pytest.mark.long
def test_inverted_noise_decodes_to_the_image(run: Path, codec: Codec, inverted: tuple[Tensor, Tensor, Tensor]) -> None:
    sources, z, x_T = inverted
    half = codec_of(run, 50)
    fine = psnr(codec.decode(z, x_T), sources)
    coarse = psnr(half.decode(z, half.invert(all_test_pixels(codec), z)), sources)
    assert len(sources) > 30 and fine.min() >= 30
    assert fine.min() >= coarse.min() + 5 and fine.mean() >= coarse.mean() + 5


@pytest.mark.long
def test_inverted_noise_has_the_deviation_of_noise(tmp_path: Path) -> None:
    """After more training, x_T has a standard deviation of about 1. The images have 0.5 to 0.7."""
    codec = codec_of(train_on_photographs(tmp_path, 16), 100)
    pixels = all_test_pixels(codec)
    assert 0.9 <= codec.invert(pixels, codec.encode(pixels)).std() <= 1.1


def column(picture: Grid, index: int) -> Tensor:
    """Returns the images in a column, (rows, 3, H, W) uint8."""
    found = [row[index].image for row in picture.cells]
    return torch.stack([image for image in found if image is not None])


def test_reconstruct_shows_source_samples_and_decode_with_their_figures(codec: Codec) -> None:
    chosen = choose(codec, ["0", "train:3"])
    picture = Reconstruct(num_samples=2).draw(codec, chosen)
    assert torch.equal(column(picture, 0), chosen.pixels)
    sources = chosen.pixels.float() / 127.5 - 1
    for index in (1, 2, 4):
        shown = column(picture, index).float() / 127.5 - 1
        for row, noise, similarity in zip(picture.cells, psnr(shown, sources), ssim(shown, sources), strict=True):
            decibels, index_of_ssim = row[index].caption.removeprefix("PSNR ").split("\nSSIM ")
            # Captions are computed before the images are rounded to bytes. Rounding changes the PSNR noticeably above
            # 40 dB, and determines it above 50 dB.
            assert min(float(decibels), 50) == pytest.approx(min(noise.item(), 50), abs=3 if noise > 40 else 0.2)
            assert float(index_of_ssim) == pytest.approx(similarity.item(), abs=0.02)
    assert not torch.equal(column(picture, 1), column(picture, 2))
    assert (psnr(column(picture, 4).float() / 127.5 - 1, sources) > 30).all()


def test_psnr_and_ssim_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 3, 8, 8, generator=generator).mul(2).sub(1).unbind()
    squares = (a - b).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(psnr(a, b), 10 * torch.log10(4 / squares))
    for size in (4, 8, 13, 32):
        images = torch.rand(2, 3, size, size, generator=generator)
        torch.testing.assert_close(ssim(images, images), torch.ones(2))
    flat = torch.full((1, 3, 8, 8), 0.5)  # no variance, only means (Wang et al. 2004, eq. 6); C1 = (0.01 * 2)^2
    expected = (2 * 0.5 * 0.25 + 0.02**2) / (0.5**2 + 0.25**2 + 0.02**2)
    torch.testing.assert_close(ssim(flat, flat / 2), torch.tensor([expected]), atol=1e-4, rtol=0)


def test_an_interpolations_ends_are_its_reconstructions(quick: Codec) -> None:
    chosen = choose(quick, None, 4)
    first, second = chosen.pairs()
    picture = Interpolate(num_steps=5).draw(quick, chosen)
    rebuilt = Reconstruct(num_samples=0).draw(quick, chosen)
    ends = torch.stack([column(picture, 1), column(picture, 5)], dim=1).flatten(0, 1)
    assert (ends.int() - column(rebuilt, 2).int()).abs().max() <= 1
    assert torch.equal(column(picture, 0), first.pixels) and torch.equal(column(picture, 6), second.pixels)

    # Spherical interpolation preserves the standard deviation of x_T; linear interpolation does not.
    a, b = quick.noise(2, "a"), quick.noise(2, "b")
    middle = slerp(a, b, 0.5)
    assert middle.std().item() == pytest.approx(a.std().item(), rel=0.1) and (a.lerp(b, 0.5).std() < 0.8 * a.std())
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    angle = torch.acos(F.cosine_similarity(a.flatten(1), b.flatten(1)))
    b *= (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None, None]  # a and b have the same norm
    turned = torch.acos(F.cosine_similarity(a.flatten(1), slerp(a, b, 0.25).flatten(1)))
    torch.testing.assert_close(turned, angle / 4, atol=1e-3, rtol=0)
    z_a, z_b = quick.encode(first.pixels), quick.encode(second.pixels)
    x_a, x_b = quick.invert(first.pixels, z_a), quick.invert(second.pixels, z_b)
    quarter = quick.decode(0.75 * z_a + 0.25 * z_b, slerp(x_a, x_b, 0.25))
    assert (column(picture, 2).int() - to_pixels(quarter).int()).abs().max() <= 1


def test_components_are_those_of_the_covariance_and_move_the_latent_along_them(quick: Codec) -> None:
    units, shares = latent_space.principal_components(quick.train_z, 4)
    values, vectors = np.linalg.eigh(np.cov(quick.train_z.double().numpy().T))
    np.testing.assert_allclose(shares, values[::-1][:4] / values.sum(), rtol=1e-6)
    np.testing.assert_allclose(np.abs(np.sum(units * vectors[:, ::-1][:, :4].T, axis=1)), 1, rtol=1e-6)
    assert (np.diff(shares) < 0).all()

    # At each level, z has the quantile of the training latents along the component, and is unchanged across it.
    chosen = choose(quick, None, 2)
    picture = Directions(num_components=2, num_steps=3).draw(quick, chosen)
    assert picture.columns == ["image", "2 %", "50 %", "98 %"] and len(picture.cells) == 4
    assert f"{100 * shares[1]:.1f} %" in picture.rows[1] and f"{100 * shares[1]:.1f} %" in picture.rows[3]
    z = quick.encode(chosen.pixels)
    x_T = quick.invert(chosen.pixels, z)
    for component in (0, 1):
        vector = torch.from_numpy(vectors[:, -1 - component] * np.sign(units[component] @ vectors[:, -1 - component]))
        along, own = quick.train_z.double() @ vector, z.double() @ vector
        for index, level in ((1, 2.275), (2, 50.0), (3, 97.725)):
            target = np.percentile(along.numpy(), level)
            moved = (z.double() + (target - own)[:, None] * vector).float()
            shown = column(picture, index)[component::2]
            assert (shown.int() - to_pixels(quick.decode(moved, x_T)).int()).abs().max() <= 1
        assert not torch.equal(column(picture, 1)[component::2], column(picture, 3)[component::2])
        before = [100 * (along < each).double().mean().item() for each in own]
        assert [row.split(" at ")[1] for row in picture.rows[component::2]] == [f"{share:.0f} %" for share in before]


def test_towards_a_class_against_scikit_learn(quick: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The direction is that of linear discriminant analysis with a covariance shrunk to a multiple of the identity."""
    labels, z_train = quick.experiment.train.labels, quick.train_z.double().numpy()
    assert labels is not None
    chosen = choose(quick, None, 2)
    z = quick.encode(chosen.pixels)
    x_T = quick.invert(chosen.pixels, z)
    for label in (0, 1):
        judge = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=1).fit(z_train, labels.numpy() == label)
        unit = latent_space.mean_difference(quick.train_z, labels == label)
        assert F.cosine_similarity(torch.tensor(unit)[None], torch.tensor(judge.coef_)).item() > 1 - 1e-6
        assert np.linalg.norm(unit) == pytest.approx(1)

        name = quick.experiment.info.classes[label]
        picture = Directions(class_name=name, num_steps=3, reach=8).draw(quick, chosen)
        assert name in picture.title and picture.columns[1:] == ["0.0 %", "50 %", "100.0 %"]
        for index, position in ((1, np.min), (2, np.median), (3, np.max)):
            towards = torch.from_numpy(unit)
            moved = (z.double() + (position(z_train @ unit) - z.double() @ towards)[:, None] * towards).float()
            assert (column(picture, index).int() - to_pixels(quick.decode(moved, x_T)).int()).abs().max() <= 1
    monkeypatch.setattr(quick.experiment.train, "classes", ["1"])
    with pytest.raises(ConfigError, match="--class 1 is the only class"):
        Directions(class_name="1").find(quick.experiment)


def test_samples_have_the_settings_of_the_config(quick: Codec) -> None:
    settings = ["sampling.guidance_scale=[2, 1, 1]", "sampling.sections=[0, 2]", "sampling.num_sampling_steps=3"]
    config = override(quick.experiment.config, settings, "a test")
    codec, z, x_T = Codec(replace(quick.experiment, config=config), quick.soda, 0), quick.test_z[:2], quick.noise(2, "")
    with torch.no_grad():
        denoise = guided_denoiser(quick.soda.decoder, z, [2.0, 1.0, 1.0], [0, 2])
        expected = quick.experiment.diffusion.ddim_sample(denoise, x_T, 3)
        plain = quick.experiment.diffusion.ddim_sample(guided_denoiser(quick.soda.decoder, z), x_T, 3)
    torch.testing.assert_close(codec.sample(z, x_T), expected)
    assert expected.abs().max() <= 1 and not torch.allclose(expected, plain, atol=1e-3)


def test_from_random_noise_directions_and_mixtures_are_sampled(quick: Codec) -> None:
    """With `random`, the pictures `directions` and `mix` are sampled from random noise."""
    chosen = choose(quick, None, 2)
    first, second = chosen.pairs()
    noise, z = quick.noise(2, "sample 0"), quick.encode(chosen.pixels)
    moved = Directions(num_components=1, num_steps=2, random=True).draw(quick, chosen)
    assert moved.columns == ["image", "2 %", "98 %"]
    unit = torch.from_numpy(latent_space.principal_components(quick.train_z, 1)[0][0])
    target = np.percentile((quick.train_z.double() @ unit).numpy(), 2.275)
    low = (z.double() + (target - z.double() @ unit)[:, None] * unit).float()
    assert (column(moved, 1).int() - to_pixels(quick.sample(low, noise)).int()).abs().max() <= 1
    mixed = Mix(random=True).draw(quick, chosen)
    for index, latent in ((1, z[:1]), (4, z[1:])):
        assert (column(mixed, index).int() - to_pixels(quick.sample(latent, noise[:1])).int()).abs().max() <= 1
    assert "random noise" in moved.explanation and "random noise" in mixed.explanation
    # The sampler adds the same noise in all columns, so that columns of one z do not differ.
    config = override(quick.experiment.config, ["sampling.eta=1"], "a test")
    noisy = Codec(replace(quick.experiment, config=config), quick.soda, quick.seed)
    still = Directions(num_components=2, num_steps=3, reach=1e-6, random=True).draw(noisy, chosen)
    for index in (2, 3):
        assert (column(still, index).int() - column(still, 1).int()).abs().max() <= 1
    assert (column(still, 1).int() - column(moved, 1).repeat_interleave(2, dim=0).int()).abs().max() > 20
    assert mixed.cells[0][0].caption == first.names[0] and mixed.cells[0][5].caption == second.names[0]


def test_arithmetic_of_means_and_images(codec: Codec) -> None:
    image = choose(codec, ["2"])
    same = Arithmetic(num_samples=1).draw(codec, [0, 0, image])
    assert same.rows == ["image", "decoded from the x_T of c", "sampled from random x_T 1"]
    for row in same.cells[1:]:  # a - a + c is c
        assert row[2].image is not None and row[3].image is not None
        assert (row[2].image.int() - row[3].image.int()).abs().max() <= 1
    back = same.cells[1][2].image
    assert back is not None and psnr(back[None].float() / 127.5 - 1, image.pixels.float() / 127.5 - 1) > 30

    # If all terms are class means, all rows are sampled from random x_T. The last column shows the latent that is
    # computed by hand here.
    picture = Arithmetic(num_samples=2).draw(codec, [0, 1, 0])
    labels = codec.experiment.train.labels
    assert labels is not None and len(picture.cells) == 2
    means = [codec.train_z[labels == label].mean(dim=0) for label in (0, 1)]
    z = (2 * means[0] - means[1]).expand(2, -1)
    assert (column(picture, 3).int() - to_pixels(codec.sample(z, codec.noise(2, "sample 0"))).int()).abs().max() <= 1


def test_mixing_switches_sections_one_after_the_other(quick: Codec) -> None:
    chosen = choose(quick, None, 4)
    first, second = chosen.pairs()
    picture = Mix().draw(quick, chosen)
    assert picture.columns == ["first", "none", "section 2", "sections 1 and 2", "all", "second"]
    z_a, z_b = quick.encode(first.pixels), quick.encode(second.pixels)
    x_T = quick.invert(first.pixels, z_a)
    widths = quick.soda.decoder.section_dims
    for index, kept in enumerate((sum(widths), sum(widths[:2]), widths[0], 0), start=1):
        z = torch.cat([z_a[:, :kept], z_b[:, kept:]], dim=1)
        assert (column(picture, index).int() - to_pixels(quick.decode(z, x_T)).int()).abs().max() <= 1
    assert not torch.equal(column(picture, 1), column(picture, 4))
    one = Mix(sections=[1]).draw(quick, chosen)
    z = torch.cat([z_a[:, : widths[0]], z_b[:, widths[0] : -widths[2]], z_a[:, -widths[2] :]], dim=1)
    assert one.columns == ["first", "section 1", "second"]
    assert (column(one, 1).int() - to_pixels(quick.decode(z, x_T)).int()).abs().max() <= 1


def test_new_images_are_drawn_from_the_mixture(codec: Codec, quick: Codec) -> None:
    with mock.patch.object(quick, "sample", wraps=quick.sample) as sample:
        picture = Generate(num_components=3, num_samples=40).draw(quick, None)
    (z, _), _ = sample.call_args
    assert len(picture.cells) == 3 and len(picture.cells[0]) == 40 and z.shape == (120, codec.train_z.shape[1])
    # Under another mixture fitted to the same latents, the drawn z are about as likely as the latents. Noise with the
    # mean and standard deviation of the latents is not.
    latents = codec.train_z.double().numpy()
    other = GaussianMixture(3, reg_covar=1e-3 * latents.var(axis=0).mean(), random_state=7).fit(latents)
    strangers = latents.mean(axis=0) + latents.std(axis=0) * np.random.default_rng(0).standard_normal(
        (60, len(latents[0]))
    )
    real, new, strange = (np.median(other.score_samples(some)) for some in (latents, z.double().numpy(), strangers))
    assert abs(new - real) < 0.2 * abs(real - strange)
    weights = [float(row.split(": ")[1].split(" %")[0]) for row in picture.rows]
    assert weights == sorted(weights, reverse=True) and 98 <= sum(weights) <= 102


def test_the_nearest_images_are_scikit_learns_without_the_query_itself(codec: Codec) -> None:
    bank = F.normalize(codec.train_z).numpy()
    for split, own in (("test", 0), ("train", 1)):
        chosen = choose(codec, [f"{split}:{i}" for i in range(0, 36, 9)])
        queries = F.normalize(codec.encode(chosen.pixels)).numpy()
        distances, indices = NearestNeighbors(n_neighbors=3 + own, algorithm="brute").fit(bank).kneighbors(queries)
        picture = Nearest(num_neighbours=3).draw(codec, chosen)
        for row, places, far in zip(picture.cells, indices[:, own:], distances[:, own:], strict=True):
            captions = [cell.caption.rsplit("\n", 1) for cell in row[1:]]
            assert [name.split("\n")[-1] for name, _ in captions] == [f"train:{place}" for place in places]
            assert [float(distance) for _, distance in captions] == pytest.approx(far, abs=6e-4)
            for cell, place in zip(row[1:], places, strict=True):
                (pixels,) = codec.experiment.train.batches([torch.tensor([place])])
                assert cell.image is not None and torch.equal(cell.image, pixels[0])
    everything = len(codec.experiment.train)
    Nearest(num_neighbours=everything, images=["test:0"]).find(codec.experiment)
    with pytest.raises(ConfigError, match=rf"use at most {everything - 1} \(all other training images\)"):
        Nearest(num_neighbours=everything, images=["train:0"]).find(codec.experiment)


@pytest.mark.parametrize("stream", [False, True])
def test_a_file_of_the_data_set_is_its_image(stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path / "photos", train_x=3, test_x=2, train_y=1, test_y=1)
    other = write_images(tmp_path / "elsewhere", train_x=1, z=1)
    (root / "train" / "z").symlink_to(other / "z")
    data = Data(name="folder", root=str(root), cache_dir=str(tmp_path / "cache"), image_size=8, stream=stream)
    train, test = build_dataset(data)[:2]
    assert test is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.png").symlink_to(root / "train" / "x" / "2.png")
    files = ["photos/train/x/1.png", str(root / "test" / "x" / "0.png"), "link.png", "photos/train/z/0.png"]
    files.append(str(other / "train" / "x" / "0.png"))
    chosen = choose_images({"train": train, "test": test}, files, 0, 0)
    assert chosen.names == ["x\ntrain:1", "x\ntest:0", "x\ntrain:2", "z\ntrain:4", "0.png"]
    assert chosen.train_indices == [1, None, 2, 4, None]
    for pixels, file in zip(chosen.pixels, files, strict=True):
        assert torch.equal(pixels, torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1))
    unlabelled = build_dataset(data.model_copy(update={"root": str(root / "train" / "x")}))[0]
    assert choose_images({"train": unlabelled}, ["2"], 0, 0).names == ["2.png\ntrain:2"]


def test_a_picture_file_holds_each_image_in_its_place(tmp_path: Path) -> None:
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]]
    rows = [
        [Cell(torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 8, 8), "below") for colour in row]
        for row in colours
    ]
    rows[1].append(Cell())
    rows[0].append(Cell(torch.zeros(3, 8, 8, dtype=torch.uint8)))
    save_grid(Grid("A title", "An explanation.", ["a", "b", "c"], ["one", "two"], rows), tmp_path / "a.png", "made so")
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    boxes = {}
    for row in colours:
        for colour in row:
            y, x = np.nonzero((pixels == colour).all(axis=2))
            assert len(y) == 72 * 72 and np.ptp(y) == np.ptp(x) == 71
            boxes[colour] = int(y[0]), int(x[0])
    (top, left), (same_top, right), (bottom, same_left), (_, same_right) = boxes.values()
    assert top == same_top < bottom and left == same_left < right == same_right


def test_every_picture_checks_its_numbers() -> None:
    for picture in PICTURES.values():
        minimums = {each.name: each.metadata["minimum"] for each in fields(picture)}
        numbers = {option: minimum for option, minimum in minimums.items() if minimum is not None}
        for option, minimum in numbers.items():
            picture(**{option: minimum})
            with pytest.raises(ConfigError, match=f"--{option} {minimum - 1} is too small: use at least {minimum}"):
                picture(**{option: minimum - 1})


COMMANDS: list[list[str]] = [  # interpolate and mix divide their work among processes as reconstruct does
    ["reconstruct", "--num_images", "5", "--num_samples", "4"],
    ["directions", "--class", "flower", "--random"],
    ["arithmetic", "--terms", "class:china", "class:flower", "{photograph}"],
    ["generate", "--num_components", "3"],
    ["nearest", "--num_neighbours", "4"],
]


@pytest.mark.long
def test_two_processes_draw_the_same_file_as_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files are identical in every byte. Another seed gives another picture."""
    photograph = next((run.parent / "images" / "test" / "flower").iterdir())
    quick = ["sampling.num_sampling_steps=3", "sampling.eta=0.5", "--checkpoint", str(run / "checkpoints" / "last.pt")]
    cases = [[word.replace("{photograph}", str(photograph)) for word in words] for words in COMMANDS]
    drawn: dict[str, list[bytes]] = {"alone": [], "seed": []}
    for index, (name, *options) in enumerate(cases):
        for folder, more in (("alone", []), ("seed", ["--seed", "5"])):
            if folder == "seed" and name not in ("reconstruct", "generate"):
                continue
            out = tmp_path / folder / f"{index}.png"
            assert sample_program.main([name, *quick, *options, *more, "--out", str(out)]) == 0
            assert capsys.readouterr().out.endswith(f"{out}\n")
            drawn[folder].append(out.read_bytes())
    assert len({*drawn["alone"], *drawn["seed"]}) == len(cases) + 2

    torch.save([[name, *quick, *options] for name, *options in cases], tmp_path / "cases.pt")
    launch_two("-m", "tests.processes", "pictures", str(tmp_path))
    for index, expected in enumerate(drawn["alone"]):
        assert (tmp_path / "together" / f"{index}.png").read_bytes() == expected, cases[index]
