"""Tests of the batched augmentation against torchvision, which augments one sample at a time."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from config.schema import View
from datasets.augmentation import (
    IDENTITY,
    INDEX,
    NUM_BINS,
    RANDAUGMENT,
    Augmentation,
    Draw,
    Parameters,
    augment,
    operation_matrices,
)
from datasets.operations import GREY, OPERATIONS, operate, shift
from utils.randomness import uniforms

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
EXACT = ("Identity", *GEOMETRIC, "Posterize", "Solarize", "Equalize")
NAMES = list(OPERATIONS)
THEIRS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Identity": lambda image, m: image,
    "ShearX": lambda image, m: tv.affine(image, 0.0, [0, 0], 1.0, [math.degrees(math.atan(m)), 0.0], center=[0, 0]),
    "ShearY": lambda image, m: tv.affine(image, 0.0, [0, 0], 1.0, [0.0, math.degrees(math.atan(m))], center=[0, 0]),
    "TranslateX": lambda image, m: tv.affine(image, 0.0, [int(m), 0], 1.0, [0.0, 0.0]),
    "TranslateY": lambda image, m: tv.affine(image, 0.0, [0, int(m)], 1.0, [0.0, 0.0]),
    "Rotate": lambda image, m: tv.rotate(image, m),
    "Brightness": lambda image, m: tv.adjust_brightness(image, 1 + m),
    "Color": lambda image, m: tv.adjust_saturation(image, 1 + m),
    "Contrast": lambda image, m: tv.adjust_contrast(image, 1 + m),
    "Sharpness": lambda image, m: tv.adjust_sharpness(image, 1 + m),
    "Posterize": lambda image, m: tv.posterize(image, int(m)),
    "Solarize": lambda image, m: tv.solarize(image, m),
    "AutoContrast": lambda image, m: tv.autocontrast(image),
    "Equalize": lambda image, m: tv.equalize(image),
    "Hue": lambda image, m: tv.adjust_hue(image, m),
    "GaussianBlur": lambda image, m: tv.gaussian_blur(image, 3, m),  # the width for images of less than 40 px
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random(count: int) -> Draw:
    """Returns a function that draws uniform random numbers for `count` samples."""
    return lambda columns, stream="": torch.rand(count, columns)


def pictures(count: int, size: int) -> Tensor:
    """Returns images (count, 3, size, size) uint8: smooth ones, noise, dark ones, and one of a single level."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = (F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255).byte()
    images[::4] = torch.randint(0, 256, images[::4].shape, generator=generator, dtype=torch.uint8)
    images[1::8] //= 3
    images[2] = 77
    return images


def unchanged(count: int, size: int) -> Parameters:
    """Returns parameters that do not change the images."""
    return Parameters(
        torch.tensor([[0.0, 0.0, size, size, 0.0]]).expand(count, 5),
        torch.zeros(count, 1, dtype=torch.int64),
        torch.zeros(count, 1),
        torch.zeros(count, 1, 2, 3),
        None,
    )


def operating(count: int, size: int, operations: Tensor, strengths: Tensor) -> Parameters:
    """Returns parameters that apply one operation to each sample; `operations` and `strengths` are (count,)."""
    matrices = operation_matrices(operations, strengths, size)[:, None]
    return replace(
        unchanged(count, size), operations=operations[:, None], strengths=strengths[:, None], matrices=matrices
    )


@pytest.mark.parametrize("bin_", [5, 9, 30])
@pytest.mark.parametrize("name", RANDAUGMENT)
def test_each_operation_is_torchvisions(name: str, bin_: int) -> None:
    images, index = pictures(32, 32), INDEX[name]
    of_bin, signed = RANDAUGMENT[name]
    strength = of_bin(bin_, 32)
    strengths = torch.tensor([strength, -strength if signed else strength] * 16)
    ours = augment(images, operating(32, 32, torch.full((32,), index), strengths))
    theirs = torch.stack([THEIRS[name](image, m) for image, m in zip(images, strengths.tolist(), strict=True)])
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= (0 if name in EXACT else 1) and difference.float().mean() < 0.01
    assert name == "Identity" or not torch.equal(ours, images)


