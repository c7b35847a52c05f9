"""Tests of the source and target views, and of the views of the evaluation."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from config.schema import ProbeView, SourceView, View
from config.schema import Views as ViewsConfig
from datasets.augmentation import Augmentation, Draw, augment
from datasets.operations import crop_by_products
from datasets.views import Views
from utils.randomness import uniforms

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PLAIN: dict[str, Any] = {"crop_flip_probability": 0.0, "randaugment_probability": 0.0}


def views(source: dict | None = None, target: dict | None = None, decoder_size: int = 16) -> Views:
    """Returns views of 16 px with these settings of the source and target view."""
    config = ViewsConfig(source=SourceView(**source or {}), target=View(**target or {}))
    return Views(config, encoder_size=16, decoder_size=decoder_size, mean=MEAN, std=STD, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """Twelve random images (12, 3, 16, 16) uint8."""
    return torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def drawn(samples: range) -> Draw:
    """Returns the function that draws the random numbers of these samples."""
    return lambda columns, stream="": uniforms(samples, columns, 0, "view" + stream)


def target_view(ours: Views, pixels: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Returns the target view of each image, (N, 3, S, S) in [-1, 1]."""
    return ours.pair(pixels, [(draw, torch.zeros(pixels.shape))], draw)[1]


DRAW = drawn(range(100, 112))


def test_a_view_is_a_function_of_the_image_and_its_numbers(pixels: torch.Tensor) -> None:
    noise = torch.zeros(12, 3, 16, 16)
    state = torch.random.get_rng_state()
    whole = views().source(pixels, (DRAW, noise))
    assert torch.equal(views().source(pixels[4:8], (drawn(range(104, 108)), noise[4:8])), whole[4:8])
    assert torch.equal(torch.random.get_rng_state(), state), "the view changed the global random state"
    same_image = target_view(views(), pixels[:1].expand(12, -1, -1, -1), DRAW)
    assert len(torch.unique(same_image.flatten(1), dim=0)) > 8, "different random numbers should give different views"


def test_a_pair_is_source_and_target_as_they_are_alone(pixels: torch.Tensor) -> None:
    noise, other = torch.randn(12, 3, 16, 16), drawn(range(300, 312))
    blur, colours = {"blur_probability": 0.5}, {"color_jitter_probability": 0.5}
    many = {"randaugment_num_ops": 3, "randaugment_magnitude": 20}
    for source, target in (
        ({}, {}),
        ({}, PLAIN),
        ({}, many),
        ({}, {"affine_probability": 1.0}),
        ({}, blur),
        (blur, PLAIN),
        (blur, colours | blur),
    ):
        ours = views(source, target)
        x_source, x_start = ours.pair(pixels, [(DRAW, noise)], other)
        assert torch.equal(x_source[:, 0], ours.source(pixels, (DRAW, noise)))
        augmented = augment(pixels, Augmentation(View(**target), 16).parameters(other))
        assert torch.equal(x_start, augmented / 127.5 - 1) and torch.equal(x_start, ours.x_start(augmented))


def test_several_source_views_are_drawn_together_as_each_alone(pixels: torch.Tensor) -> None:
    sources = [(drawn(range(start, start + 12)), torch.randn(12, 3, 16, 16)) for start in (100, 300, 500)]
    x_source, x_start = views().pair(pixels, sources, DRAW)
    assert x_source.shape == (12, 3, 3, 16, 16) and torch.equal(x_start, target_view(views(), pixels, DRAW))
    for view, source in zip(x_source.unbind(dim=1), sources, strict=True):
        assert torch.equal(view, views().source(pixels, source))


