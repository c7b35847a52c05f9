"""Tests of generated views beside the true ones, of cross-attention, and of cameras that have a roll."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from config.errors import ConfigError
from config.reading import load_config
from datasets.cameras import azimuth_of, canonical, polar_of, rays, sphere_camera, turn
from datasets.images import DatasetError
from evaluation.novel_views import judging
from evaluation.novel_views.identity import score_identity
from evaluation.novel_views.judging import score_views, view_sampler
from evaluation.novel_views.scenes import Scenes
from evaluation.novel_views.similarity import MAX_PSNR, similarity
from evaluation.quality import ssim
from experiment.batch import evaluation_view, pixels_with_sources
from experiment.posed import PosedPixels
from model.build import build_soda, forward_flops
from model.guidance import guided_denoiser
from model.rays import ImageConv2d
from tests.conftest import ROOT, batch_of
from tests.posed import AZIMUTHS, opened, posed_experiment, soda_without_zeros, write_objects
from training.state import initial_state
from utils.device import OutOfMemoryError


def test_similarity_of_images_in_closed_form() -> None:
    """An error of 0.1 is 20 dB. The object alone has its own error, and its mean colour that of its pixels."""
    truth = torch.full((2, 3, 16, 16), 1.0)
    truth[:, :, 4:12, 4:12] = torch.rand(2, 3, 8, 8) - 0.5
    inside = truth.amin(dim=1) < 0.9
    changed = truth + 0.2 * inside[:, None]
    found = similarity(changed, truth, inside, None)
    torch.testing.assert_close(found[:, 0], torch.full((2,), 20 - 10 * math.log10(1 / 4)))  # a quarter of the pixels
    torch.testing.assert_close(found[:, 1], torch.full((2,), 20.0))
    torch.testing.assert_close(found[:, 2], ssim(changed, truth))
    assert (found[:, 3] < found[:, 2]).all()
    torch.testing.assert_close(found[:, 4], torch.full((2,), 0.1))
    same = similarity(truth, truth, inside, inside)
    torch.testing.assert_close(same, torch.tensor([[MAX_PSNR, MAX_PSNR, 1, 1, 0]] * 2), atol=1e-6, rtol=0)


def test_a_model_that_ignores_the_pose_fails_the_azimuth_test(objects: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Views that are right, those that ignore the pose, and those from the opposite side have known scores."""
    caplog.set_level(logging.INFO)
    experiment = posed_experiment(objects, "views.num_sources=5")
    by_pixels = {tuple(each.flatten().tolist()): i for i, each in enumerate(experiment.test.pixels)}

    def true_view(pixels: PosedPixels, _: range) -> Tensor:
        return experiment.views.x_start(pixels.pixels[:, 0])

    def source(pixels: PosedPixels, _: range) -> Tensor:
        return experiment.views.x_start(pixels.pixels[:, 1])

    def opposite(pixels: PosedPixels, _: range) -> Tensor:
        chosen = [by_pixels[tuple(each.flatten().tolist())] for each in pixels.pixels[:, 0]]
        return experiment.views.x_start(experiment.test.pixels[[i // 6 * 6 + (i + 3) % 6 for i in chosen]])

    models = {"right": (1, true_view), "blind": (5, source), "opposite": (1, opposite)}
    rows = score_views(experiment, models, 100, 0).rows
    within, error, side = (rows[name] for name in ("within 15 degrees (%)", "azimuth error (degrees)", [*rows][-1]))
    assert [within[name]["value"] for name in models] == [100, 0, 0]
    assert error["right"]["value"] == 0 and error["opposite"]["value"] == pytest.approx(180, abs=0.01)
    assert 60 <= error["blind"]["value"] <= 150  # one of the five other views, 60 to 180 degrees away
    assert (side["right"]["value"], side["opposite"]["value"]) == (100, 0)
    assert [*within] == [*models, "source", "mean object", "nearest object"]
    assert rows["PSNR (dB)"]["right"]["value"] == MAX_PSNR and rows["PSNR (dB)"]["source"] == rows["PSNR (dB)"]["blind"]
    assert "the baseline '15 degrees off' is left out, because only 0 of 12 targets have it" in caplog.text


def test_objects_are_masked_and_views_of_known_objects_have_known_neighbours(tmp_path: Path) -> None:
    """Masks count if every target has one. Held-out views are compared with views of both splits, 15 degrees off."""
    root = write_objects(tmp_path / "images", ("a1", "a2"))
    for name in ("a1", "a2"):
        for azimuth in AZIMUTHS:
            pixels = np.full((8, 8, 3), azimuth // 2, np.uint8)
            Image.fromarray(pixels).save(root / name / f"80-{azimuth + 15:03d}.png")
            for turned in (azimuth, azimuth + 15):
                mask = np.zeros((8, 8), np.uint8)
                mask[2:6, 2:6] = 255
                path = tmp_path / "masks" / name / f"80-{turned:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(path)
    experiment = posed_experiment(tmp_path, "data.split=views", "data.holdout=0.3")

    def white(pixels: PosedPixels, _: range) -> Tensor:
        return torch.ones(len(pixels.pixels), 3, 8, 8)

    found = score_views(experiment, {"white": (1, white)}, 100, 0)
    assert (
        found.protocol.startswith("novel views of known objects: 8 test images") and "object: masks" in found.protocol
    )
    assert "15 degrees off" in found.rows["SSIM"]
    inside = experiment.views.x_start(experiment.test.pixels)[:, :, 2:6, 2:6] / 2 + 0.5
    expected = (1 - inside.mean(dim=(2, 3))).mean()
    assert found.rows["colour error of the object"]["white"]["value"] == pytest.approx(expected.item(), abs=1e-5)


def test_masks_of_any_brightness_and_empty_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A mask of values 0 and 1 marks an object. Targets with an empty mask have no scores of the object."""
    caplog.set_level(logging.INFO)
    write_objects(tmp_path / "images")
    for file in (tmp_path / "images").rglob("*.png"):
        mask = np.zeros((8, 8), np.uint8)
        mask[2:6, 2:6] = 0 if file.stem == "80-060" else 1 if file.stem == "80-120" else 255
        path = tmp_path / "masks" / file.relative_to(tmp_path / "images")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    experiment = posed_experiment(tmp_path)

    def wrong_inside(pixels: PosedPixels, _: range) -> Tensor:
        """Half as bright inside the masks, and wholly wrong where the mask is empty."""
        made = experiment.views.x_start(pixels.pixels[:, 0])
        empty = (pixels.cameras[:, 0] - sphere_camera(80, 60, 1.5)).abs().amax(dim=(1, 2)) < 1e-6
        made[:, :, 2:6, 2:6] = made[:, :, 2:6, 2:6] / 2 - 0.5
        return torch.where(empty[:, None, None, None], -made, made)

    rows = score_views(experiment, {"model": (1, wrong_inside)}, 100, 0).rows
    shown = torch.tensor(["80-060" not in name for name in experiment.test.names])
    assert shown.sum() == 10
    inside = (experiment.test.pixels[shown][:, :, 2:6, 2:6] / 255).float()
    expected = -10 * (inside / 2).square().mean(dim=(1, 2, 3)).log10()
    assert rows["PSNR of the object (dB)"]["model"]["value"] == pytest.approx(expected.mean().item(), abs=1e-4)
    assert rows["colour error of the object"]["model"]["value"] == pytest.approx((inside / 2).mean().item(), abs=1e-4)
    assert "2 of the 12 targets show no pixels of an object" in caplog.text


def test_generated_views_depend_on_the_sources_and_on_the_pose_alone(
    objects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pixels of the target do not reach the model. If memory runs out, the error says what to do."""
    experiment = posed_experiment(objects)
    soda = soda_without_zeros(experiment)
    generate = view_sampler(experiment, soda, 0, 2)
    test = experiment.test
    pixels = torch.stack([test.pixels[:3], test.pixels[3:6]], dim=1)
    cameras = torch.stack([test.cameras[:3], test.cameras[3:6]], dim=1)
    made = generate(PosedPixels(pixels, cameras), range(3))
    with (
        monkeypatch.context() as patch,
        pytest.raises(OutOfMemoryError, match="use another device, or set"),
    ):
        patch.setattr(judging, "sample_from_views", lambda *_: torch.empty(2**50))
        generate(PosedPixels(pixels, cameras), range(3))
    for column, is_seen in ((0, False), (1, True)):
        changed = pixels.clone()
        changed[:, column] = 255 - changed[:, column]
        found = generate(PosedPixels(changed, cameras), range(3))
        assert torch.equal(found, made) != is_seen, column
    moved = cameras.clone()
    moved[:, 0] = test.cameras[1:4]
    assert not torch.equal(generate(PosedPixels(pixels, moved), range(3)), made)


def test_baselines_of_flat_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For images of one grey each, the PSNR of each baseline is known."""
    caplog.set_level(logging.INFO)
    greys = {"a": 10, "b": 40, "c": 200, "d": 43}  # the grey of an object rises by 2 with each view
    for name, grey in greys.items():
        (tmp_path / "objects" / name).mkdir(parents=True)
        for view in range(24):
            image = Image.new("RGB", (8, 8), (grey + 2 * view,) * 3)
            image.save(tmp_path / "objects" / name / f"70-{15 * view:03d}.png")
    experiment = posed_experiment(tmp_path / "objects", "data.holdout=0.25", "views.num_sources=1")
    (held,) = experiment.test.names[0][:1]
    known = {name: grey for name, grey in greys.items() if name != held}
    nearest = min(known.values(), key=lambda grey: abs(grey - greys[held]))
    mean = sum(known.values()) / 3

    def psnr(difference: float) -> float:
        return -20 * math.log10(difference / 255) if difference else MAX_PSNR

    found = score_views(experiment, {"black": (1, lambda pixels, _: -torch.ones(len(pixels.pixels), 3, 8, 8))}, 100, 0)
    row = {name: cell["value"] for name, cell in found.rows["PSNR (dB)"].items()}
    assert [*row] == ["black", "source", "mean object", "nearest object", "15 degrees off"]
    assert row["mean object"] == pytest.approx(psnr(abs(mean - greys[held])), abs=1e-3)
    assert row["nearest object"] == pytest.approx(psnr(abs(nearest - greys[held])), abs=1e-3)
    black = [psnr(greys[held] + 2 * view) for view in range(24)]
    assert row["black"] == pytest.approx(sum(black) / 24, abs=1e-3)
    # The neighbours of a view differ by 2, but the first and the last view by 46.
    beside = found.rows["PSNR (dB)"]["15 degrees off"]["value"]
    assert (23 * psnr(2) + psnr(46)) / 24 <= beside + 1e-3 and beside <= psnr(2) + 1e-3
    # All true views are darker than white and brighter than black, so that the nearest one to black is the first.
    expected = sum(min(15 * view, 360 - 15 * view) for view in range(24)) / 24
    assert found.rows["azimuth error (degrees)"]["black"]["value"] == pytest.approx(expected, abs=0.01)
    assert "targets equal a training image" not in found.protocol

    # The object nearest to the held-out one becomes equal to it.
    double = next(name for name, grey in greys.items() if grey == nearest)
    for view in range(24):
        Image.new("RGB", (8, 8), (greys[held] + 2 * view,) * 3).save(
            tmp_path / "objects" / double / f"70-{15 * view:03d}.png"
        )
    experiment = posed_experiment(tmp_path / "objects", "data.holdout=0.25", "views.num_sources=1")
    failing = {"failing": (1, lambda pixels, _: torch.full((len(pixels.pixels), 3, 8, 8), math.nan))}
    found = score_views(experiment, failing, 100, 0)
    assert found.rows["PSNR (dB)"]["nearest object"]["value"] == MAX_PSNR
    assert found.protocol.endswith("; 24 targets equal a training image")
    # Views that are not numbers are not left out.
    assert all(math.isnan(cells["failing"]["value"]) for cells in found.rows.values())
    assert "novel views: SSIM is not a number, because views of failing are not" in caplog.text


def test_views_that_do_not_go_around_have_no_azimuth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Four views within a small arc are no ring. The mean object needs the target's pose alone."""
    caplog.set_level(logging.INFO)
    for number, name in enumerate("abcd"):
        (tmp_path / "objects" / name).mkdir(parents=True)
        for azimuth in (0, 4, 8, 12 + number):
            Image.new("RGB", (8, 8), (20 * number + azimuth,) * 3).save(
                tmp_path / "objects" / name / f"70-{azimuth:03d}.png"
            )
    experiment = posed_experiment(tmp_path / "objects", "views.num_sources=1")
    found = score_views(experiment, {"white": (1, lambda pixels, _: torch.ones(len(pixels.pixels), 3, 8, 8))}, 100, 0)
    assert [*found.rows] == ["PSNR (dB)", "SSIM"]
    assert "within 15 degrees (%) is left out, because no object has views all around it" in caplog.text
    assert "the baseline 'mean object' is left out, because only 6 of 8 targets have it" in caplog.text
    assert "because objects fill the images" in caplog.text


ABOVE: list[tuple[float, float]] = [(0, 0), (0, 90), (70, 0), (70, 359.99), (70, 1)]


def test_cameras_above_an_object_have_poses_of_their_own() -> None:
    """A camera straight above keeps its rotation, and 360 degrees are 0 degrees."""
    scenes = object.__new__(Scenes)
    cameras = torch.stack([sphere_camera(polar, azimuth, 1.5) for polar, azimuth in ABOVE])
    scenes.polar, scenes.azimuth = polar_of(cameras.double()).rad2deg(), azimuth_of(cameras.double()).rad2deg()
    poses = scenes.poses.tolist()
    assert poses[2] == poses[3] and len({*poses}) == 4


def test_an_object_is_recognised_from_views_at_least_45_degrees_away(tmp_path: Path) -> None:
    """Views less than 45 degrees away do not help k-NN, and the probe is tested on views that it was not trained on."""
    root = tmp_path / "objects"
    for name in "abcd":
        (root / name).mkdir(parents=True)
        for azimuth in range(0, 360, 15):
            Image.new("RGB", (8, 8)).save(root / name / f"70-{azimuth:03d}.png")
    experiment = posed_experiment(root)
    one_hot = torch.nn.functional.one_hot
    numbers, view = torch.arange(2).repeat_interleave(24), torch.arange(24).repeat(2)
    pose = one_hot(view).float()
    near = pose + pose.roll(1, dims=1) + pose.roll(-1, dims=1)  # shared by views that are 30 degrees apart, or nearer
    front = torch.where(view < 12, numbers, 1 - numbers)
    features = {
        "object": one_hot(numbers).float(),
        "pose": pose,
        # An object is identified by near views alone. Further away, the same view of the other object is nearer.
        "near": torch.cat([(one_hot(numbers)[:, :, None] * near[:, None]).flatten(1), pose / 2], dim=1),
        "swapped behind": one_hot(front).float(),
    }
    measured = score_identity(experiment, features, "z")
    assert measured.protocol == (
        "object of a view among 2 objects of the test images; k-NN of unit z: views of the same object less than 45 "
        "degrees away are left out; probe of standardised z: logistic regression, trained at azimuths 0-180, tested at "
        "the others"
    )
    rows = measured.rows
    nearest, probe = ({name: cell["value"] for name, cell in rows[row].items()} for row in rows)
    del nearest["swapped behind"]  # half of its neighbours are equally near
    assert nearest == {"object": 100, "pose": 0, "near": 0}
    assert probe["object"] == 100 and probe["swapped behind"] == 0


def test_cameras_with_roll_are_kept() -> None:
    """In canonical mode, the first source has azimuth 0 with any roll, and turning all cameras changes nothing."""
    rolled = []
    for degrees, azimuth in ((90, 40.0), (30, 200.0), (0, 310.0)):
        camera, roll = sphere_camera(70, azimuth, 1.5), math.radians(degrees)
        x, y = camera[:, 0].clone(), camera[:, 1].clone()
        camera[:, 0], camera[:, 1] = x * math.cos(roll) + y * math.sin(roll), y * math.cos(roll) - x * math.sin(roll)
        rolled.append(camera)
    cameras = torch.stack(rolled)
    for first in range(3):
        found = canonical(cameras, cameras[first])
        assert found[first, 1, 3].abs() < 1e-6 and found[first, 0, 3] > 0
        turned = turn(cameras, torch.tensor(2.5))
        torch.testing.assert_close(canonical(turned, turned[first]), found, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[:, 2], cameras[:, 2])  # heights


def test_inputs_of_the_evaluation_and_of_the_grid(objects: Path) -> None:
    """An image is encoded with its own rays at azimuth 0. Sources of held-out views are training images."""
    experiment = posed_experiment(objects)
    test = experiment.test
    made = evaluation_view(experiment, test, test.pixels[2:5], range(2, 5))
    assert torch.equal(made[:, :3], experiment.views.evaluation(test.pixels[2:5]))
    torch.testing.assert_close(made[:, 3:], rays(canonical(test.cameras[2:5], test.cameras[2:5]), 8))
    assert made[:, 4].abs().max() < 1e-6
    absolute = posed_experiment(objects, "views.canonical=false")
    torch.testing.assert_close(evaluation_view(absolute, test, test.pixels, range(12))[:, 3:], rays(test.cameras, 8))
    experiment = posed_experiment(objects, "data.split=views")
    test, chosen = experiment.test, torch.tensor([3, 0])
    found = pixels_with_sources(experiment, test, chosen, range(2), "grid ")
    assert isinstance(found, PosedPixels) and found.num_sources == 2
    assert torch.equal(found.pixels[:, 0], test.pixels[chosen])
    for row, index in zip(found.pixels, chosen, strict=True):
        own = experiment.train.pixels[experiment.train.objects == test.objects[index]]
        assert all((own == source).all(dim=(1, 2, 3)).any() for source in row[1:])


def cross_attending(**more: Any) -> Any:
    """Returns a small SODA with rays and self-attention. `more` are further keys of its decoder."""
    torch.manual_seed(0)
    sizes = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8]}
    decoder = {**sizes, "num_head_channels": None, "dropout": 0.0, **more}
    settings = {"architecture": "resnet18", "stem": "small", "width": 4, "latent_dim": 8}
    return build_soda(8, settings, decoder, "torch", ray_octaves=2).eval()


def test_cross_attention_sees_the_feature_map_and_is_dropped_with_z() -> None:
    """Tokens change the prediction unless z is dropped. Guidance drops both. Without the key, nothing changes."""
    plain, soda = cross_attending(), cross_attending(cross_attention=True)
    added = soda.state_dict().keys() - plain.state_dict().keys()
    assert added and all("cross_attention" in name for name in added)
    assert not [name for name in cross_attending(cross_attention=False).state_dict() if "cross" in name]
    assert forward_flops(soda, 8, 8, 2)[1] > forward_flops(plain, 8, 8, 2)[1]
    x_source, x_t, seen = torch.randn(2, 3, 9, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 6, 8, 8)
    timesteps, kept = torch.tensor([3, 700]), torch.zeros(2, 1, dtype=torch.bool)
    with torch.no_grad():
        z, tokens = soda.encode(x_source), soda.tokens(x_source)
        assert tokens.shape == (2, 3 * 1, 32)
        given, null = soda.decoder(x_t, timesteps, z, seen, tokens), torch.zeros_like(tokens)
        torch.testing.assert_close(soda(x_source, x_t, timesteps, kept, None, seen).prediction, given)
        assert not torch.allclose(soda.decoder(x_t, timesteps, z, seen, null), given)
        dropped = soda.decoder(x_t, timesteps, torch.zeros_like(z), seen, null)
        torch.testing.assert_close(soda(x_source, x_t, timesteps, ~kept, None, seen).prediction, dropped)
        guided = guided_denoiser(soda.decoder, z, 2.0, rays=seen, tokens=tokens)(x_t, timesteps)
    torch.testing.assert_close(guided, 2 * given - dropped)


@pytest.mark.parametrize("bias", [False, True])
def test_rays_leave_the_size_of_the_colours_as_it_is(bias: bool) -> None:
    """The layer of the colours is drawn as without rays, and the rays contribute as much to the output."""
    torch.manual_seed(0)
    layer = ImageConv2d(64, 3, padding=1, bias=bias, ray_octaves=4)
    torch.manual_seed(0)
    plain = ImageConv2d(64, 3, padding=1, bias=bias)
    assert torch.equal(layer.weight, plain.weight) and {*plain.state_dict()} == (
        {"weight", "bias"} if bias else {"weight"}
    )
    layer.balance()
    cameras = torch.stack([sphere_camera(70, azimuth, 1.5) for azimuth in AZIMUTHS])
    images = torch.cat([torch.randn(6, 3, 16, 16), rays(cameras, 16)], dim=1)
    both, colors = layer(images), plain(images[:, :3])
    assert 0.9 < (both - colors).std() / colors.std() < 1.1


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("digits", "views.ray_octaves=2", "views.ray_octaves is for data.name=posed, not for digits: remove it"),
        ("digits", "views.canonical=false", "views.canonical is for data.name=posed"),
        ("digits", "decoder.cross_attention=true", "decoder.cross_attention is for data.name=posed: remove it"),
        ("cars3d", "decoder.modulation=sectioned", "decoder.cross_attention needs decoder.modulation=shared"),
        ("cars3d", "encoder.time_dependent=true", "encoder.time_dependent is for images without cameras"),
    ],
)
def test_keys_of_cameras_are_refused_elsewhere(config: str, override: str, message: str) -> None:
    more = ["decoder.cross_attention=true"] if config == "cars3d" else []
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "config" / f"{config}.yaml", [override, *more])