@pytest.mark.parametrize("turns", [0.5, 0.1, 0.0, -0.03, -0.5])
def test_turning_the_hue_is_torchvisions(turns: float) -> None:
    images = pictures(32, 32)
    ours = augment(images, operating(32, 32, torch.full((32,), INDEX["Hue"]), torch.full((32,), turns)))
    difference = (ours.int() - tv.adjust_hue(images, turns).int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.02


def test_colours_are_changed_as_torchvision_would() -> None:
    """Each sample gets torchvision's operations in its own order and with its own factors. Some become grey."""
    images = pictures(60, 16)
    view = View(
        crop_flip_probability=0.0,
        randaugment_probability=0.0,
        color_jitter_probability=0.8,
        color_jitter=[0.4, 0.3, 0.2, 0.1],
        grayscale_probability=0.2,
    )
    drawn = Augmentation(view, 16).parameters(random(60))
    ours = augment(images, drawn)
    for sample in range(60):
        expected = images[sample]
        for operation, m in zip(drawn.operations[sample].tolist(), drawn.strengths[sample].tolist(), strict=True):
            expected = THEIRS[NAMES[operation]](expected, m)
        if drawn.strengths[sample, -1] == -1:
            torch.testing.assert_close(expected, tv.rgb_to_grayscale(expected, 3), atol=1, rtol=0)
            assert torch.equal(ours[sample, 0], ours[sample, 2])
        assert (ours[sample].int() - expected.int()).abs().float().mean() < 1


def test_colours_follow_torchvisions_distribution() -> None:
    view = View(
        randaugment_probability=0.0,
        color_jitter_probability=0.8,
        color_jitter=[0.4, 1.5, 0.2, 0.1],
        grayscale_probability=0.2,
    )
    drawn = Augmentation(view, 16).parameters(random(24_000))
    rounds, strengths = drawn.operations[:, 2:6], drawn.strengths[:, 2:6]
    jittered = rounds.any(dim=1)
    assert abs(jittered.float().mean() - 0.8) < 0.02
    orders = rounds[jittered].unique(dim=0, return_counts=True)[1]
    assert len(orders) == 24 and (orders / jittered.sum() - 1 / 24).abs().max() < 0.01, (
        "all 24 orders are equally likely"
    )
    theirs = v2.ColorJitter(0.4, 1.5, 0.2, 0.1)
    for name, (low, high), centre in (
        ("Brightness", theirs.brightness, 1),
        ("Contrast", theirs.contrast, 1),
        ("Color", theirs.saturation, 1),
        ("Hue", theirs.hue, 0),
    ):
        found = strengths[rounds == INDEX[name]] + centre
        assert low <= found.min() < low + 0.01 and high - 0.01 < found.max() <= high
        assert abs(found.mean() - (low + high) / 2) < 0.01 * (high - low) * 2, name
    assert abs((drawn.operations[:, 6] == INDEX["Color"]).float().mean() - 0.2) < 0.02
    assert drawn.strengths[:, 6].unique().tolist() == [-1, 0]
    plain = Augmentation(View(randaugment_probability=0.0), 16).parameters(random(9))
    assert plain.operations.shape == (9, 2), (
        "a view without colour jitter and greyscale must have no operations for them"
    )


def test_greyscale_needs_no_colour_jitter() -> None:
    """Without colour jitter, some samples become torchvision's greyscale image, and all others do not change."""
    images = pictures(400, 16)
    view = View(crop_flip_probability=0.0, randaugment_probability=0.0, grayscale_probability=0.3)
    drawn = Augmentation(view, 16).parameters(random(400))
    is_grey = drawn.operations[:, -1] == INDEX["Color"]
    expected = torch.where(is_grey[:, None, None, None], tv.rgb_to_grayscale(images, 3), images)
    assert torch.equal(augment(images, drawn), expected)
    assert abs(is_grey.float().mean() - 0.3) < 0.08


@pytest.mark.parametrize(("size", "width"), [(8, 3), (32, 3), (39, 3), (64, 7), (96, 9), (224, 23)])
def test_blur_is_torchvisions(size: int, width: int) -> None:
    """Each sample is blurred by its own standard deviation; `width` is that of SimCLR's kernel."""
    images, sigmas = pictures(8, size), torch.tensor([0.1, 0.3, 0.5, 0.7, 1.0, 1.3, 2.0, 50.0])
    ours = augment(images, operating(8, size, torch.full((8,), INDEX["GaussianBlur"]), sigmas))
    theirs = torch.stack([tv.gaussian_blur(image, width, s) for image, s in zip(images, sigmas.tolist(), strict=True)])
    # torchvision convolves once by a square kernel, ours once along each axis. In float32, a value close to the middle
    # of two levels may then be rounded the other way.
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 1e-3
    assert torch.equal(ours[0], images[0]) and not torch.equal(ours[4], images[4])


def test_blur_follows_torchvisions_distribution() -> None:
    view = View(randaugment_probability=0.0, blur_probability=0.3, blur_sigma=[0.5, 1.5])
    drawn = Augmentation(view, 16).parameters(random(40_000))
    blurred = drawn.operations[:, -1] == INDEX["GaussianBlur"]
    theirs = v2.RandomApply([v2.GaussianBlur(3, (0.5, 1.5))], p=0.3)
    assert abs(blurred.float().mean() - theirs.p) < 0.01
    sigmas = torch.tensor([theirs.transforms[0].make_params([])["sigma"][0] for _ in range(10_000)])
    levels = torch.linspace(0, 1, 21)
    torch.testing.assert_close(
        drawn.strengths[blurred, -1].quantile(levels), sigmas.quantile(levels), atol=0.03, rtol=0
    )


def test_blur_comes_after_the_colours_and_before_the_affine_transform() -> None:
    images = pictures(60, 16)
    view = View(
        crop_flip_probability=0.0,
        randaugment_probability=0.0,
        color_jitter_probability=0.8,
        blur_probability=0.5,
        affine_probability=1.0,
        affine_translate=0.3,
    )
    drawn = Augmentation(view, 16).parameters(random(60))
    assert drawn.operations[:, -1].unique().tolist() == [0, INDEX["GaussianBlur"]] and drawn.moves is not None
    assert not (drawn.operations[:, :-1] == INDEX["GaussianBlur"]).any()
    ours = augment(images, drawn)
    for sample in range(60):
        expected = images[sample]
        for operation, m in zip(drawn.operations[sample].tolist(), drawn.strengths[sample].tolist(), strict=True):
            expected = THEIRS[NAMES[operation]](expected, m)
        shift = (-drawn.moves[sample, :, 2]).round().int().tolist()
        expected = tv.affine(expected, 0.0, shift, 1.0, [0.0, 0.0])
        assert (ours[sample].int() - expected.int()).abs().float().mean() < 1


def test_blur_shifts_no_other_random_number() -> None:
    streams: list[str] = []

    def draw(columns: int, stream: str = "") -> Tensor:
        streams.append(stream)
        return uniforms(range(50), columns, 0, "view" + stream)

    view = View(color_jitter_probability=0.5, affine_probability=0.5, affine_degrees=20.0)
    plain = Augmentation(view, 16).parameters(draw)
    assert streams == ["", " colours"], "a view without blur must not draw numbers for it"
    blurred = Augmentation(view.model_copy(update={"blur_probability": 0.5}), 16).parameters(draw)
    assert streams[2:] == ["", " colours", " blur"]
    num_ops = plain.operations.shape[1]
    assert blurred.operations.shape[1] == num_ops + 1
    for name in ("operations", "strengths", "matrices"):
        assert torch.equal(getattr(plain, name), getattr(blurred, name)[:, :num_ops])
    assert torch.equal(plain.boxes, blurred.boxes)
    assert plain.moves is not None and blurred.moves is not None and torch.equal(plain.moves, blurred.moves)


def test_strengths_are_torchvisions() -> None:
    space = v2.RandAugment._AUGMENTATION_SPACE
    assert set(space) == set(RANDAUGMENT)
    for bin_ in range(NUM_BINS):
        for name, (strength, signed) in RANDAUGMENT.items():
            ours, of_bins = strength(bin_, 32), space[name][0](NUM_BINS, 32, 32)
            assert signed == space[name][1]
            theirs = 0.0 if of_bins is None else float(of_bins[bin_])
            if name.startswith("Translate"):
                theirs = int(theirs)
            if name == "Solarize":
                theirs = torch.tensor(255 * theirs).ceil().item()
            assert ours == pytest.approx(theirs, rel=1e-6), (name, bin_)


@pytest.mark.parametrize("bin_", range(NUM_BINS))
def test_solarize_at_every_level_and_bin(bin_: int) -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    strength = torch.tensor([RANDAUGMENT["Solarize"][0](bin_, 16)])
    ours = augment(levels, operating(1, 16, torch.tensor([INDEX["Solarize"]]), strength))
    threshold = 255 * float(v2.RandAugment._AUGMENTATION_SPACE["Solarize"][0](NUM_BINS, 16, 16)[bin_])
    assert torch.equal(ours, tv.solarize(levels, threshold))


def test_operations_of_a_batch_are_applied_in_order_to_the_right_samples() -> None:
    images = pictures(64, 16)
    view = View(randaugment_probability=1.0, randaugment_num_ops=3, crop_flip_probability=0.0)
    drawn = Augmentation(view, 16).parameters(random(64))
    ours = augment(images, drawn)
    assert drawn.operations.unique().numel() > 10
    for sample in range(64):
        expected = images[sample]
        for operation, m in zip(drawn.operations[sample].tolist(), drawn.strengths[sample].tolist(), strict=True):
            expected = THEIRS[NAMES[operation]](expected, m)
        # Later operations may amplify a difference of one level, so only the mean difference is limited.
        assert (ours[sample].int() - expected.int()).abs().float().mean() < 1


def test_operating_once_on_all_samples_is_operating_on_each() -> None:
    """A call on a whole batch gives the same pixels as a call per sample, even if an operation does not occur."""
    images, generator = pictures(60, 16), torch.Generator().manual_seed(0)
    operations = torch.randint(0, len(OPERATIONS), (60,), generator=generator).sort().values
    operations[operations == INDEX["Rotate"]] = INDEX["TranslateY"]
    strengths = torch.rand(60, generator=generator) * 0.5
    matrices = operation_matrices(operations, strengths, 16)
    together = operate(images, operations.bincount(minlength=len(OPERATIONS)).tolist(), strengths, matrices)
    for sample, index in enumerate(operations.tolist()):
        one = slice(sample, sample + 1)
        alone = OPERATIONS[NAMES[index]](images[one], strengths[one], matrices[one])
        assert torch.equal(together[one], alone), NAMES[index]


def test_operations_and_signs_are_drawn_alike_and_at_their_probability() -> None:
    """All operations are equally likely, half of the signed strengths are negative, and the probability is kept."""
    view = View(randaugment_probability=0.65)
    drawn = Augmentation(view, 32).parameters(random(100_000))
    shares = drawn.operations.flatten().bincount(minlength=14) / 200_000
    expected = torch.full((14,), 0.65 / 14)
    expected[0] += 0.35
    # The tolerance is more than three standard deviations. Identity has the largest, 0.0015, because a sample gets both
    # operations or none.
    torch.testing.assert_close(shares, expected, atol=0.005, rtol=0)
    same = (drawn.operations[:, 0] == drawn.operations[:, 1]) & (drawn.operations[:, 0] > 0)
    assert abs(same.float().mean() - 0.65 * 13 / 14**2) < 0.003, "drawn with replacement"
    for index, name in enumerate(RANDAUGMENT):
        strengths = drawn.strengths[drawn.operations == index]
        negative = (strengths < 0).float().mean().item()
        assert negative == pytest.approx(0.5 if v2.RandAugment._AUGMENTATION_SPACE[name][1] else 0, abs=0.03), name
        assert strengths.abs().unique().numel() == 1
    # The strengths are those of the magnitude and of the view's size, not of the size of the stored image.
    for magnitude in (9, 20):
        view = View(randaugment_probability=1.0, randaugment_magnitude=magnitude)
        drawn = Augmentation(view, 16, stored_size=64).parameters(random(2000))
        for index, (name, (strength, _)) in enumerate(RANDAUGMENT.items()):
            of_name = drawn.strengths[drawn.operations == index].abs()
            assert len(of_name) > 100 and of_name.numpy() == pytest.approx(strength(magnitude, 16), rel=1e-6), name


def boxes_of(count: int, size: int, **keys: Any) -> Tensor:
    """Returns `count` random boxes (count, 5); `keys` are keys of the view."""
    view = View(**{"crop_flip_probability": 1.0, **keys})
    return Augmentation(view, size).parameters(random(count)).boxes


@pytest.mark.parametrize(("scale", "ratio"), [([0.08, 1.0], [3 / 4, 4 / 3]), ([0.5, 1.0], [0.5, 2.0])])
def test_crops_follow_torchvisions_distribution(scale: list[float], ratio: list[float]) -> None:
    ours = boxes_of(100_000, 32, crop_scale=scale, crop_ratio=ratio)[:, :4]
    crop = v2.RandomResizedCrop(32, scale=scale, ratio=ratio)
    image = torch.zeros(3, 32, 32)
    keys = ("left", "top", "width", "height")
    made = [crop.make_params([image]) for _ in range(10_000)]
    theirs = torch.tensor([[float(box[key]) for key in keys] for box in made])
    deviation = theirs.std(dim=0)
    assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() < 5 * deviation / 100).all()  # five standard errors
    torch.testing.assert_close(ours.std(dim=0), deviation, rtol=0.05, atol=0)
    torch.testing.assert_close(ours.T.corrcoef(), theirs.T.corrcoef(), rtol=0, atol=0.05)
    assert (ours.amin(dim=0) <= theirs.amin(dim=0)).all() and (ours.amax(dim=0) >= theirs.amax(dim=0)).all()
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= 32).all() and (ours[:, 2:] >= 1).all()
    area, shape = ours[:, 2] * ours[:, 3] / 32**2, ours[:, 2] / ours[:, 3]
    assert abs(area.min() - scale[0]) < 0.05 and area.max() <= 1 and ratio[0] * 0.8 < shape.min() < ratio[0] * 1.2