def test_plain_views_are_only_scaled(pixels: torch.Tensor) -> None:
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    noise = torch.randn(12, 3, 16, 16)
    ours = views(source=PLAIN | {"noise_std": 0.25}, target=PLAIN)
    torch.testing.assert_close(ours.evaluation(pixels), normalise(pixels))
    torch.testing.assert_close(ours.augmented(pixels, DRAW, ProbeView(**PLAIN)), normalise(pixels))
    torch.testing.assert_close(ours.source(pixels, (DRAW, noise)), normalise(pixels) + 0.25 * noise)
    torch.testing.assert_close(target_view(ours, pixels, DRAW), pixels / 127.5 - 1)
    torch.testing.assert_close(ours.denormalize(ours.evaluation(pixels)), pixels / 255)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_the_decoders_images_are_averaged_after_the_views_are_drawn(pixels: torch.Tensor, factor: int) -> None:
    def averaged(images: torch.Tensor) -> torch.Tensor:
        return images.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).mean(dim=(3, 5))

    ours, sources = views(decoder_size=16 // factor), [(DRAW, torch.randn(12, 3, 16, 16))]
    x_source, x_start = ours.pair(pixels, sources, DRAW)
    same_source, whole = views().pair(pixels, sources, DRAW)
    assert torch.equal(x_source, same_source), "the decoder's size must not change the source view"
    torch.testing.assert_close(x_start, averaged(whole))
    torch.testing.assert_close(ours.x_start_of(ours.evaluation(pixels)), averaged(pixels / 127.5 - 1))
    clean = ours.x_start(pixels)
    for image, found in zip(pixels, clean, strict=True):  # Pillow rounds to levels
        reduced = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).reduce(factor))
        assert np.abs(found.permute(1, 2, 0).numpy() * 127.5 + 127.5 - reduced).max() < 0.51


@pytest.mark.parametrize("size", [40, 24, 9])
def test_stored_images_are_cropped_and_resized_as_by_torchvision(size: int) -> None:
    pixels = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parameters = Augmentation(View(randaugment_probability=0.0), size, 64).parameters(drawn(range(40)))
    boxes = parameters.boxes
    assert len(boxes.unique(dim=0)) > 30 and boxes[:, 2:4].max() > size and boxes[:, 4].unique().tolist() == [0, 1]
    expected = []
    for image, (left, top, width, height, flip) in zip(pixels, boxes.int().tolist(), strict=True):
        resized = tv.resized_crop(image.float(), top, left, height, width, [size, size], antialias=True)
        expected.append(resized.flip(-1) if flip else resized)
    one_by_one, together = augment(pixels, parameters, size), crop_by_products(pixels, boxes, size)
    assert (one_by_one - torch.stack(expected).round()).abs().max() <= 1
    assert (together - torch.stack(expected)).abs().max() <= 0.501