def test_lost_training_views_and_unlisted_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A held-out view without training views of its object is an error. Images that no file lists are counted."""
    caplog.set_level(logging.INFO)
    root = write_objects(tmp_path / "objects", ("a/x", "a/y"))
    kept, _ = opened(root, split="views", holdout=0.2)
    for name in kept.names or []:
        if name.startswith("a/y/"):
            (root / name).write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"skip leaves no training views in \S+ of the objects a/y: restore some"):
        opened(root, split="views", holdout=0.2, unreadable="skip")
    pose = [[*row, 3.0] for row in np.eye(3).tolist()]
    frames = [{"file_path": f"80-{azimuth:03d}", "transform_matrix": pose} for azimuth in AZIMUTHS[:2]]
    (root / "a/x" / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.7, "frames": frames}))
    assert len(opened(root, pose="transforms.json", cache_dir=str(tmp_path / "other"))[0]) == 2
    assert f"left out 10 images in {root} that no file transforms.json names, such as a/x/80-120.png" in caplog.text
    assert f"2 photographs of 1 objects in {root}, seen from" in caplog.text


def test_cross_attention_trains(objects: Path) -> None:
    """A run with cross-attention has gradients in it."""
    experiment = posed_experiment(objects, "decoder.cross_attention=true")
    state, batch = initial_state(experiment), batch_of(experiment, 0, range(4))
    torch.nn.init.ones_(state.soda.decoder.conv_out.weight)
    found = state.soda(batch.x_source, batch.x_start, batch.timesteps, batch.drop_mask, None, batch.rays)
    found.prediction.sum().backward()
    grads = [p.grad for name, p in state.soda.named_parameters() if "cross_attention.proj" in name]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)