@pytest.mark.parametrize("ratio", [[2.0, 3.0], [0.2, 0.5], [1.0, 1.0]])
def test_crops_that_never_fit_fall_back_as_torchvisions(ratio: list[float]) -> None:
    ours = boxes_of(5, 32, crop_scale=[1.0, 1.0], crop_ratio=ratio)
    theirs = v2.RandomResizedCrop(32, scale=(1.0, 1.0), ratio=ratio).make_params([torch.zeros(3, 32, 32)])
    assert ours[:, :4].tolist() == [[theirs[key] for key in ("left", "top", "width", "height")]] * 5


def test_resizing_a_crop_is_torchvisions() -> None:
    images = pictures(200, 32)
    boxes = boxes_of(200, 32)
    ours, apart = augment(images, replace(unchanged(200, 32), boxes=boxes)), []
    for image, result, (left, top, width, height, flip) in zip(images, ours, boxes.int().tolist(), strict=True):
        # In float32: torchvision's result for uint8 is rounded after each axis, and differs in one pixel of six.
        theirs = tv.resized_crop(image.float(), top, left, height, width, [32, 32], antialias=True).round()
        apart.append((result - (theirs.flip(-1) if flip else theirs)).abs())
    assert max(each.max() for each in apart) <= 1 and torch.stack(apart).mean() < 1e-4
    assert 0.3 < boxes[:, 4].mean() < 0.7