def test_views_of_stored_images_have_their_own_sizes_and_operations() -> None:
    """Each view is cropped from the stored image. RandAugment's operations are those for the size of the view."""
    pixels = torch.randint(0, 256, (12, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = ViewsConfig(source=SourceView(), target=View(affine_probability=0.5))
    ours = Views(
        config, encoder_size=32, decoder_size=16, stored_size=48, mean=MEAN, std=STD, device=torch.device("cpu")
    )
    noises = [torch.randn(12, 3, 32, 32) for _ in range(2)]
    draws = [DRAW, drawn(range(300, 312))]
    x_source, x_start = ours.pair(pixels, list(zip(draws, noises, strict=True)), DRAW)
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    for view, draw, noise in zip(x_source.unbind(dim=1), draws, noises, strict=True):
        augmented = augment(pixels, Augmentation(config.source, 32, 48).parameters(draw), 32)
        torch.testing.assert_close(view, normalise(augmented) + config.source.noise_std * noise)
        assert torch.equal(view, ours.source(pixels, (draw, noise)))
    target = augment(pixels, Augmentation(config.target, 16, 48).parameters(DRAW), 16)
    torch.testing.assert_close(x_start, target / 127.5 - 1)
    probed = augment(pixels, Augmentation(ProbeView(), 32, 48).parameters(DRAW), 32)
    torch.testing.assert_close(ours.augmented(pixels, DRAW, ProbeView()), normalise(probed))


@pytest.mark.parametrize("threads", [2, 3])
def test_views_do_not_depend_on_the_parts_that_threads_share(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, (23, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise, draw = torch.randn(23, 3, 16, 16), drawn(range(23))
    expected = *views().pair(pixels, [(draw, noise)], draw), views().evaluation(pixels)
    monkeypatch.setattr("datasets.views.CPU_CHUNK", 5 * 16**2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = *views().pair(pixels, [(draw, noise)], draw), views().evaluation(pixels)
        assert views().evaluation(pixels[:0]).shape == (0, 3, 16, 16)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_clean_views_of_stored_images_are_resized_as_by_pillow() -> None:
    pixels = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = Views(
        ViewsConfig(), encoder_size=32, decoder_size=16, stored_size=48, mean=MEAN, std=STD, device=torch.device("cpu")
    )
    for size, found in (
        (32, ours.denormalize(ours.evaluation(pixels)) * 255),
        (16, ours.x_start(pixels) * 127.5 + 127.5),
    ):
        for image, levels in zip(pixels, found, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BILINEAR)
            assert np.abs(levels.permute(1, 2, 0).numpy() - np.asarray(picture)).max() < 1.01


def test_flip_and_its_probability(pixels: torch.Tensor) -> None:
    whole = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "randaugment_probability": 0.0}
    images = pixels[:1].expand(600, -1, -1, -1)
    flipped = target_view(views(target=whole | {"crop_flip_probability": 0.8}), images, drawn(range(600)))
    plain = images / 127.5 - 1
    is_plain = torch.isclose(flipped, plain).flatten(1).all(dim=1)
    is_flipped = torch.isclose(flipped, plain.flip(-1)).flatten(1).all(dim=1)
    assert (is_plain ^ is_flipped).all()
    assert abs(is_flipped.float().mean().item() - 0.4) < 0.06  # 0.8 x 0.5, within three standard deviations


def test_crops_follow_their_scale() -> None:
    # In a horizontal ramp, the range of a crop's values gives the width of the crop.
    ramp = torch.arange(0, 256, 16, dtype=torch.uint8).expand(300, 3, 16, 16).contiguous()
    crop = {"crop_flip_probability": 1.0, "crop_scale": [0.25, 0.25], "crop_ratio": [1.0, 1.0], "flip_probability": 0.0}
    cropped = target_view(views(target=crop | {"randaugment_probability": 0.0}), ramp, drawn(range(300)))
    width = (cropped.amax(dim=(1, 2, 3)) - cropped.amin(dim=(1, 2, 3))) * 127.5 / 16 + 1
    assert width.min() >= 7 and width.max() <= 9, "a quarter of the area should be half of the width, 8 px"


def test_affine_moves_within_its_bounds() -> None:
    dot = torch.zeros(200, 3, 16, 16, dtype=torch.uint8)
    dot[:, :, 7:9, 7:9] = 255
    moved = target_view(
        views(target=PLAIN | {"affine_probability": 1.0, "affine_translate": 0.25}), dot, drawn(range(200))
    )
    weight = (moved[:, 0] + 1).clamp(min=0)
    columns = (weight.sum(dim=1) * torch.arange(16)).sum(dim=1) / weight.sum(dim=(1, 2)) - 7.5
    assert -4.01 <= columns.min() < -3 and 3 < columns.max() <= 4.01


def test_source_and_target_are_configured_apart(pixels: torch.Tensor) -> None:
    ours = views(source={"noise_std": 0.0}, target=PLAIN)
    assert torch.equal(target_view(ours, pixels, DRAW), pixels / 127.5 - 1)
    assert not torch.isclose(ours.source(pixels, (DRAW, torch.zeros(12, 3, 16, 16))), ours.evaluation(pixels)).all()


def test_the_evaluations_view_is_augmented_as_asked(pixels: torch.Tensor) -> None:
    plain = views().evaluation(pixels)
    flip = ProbeView(crop_flip_probability=1.0, crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip_probability=1.0)
    torch.testing.assert_close(views().augmented(pixels, DRAW, flip), plain.flip(-1))
    changed = ~torch.isclose(views().augmented(pixels, DRAW, ProbeView()), plain).flatten(1).all(dim=1)
    assert 0 < changed.sum() < 12, "crop and flip should apply to some images, with probability 0.65"


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (ProbeView(), "crop 0.08-1 ratio 0.75-1.33333 flip 0.5 (p=0.65)"),
        (ProbeView(**PLAIN), "clean"),
        (
            View(affine_probability=1.0, affine_degrees=10.0),
            "flip 0.5 (p=0.95) + RandAugment 2x9 (p=0.65) + affine 10 deg 0 x1-1 shear 0 (p=1)",
        ),
        (
            View(**PLAIN, grayscale_probability=0.2, blur_probability=0.5, blur_sigma=[0.1, 1.5]),
            "grey (p=0.2) + blur 0.1-1.5 (p=0.5)",
        ),
    ],
)
def test_views_say_what_they_do(view: View, words: str) -> None:
    assert str(view).endswith(words)