def test_nothing_outside_the_box_is_seen() -> None:
    images = torch.full((50, 3, 32, 32), 255, dtype=torch.uint8)
    boxes = boxes_of(50, 32)
    for image, (left, top, width, height, _) in zip(images, boxes.int().tolist(), strict=True):
        image[:, top : top + height, left : left + width] = 0
    assert augment(images, replace(unchanged(50, 32), boxes=boxes)).max() == 0


def test_affine_moves_are_torchvisions() -> None:
    images = pictures(40, 24)
    view = View(
        crop_flip_probability=0.0,
        randaugment_probability=0.0,
        affine_probability=0.7,
        affine_degrees=30.0,
        affine_translate=0.2,
        affine_scale=[0.7, 1.3],
        affine_shear=20.0,
    )
    uniforms = torch.rand(40, 100)
    drawn = Augmentation(view, 24).parameters(lambda columns, stream="": uniforms[:, :columns])
    ours, still = augment(images, drawn), 0
    apply, angle, x, y, scale, shear = uniforms[:, 29:35].T.double()
    for sample in range(40):
        if apply[sample] >= 0.7:
            still += 1
            assert torch.equal(ours[sample], images[sample])
            continue
        theirs = tv.affine(
            images[sample],
            angle=60 * angle[sample].item() - 30,
            translate=[round((2 * along[sample].item() - 1) * 4.8) for along in (x, y)],
            scale=0.7 + 0.6 * scale[sample].item(),
            shear=[40 * shear[sample].item() - 20, 0.0],
            interpolation=v2.InterpolationMode.BILINEAR,
        )
        assert (ours[sample].int() - theirs.int()).abs().max() <= 1
    assert 4 < still < 20 and drawn.moves is not None and torch.equal(IDENTITY, torch.eye(2, 3))


def test_images_too_small_to_blur_are_left() -> None:
    images, index = pictures(4, 2), INDEX["Sharpness"]
    assert torch.equal(augment(images, operating(4, 2, torch.full((4,), index), torch.ones(4))), images)


def test_nothing_is_read_from_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """augment() works on the meta device, where reading a value or using a shape that depends on values would raise."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # refuses the meta device
    view = View(randaugment_probability=1.0, affine_probability=1.0, color_jitter_probability=0.5, blur_probability=0.5)
    view = view.model_copy(update={"shift_pixels": 4, "cutout": 0.5})
    pixels = torch.empty(200, 3, 16, 16, dtype=torch.uint8, device="meta")
    for size in (None, 8):  # as large as the images, and cropped from stored images
        drawn = Augmentation(view, size or 16, 16).parameters(random(200))
        assert drawn.operations.unique().numel() == len(OPERATIONS)
        views = augment(pixels, drawn, size)
        assert views.shape == (200, 3, size or 16, size or 16) and views.dtype == torch.uint8
    with pytest.raises(RuntimeError):
        pixels.max().item()


def test_a_shift_is_a_crop_after_padding_by_reflection() -> None:
    pixels, shifts = torch.randint(256, (50, 3, 9, 9)).byte(), torch.randint(-4, 5, (50, 2))
    padded = F.pad(pixels.float(), [4] * 4, mode="reflect").byte()
    expected = [image[:, 4 + y : 13 + y, 4 + x : 13 + x] for image, (x, y) in zip(padded, shifts.tolist(), strict=True)]
    assert torch.equal(shift(pixels, shifts.float()), torch.stack(expected))
    drawn = Augmentation(View(shift_pixels=4), 9).parameters(random(2000)).shifts
    assert drawn is not None and sorted(set(drawn.flatten().tolist())) == list(range(-4, 5))


def test_cutout_fills_a_square_around_a_random_point() -> None:
    """The filled part is torchvision's `erase`. Over many samples, its area is that of the closed form.

    A square of side s around a uniform point of an image of side 1 covers s - s^2 / 4 of each axis on average. With s
    uniform in (0, 1/2), the mean of the squared fraction is the integral of 2 (s - s^2 / 4)^2.
    """
    view, size = View(crop_flip_probability=0.0, randaugment_probability=0.0, cutout=0.5), 64
    pixels = torch.full((20_000, 3, 1, 1), 200).byte().expand(-1, -1, size, size)
    parameters = Augmentation(view, size).parameters(random(20_000))
    assert parameters.holes is not None
    few = augment(pixels[:20], parameters[:20])
    for image, (left, top, right, bottom) in zip(few, parameters.holes[:20].int().tolist(), strict=True):
        assert torch.equal(image, tv.erase(pixels[0], top, left, bottom - top, right - left, torch.tensor(GREY).byte()))
    left, top, right, bottom = (parameters.holes / size).unbind(dim=1)
    s = 0.5
    expected = 2 * (s**3 / 3 - s**4 / 8 + s**5 / 80)
    assert ((right - left) * (bottom - top)).mean().item() == pytest.approx(expected, rel=0.03)
