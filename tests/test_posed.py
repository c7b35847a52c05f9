"""Tests of photographs with cameras: rays, the data set `posed`, its source images, and models with rays."""

import json
import logging
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import embed as embed_program
import sample as sample_program
import test as test_program
import train as train_program
from config.errors import ConfigError
from config.pose_pattern import name_pattern
from config.reading import load_config
from datasets.cameras import canonical, opengl_camera, rays, sphere_camera
from datasets.images import DatasetError
from datasets.posed import image_folder, mask_of
from evaluation.novel_views.scenes import Scenes, choose_targets
from evaluation.novel_views.similarity import Masks
from evaluation.protocols import all_protocols
from experiment.batch import read_pixels
from experiment.posed import PosedPixels, draw_sources
from model.build import build_soda, forward_flops
from model.guidance import guided_denoiser
from model.rays import encode_rays
from tests.conftest import ROOT, assert_equal_states, batch_of, small_soda
from tests.posed import AZIMUTHS, opened, posed_args, posed_experiment, write_objects
from training.state import initial_state
from utils.files import FolderError


@pytest.mark.parametrize(
    ("polar", "azimuth", "position", "right", "down"),
    [
        (90, 0, (1, 0, 0), (0, 1, 0), (0, 0, -1)),  # on the x axis: y is to the right
        (90, 90, (0, 1, 0), (-1, 0, 0), (0, 0, -1)),  # a quarter turn further
        (0, 0, (0, 0, 1), (0, 1, 0), (1, 0, 0)),  # straight above: the lower edge is on the side of azimuth 0
    ],
)
def test_rays_of_hand_computed_cameras(
    polar: float,
    azimuth: float,
    position: tuple[float, ...],
    right: tuple[float, ...],
    down: tuple[float, ...],
) -> None:
    """Rays leave the pinhole through the centres of 2 x 2 pixels, a quarter of the width from the axis each."""
    o, x, y = (torch.tensor(values, dtype=torch.float32) for values in (position, right, down))
    found = rays(sphere_camera(polar, azimuth, 1.5), 2)
    expected = [[-o + (u * x + v * y) / 1.5 for u in (-0.25, 0.25)] for v in (-0.25, 0.25)]
    for row in range(2):
        for column in range(2):
            torch.testing.assert_close(found[:3, row, column], o)
            ray = expected[row][column] / math.sqrt(1 + 2 * (0.25 / 1.5) ** 2)
            torch.testing.assert_close(found[3:, row, column], ray)
    # Blender's matrix of the same camera: axes to the right, up and backward.
    matrix = torch.eye(4)
    matrix[:3] = torch.stack([x, -y, o, o], dim=1)
    torch.testing.assert_close(opengl_camera(matrix, 1.5), sphere_camera(polar, azimuth, 1.5))


def test_canonical_cameras_do_not_depend_on_the_azimuth_of_the_object() -> None:
    """Turning all cameras changes nothing, heights and differences of azimuth stay, and the reference has azimuth 0."""
    angles = [(0.0, 40.0), (30.0, 100.0), (90.0, 310.0), (120.0, 40.0)]
    for first in range(4):
        turned = [
            torch.stack([sphere_camera(polar, azimuth + turn, 2.0) for polar, azimuth in angles])
            for turn in (0, 77, -angles[first][1])
        ]
        for cameras in turned:
            torch.testing.assert_close(canonical(cameras, cameras[first]), turned[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", ["objects", "views"])
def test_splits_share_no_object_or_no_view(objects: Path, split: str) -> None:
    """Objects are held out from each class. Otherwise, views are held out, and each object keeps two of its views."""
    train, test = opened(objects, holdout=0.9, split=split)
    assert test is not None and train.objects is not None and test.objects is not None
    assert train.classes == test.classes == ["a", "b"]
    known, new = set(train.objects.tolist()), set(test.objects.tolist())
    assert train.names is not None and test.names is not None and not {*train.names} & {*test.names}
    assert len(train) + len(test) == 24 and train.digest() != test.digest()
    if split == "objects":
        assert len(known) == len(new) == 2 and not known & new
        assert set(train.labels.tolist()) == set(test.labels.tolist()) == {0, 1}  # type: ignore[union-attr]
    else:
        assert known == new == {0, 1, 2, 3} and train.objects.bincount().tolist() == [2, 2, 2, 2]
    names = [Path(name).stem.split("-") for name in train.names]
    expected = torch.stack([sphere_camera(float(polar), float(azimuth), 1.5) for polar, azimuth in names])
    assert train.cameras is not None and torch.equal(train.cameras, expected)


def test_classes_of_objects_without_class_folders(tmp_path: Path) -> None:
    """Each object is a class if views are held out. If objects are held out, there are no labels."""
    root = write_objects(tmp_path / "objects", ("x", "y"))
    train, test = opened(root, holdout=0.5, split="views", pose="{pitch}-{yaw}")
    assert train.classes == ["x", "y"] and torch.equal(train.labels, train.objects)  # type: ignore[arg-type]
    assert train.cameras is not None
    assert train.cameras[:, 2, 3].tolist() == pytest.approx([math.sin(math.radians(80))] * 6)  # pitch 80: nearly above
    train, test = opened(root, holdout=0.5)
    assert train.labels is None and test is not None and len(test) == 6


def test_a_pattern_may_hold_any_text() -> None:
    """`*` skips a part of the name, also one with digits and hyphens."""
    pattern = name_pattern("*-{polar}-{azimuth}")
    for name, angles in {"apple1-066-045": ("066", "045"), "img-0012-90--30": ("90", "-30")}.items():
        found = pattern.fullmatch(name)
        assert found and (found["polar"], found["azimuth"]) == angles
    assert not pattern.fullmatch("066-045")
    for pose, name in (("*{azimuth}", "cup-090"), ("{polar}*{azimuth}", "035-090"), ("*{yaw}-{pitch}", "a1-090--35")):
        found = name_pattern(pose).fullmatch(name)
        assert found and "090" in found.groups(), "a hyphen after `*` is no sign"


def test_masks_that_cannot_be_used(tmp_path: Path) -> None:
    """A mask of another shape, a transparent one and a damaged one are errors that name the file."""
    write_objects(tmp_path / "images")
    for file in (tmp_path / "images").rglob("*.png"):
        mask = tmp_path / "masks" / file.relative_to(tmp_path / "images")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 255).save(mask)
    experiment = posed_experiment(tmp_path)
    targets = choose_targets(Scenes(experiment), 100, 0)
    assert len(Masks(targets).files) == 12
    bad = mask_of(tmp_path / "images", experiment.test.names[3])
    assert bad is not None
    for image, message in (
        (Image.new("L", (8, 16)), "has 8 x 16 pixels, and its image 8 x 8: give them the same shape"),
        (Image.new("RGBA", (8, 8)), "is transparent: save it as white on black"),
        (None, "cannot read the mask"),
    ):
        if image:
            image.save(bad)
        else:
            bad.write_bytes(b"damaged")
        with pytest.raises(DatasetError, match=f"{bad.name}.*{message}|{message}.*{bad.name}"):
            Masks(targets)


def test_images_beside_masks(tmp_path: Path) -> None:
    """Images are read from the folder `images`, and the mask of an image has the same path with any ending."""
    folder = image_folder(write_objects(tmp_path / "images").parent)
    mask = tmp_path / "masks" / "a" / "a1" / "80-060.bmp"
    mask.parent.mkdir(parents=True)
    mask.write_bytes((folder / "a/a1/80-060.png").read_bytes())
    assert len(opened(tmp_path)[0]) == 24
    assert mask_of(folder, "a/a1/80-060.png") == mask and mask_of(folder, "a/a1/80-000.png") is None


def test_cameras_of_a_transforms_file(tmp_path: Path) -> None:
    """Frames of NeRF-synthetic have their own focal length, and their positions are scaled to at most 1."""
    root = write_objects(tmp_path / "objects", ("lego/train", "chair/train"))
    for name in ("lego", "chair"):
        frames = []
        for azimuth in AZIMUTHS[:4]:
            x, y, forward, position = sphere_camera(60, azimuth, 1).T.tolist()
            rows = zip(x, [-v for v in y], [-v for v in forward], [4 * v for v in position], strict=True)
            frames.append({"file_path": f"./train/80-{azimuth:03d}", "transform_matrix": [list(row) for row in rows]})
        contents = {"camera_angle_x": 2 * math.atan(0.5 / 1.2), "frames": frames}
        (root / name / "transforms_train.json").write_text(json.dumps(contents))
    images, _ = opened(root, pose="transforms_train.json")
    assert images.names == [f"{name}/train/80-{a:03d}.png" for name in ("chair", "lego") for a in AZIMUTHS[:4]]
    assert images.objects is not None and images.objects.tolist() == [0] * 4 + [1] * 4
    expected = torch.stack([sphere_camera(60, azimuth, 1.2) for azimuth in AZIMUTHS[:4]])
    torch.testing.assert_close(images.cameras, expected.repeat(2, 1, 1), rtol=0, atol=1e-6)


def write_frames(folder: Path, **save: Any) -> Path:
    """Writes two images with cameras to `folder`. Returns `folder`."""
    rows = torch.cat([torch.eye(3), torch.tensor([[0.0], [0.0], [1.0]])], dim=1).tolist()
    frames = [{"file_path": f"{i}.png", "transform_matrix": rows} for i in range(2)]
    folder.mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (640, 480)).save(folder / f"{i}.png", **save)
    contents = {"camera_angle_x": 2 * math.atan(0.5 / 1.2), "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(contents))
    return folder


def test_the_focal_length_of_wide_images_is_exact(tmp_path: Path) -> None:
    """Images of 4:3 are cropped to their height, so the focal length is 4/3 times that of the whole width."""
    write_frames(tmp_path / "x")
    cameras = opened(tmp_path, pose="transforms.json")[0].cameras
    assert cameras is not None and (1 / cameras[0, :, 0].norm()).item() == pytest.approx(1.2 * 4 / 3, rel=1e-5)


def test_images_that_are_stored_turned_have_no_camera(tmp_path: Path) -> None:
    """A camera of a transforms.json belongs to the stored pixels, but images are decoded upright."""
    metadata = Image.Exif()
    metadata[0x0112] = 6
    write_frames(tmp_path / "x", exif=metadata)
    with pytest.raises(DatasetError, match=r"x/0\.png is not stored upright \(its orientation tag is 6\): save it"):
        opened(tmp_path, pose="transforms.json")


def test_objects_in_linked_folders_have_cameras(tmp_path: Path) -> None:
    write_frames(tmp_path / "objects" / "x")
    (tmp_path / "objects" / "y").symlink_to(write_frames(tmp_path / "elsewhere" / "z"))
    (tmp_path / "objects" / ".z").symlink_to(write_frames(tmp_path / "hidden"))
    images, _ = opened(tmp_path / "objects", pose="transforms.json")
    assert images.names == ["x/0.png", "x/1.png", "y/0.png", "y/1.png"]


def test_sources_are_other_images_of_the_object(objects: Path) -> None:
    """Sources are drawn without replacement from the other views, and are repeated only if there are too few."""
    experiment = posed_experiment(objects)
    images = experiment.train
    targets = experiment.loader.indices(3, range(4))
    for count in (1, 5, 7):
        found = draw_sources(images, images.objects[targets], targets, count, range(4), 0, "", 3)
        assert found.shape == (4, count) and (images.objects[found] == images.objects[targets][:, None]).all()
        assert not (found == targets[:, None]).any()
        assert all(len(set(row.tolist())) == min(count, 5) for row in found)
    numbers = set()
    for step, pixels in enumerate(read_pixels(experiment, ((step, range(4)) for step in range(12)))):
        assert isinstance(pixels, PosedPixels)
        numbers.add(pixels.num_sources)
        chosen = experiment.loader.indices(step, range(4))
        assert torch.equal(pixels.pixels[:, 0], images.pixels[chosen])
        assert torch.equal(pixels.cameras[:, 0], images.cameras[chosen])
    assert numbers == {1, 2}
    # The share of a rank is a part of the global batch.
    experiment = posed_experiment(objects, "training.batch_size=8")
    whole, share = read_pixels(experiment, [(0, range(8)), (0, range(4, 8))])
    assert isinstance(whole, PosedPixels) and isinstance(share, PosedPixels)
    assert torch.equal(whole.pixels[4:], share.pixels) and torch.equal(whole.cameras[4:], share.cameras)


def test_batches_hold_the_rays_of_their_pixels(objects: Path) -> None:
    """Source and target rays are those of the cameras, seen from the first source, and do not depend on shares."""
    experiment = posed_experiment(objects, "data.image_size=16", "decoder.image_size=8", "views.source.noise_std=0")
    (pixels,) = read_pixels(experiment, [(1, range(4))])
    batch = batch_of(experiment, 1, range(4))
    assert isinstance(pixels, PosedPixels) and batch.rays is not None
    cameras = canonical(pixels.cameras, pixels.cameras[:, 1:2])
    torch.testing.assert_close(batch.x_source[:, :, 3:], rays(cameras[:, 1:], 16))
    torch.testing.assert_close(batch.rays, rays(cameras[:, 0], 8))
    assert batch.x_source[:, 0, 4].abs().max() < 1e-6  # the first source is at azimuth 0
    sources = pixels.pixels[:, 1:].flatten(0, 1)
    torch.testing.assert_close(batch.x_source[:, :, :3].flatten(0, 1), experiment.views.evaluation(sources))
    torch.testing.assert_close(batch.x_start, experiment.views.x_start(pixels.pixels[:, 0]))
    part = pixels.split(2)[1]
    assert torch.equal(part.pixels, pixels.pixels[2:]) and torch.equal(part.cameras, pixels.cameras[2:])
    absolute = batch_of(posed_experiment(objects, "views.canonical=false"), 1, range(4))
    torch.testing.assert_close(absolute.rays, rays(pixels.cameras[:, 0], 8))


def soda_with_rays(**encoder: Any) -> Any:
    """Returns a small SODA with rays of two octaves, for images of 8 px. No layer of it is zero."""
    torch.manual_seed(0)
    sizes = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": []}
    decoder = {**sizes, "num_head_channels": None, "dropout": 0.0}
    settings = {"architecture": "resnet18", "stem": "small", "width": 4, "latent_dim": 8}
    return build_soda(8, settings | encoder, decoder, "torch", ray_octaves=2).eval()


@pytest.mark.parametrize("architecture", ["resnet18", "wide_resnet28_1"])
def test_rays_change_latents_and_predictions(architecture: str) -> None:
    """The encoder sees the source's rays and the decoder the target's, in guidance too. Widths are as documented."""
    soda = soda_with_rays(architecture=architecture)
    for layer in (soda.decoder.conv_in, soda.encoder.conv1):
        assert layer.in_channels == 3 and layer.rays.in_channels == 6 + 24
    x_source, x_t = torch.randn(2, 3, 9, 8, 8), torch.randn(2, 3, 8, 8)
    here, there = rays(torch.stack([sphere_camera(70, azimuth, 1.5) for azimuth in (0, 90)])[:, None], 8)
    timesteps, kept = torch.tensor([3, 700]), torch.zeros(2, 1, dtype=torch.bool)
    given = (x_source, x_t, timesteps, kept, None)
    with torch.no_grad():
        a, b = (soda(*given, each.expand(2, 6, 8, 8)) for each in (here, there))
        moved = soda.encode(torch.cat([x_source[:, :, :3], x_source[:, :, 3:].flip(1)], dim=2))
        assert torch.equal(a.latents, b.latents) and not torch.allclose(a.prediction, b.prediction)
        assert not torch.allclose(a.latents.mean(dim=1), moved)
        z, both = soda.encode(x_source), here.expand(2, 6, 8, 8)
        guided = guided_denoiser(soda.decoder, z, 2.0, rays=both)(x_t, timesteps)
        null = soda.decoder(x_t, timesteps, torch.zeros_like(z), both)
    torch.testing.assert_close(guided, 2 * a.prediction - null)
    with_rays, without = forward_flops(soda, 8, 8, 2), forward_flops(small_soda(), 8, 8)
    assert all(more > less for more, less in zip(with_rays, without, strict=True))


def test_encodings_are_sines_of_octaves() -> None:
    """The encoding of a ray's number x is x, then sin and cos of pi x and of 2 pi x."""
    x = torch.rand(1, 6, 2, 2)
    encoded, values = encode_rays(x, 2).unflatten(1, (5, 6)), x * math.pi
    expected = [x, values.sin(), (2 * values).sin(), values.cos(), (2 * values).cos()]
    torch.testing.assert_close(encoded, torch.stack(expected, dim=1), rtol=0, atol=1e-6)


def test_models_without_rays_are_unchanged() -> None:
    """Without rays, encoder and decoder have no layers for them, and no cross-attention."""
    for architecture in ("resnet18", "wide_resnet28_1"):
        sizes = {"model_channels": 8, "channel_mult": [1], "num_res_blocks": 1, "attn_resolutions": []}
        encoder = {"architecture": architecture, "stem": "small", "width": 64, "latent_dim": 8}
        with torch.device("meta"):
            soda = build_soda(8, encoder, {**sizes, "num_head_channels": None, "dropout": 0.0})
        assert not [name for name in soda.state_dict() if "rays" in name or "cross_attention" in name]


def test_a_run_resumes_bit_for_bit_and_is_judged(
    objects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on photographs with cameras trains, is judged, draws a grid, and resumes as if it had not stopped."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    train_program.main(posed_args(objects, once))
    train_program.main(posed_args(objects, twice, "training.epochs=2"))
    train_program.main(posed_args(objects, twice))
    first, second = (torch.load(path / "checkpoints/last.pt", weights_only=True) for path in (once, twice))
    assert first["step"] == 12 and any("rays" in name for name in first["model"])
    for part in ("model", "ema", "optimizer"):
        assert_equal_states(first[part], second[part])
    with Image.open(once / "samples" / "epoch_0004.png") as grid:
        assert grid.size == (3 * 66 + 2, 4 * 66 + 2)  # two sources, a sample and the target, of 64 px each
    capsys.readouterr()
    checkpoint = str(once / "checkpoints/last.pt")
    assert test_program.main(["--checkpoint", checkpoint, "device=cpu", "--protocols", "config", "--report"]) == 0
    page = (once / "report.html").read_text()
    assert "Scores of novel views" in page and "k-NN k=2" in page and "data:image/gif" in page
    out = capsys.readouterr().out
    assert "k-NN k=2" in out and "novel_views: novel views of new objects: 12 test images as targets, 8 px" in out
    measures = json.loads((once / "results.json").read_text())["measures"]
    assert [*measures["novel_views"]["rows"]["SSIM"]] == [
        "model, 1 source",
        "model, 2 sources",
        "source",
        "mean object",
        "nearest object",
    ]
    assert {*measures["identity"]["rows"]["probe (%)"]} == {"trained", "untrained", "raw pixels"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "evaluation.measures.recording.write_measures", mock.Mock(side_effect=FolderError("cannot write"))
        )
        with pytest.raises(SystemExit, match="2"):
            words = ["--checkpoint", checkpoint, "device=cpu", "--protocols", "config", "evaluation.num_novel_views=0"]
            test_program.main([*words, "--report", "--out", str(tmp_path / "report.html")])
    shown = capsys.readouterr()
    assert "\nidentity: " in shown.out and shown.err == "error: cannot write\n"
    assert (tmp_path / "report.html").exists()
    for sources in (["--num_objects", "2"], ["sampling.num_sampling_steps=1", "--images", "0", "1"]):
        assert (
            sample_program.main(["views", "--checkpoint", checkpoint, "device=cpu", "--num_views", "4", *sources]) == 0
        )
    with Image.open(once / "pictures" / "views.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (3 * 96, 96)  # type: ignore[attr-defined]
    capsys.readouterr()
    # These programs give the encoder no cameras.
    refused = (
        (sample_program, ["nearest"]),
        (embed_program, ["--split", "test"]),
        (embed_program, ["--export", str(once / "weights.safetensors")]),
        (test_program, ["--measures", "all"]),
    )
    for program, words in refused:
        with pytest.raises(SystemExit, match="2"):
            program.main([*words, "--checkpoint", str(once / "checkpoints/last.pt"), "device=cpu"])
        assert "does not support cameras (data.name=posed)" in capsys.readouterr().err
    _, path, *rest = posed_args(objects, once)
    assert not [each for each in all_protocols(load_config(path, rest), 12) if each.note]  # crops do not fit the rays


def test_held_out_views_and_unlabelled_objects_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The grid of held-out views has training images as sources. Images without labels are not judged."""
    caplog.set_level(logging.INFO)
    root = write_objects(tmp_path / "objects", ("x", "y", "z"))
    short = ("training.epochs=1", "views.num_sources=3")
    train_program.main(posed_args(root, tmp_path / "views", "data.split=views", *short))
    train_program.main(posed_args(root, tmp_path / "objects_run", *short))
    assert (tmp_path / "views/samples/epoch_0001.png").exists()
    assert "the images have no labels: k-NN and linear probe are skipped" in caplog.text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"pose": "cam_{azimuth}"},
            r"the name \S+a/a1/80-000\.png does not fit data\.pose=cam_\{azimuth\} \(nor do 23",
        ),
        (
            {"pose": "{pitch}-{azimuth}", "root": "far"},
            r"far/a/95-000\.png: pitch 95 is not between -90 and 90 degrees",
        ),
        ({"root": "alone"}, r"alone with a single view: b: add views of them, or remove them"),
        (
            {"root": "pair", "holdout": 0.5},
            r"holds out no objects of \S+pair, because each class keeps an object: add",
        ),
        ({"root": "missing"}, r"no folder \S+missing: set data\.root"),
        ({"pose": "transforms.json"}, r"no file transforms\.json in"),
        ({"root": "loose"}, r"loose/1-0\.png is not in the folder of an object: move it to"),
        ({"root": "mixed"}, r"objects in \S+mixed without the folder of a class: c: move them into one"),
    ],
)
def test_bad_photographs_are_errors_of_the_user(
    tmp_path: Path, objects: Path, data: dict[str, Any], message: str
) -> None:
    """Each error names the file or the folder and says what to do."""
    if "root" in data:
        names = {"far": ["a/95-000", "a/00-000"], "alone": ["a/1-0", "a/1-1", "b/1-0"], "pair": ["a/1-0", "a/1-1"]}
        names["loose"] = ["1-0", "1-1"]
        names["mixed"] = ["a/b/1-0", "a/b/1-1", "c/1-0", "c/1-1"]
        for name in names.get(data["root"], []):
            path = tmp_path / data["root"] / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
        data = data | {"root": str(tmp_path / data["root"])}
    with pytest.raises(DatasetError, match=message):
        opened(objects, **data)


def test_damaged_transforms_files_are_errors_of_the_user(tmp_path: Path) -> None:
    root = write_objects(tmp_path / "objects", ("x",))
    frame = {"file_path": "80-000", "transform_matrix": np.eye(4).tolist()}
    good = {"camera_angle_x": 0.7, "frames": [frame]}
    cases: list[tuple[Any, str]] = [
        ("{", "is not in the format of NeRF-synthetic"),
        (json.dumps({"frames": []}), "KeyError 'camera_angle_x'"),
        (json.dumps(good | {"camera_angle_x": 40}), "camera_angle_x is not between 0 and pi, in radians"),
        (json.dumps(good | {"frames": [frame, frame | {"file_path": "wide"}]}), "images of different shapes, such as"),
        (json.dumps(good | {"frames": [frame | {"transform_matrix": [[1]]}]}), "not 4 x 4 finite numbers"),
        (json.dumps(good | {"frames": [frame | {"file_path": "81-000"}]}), "names 81-000, but there is no such image"),
        (json.dumps(good | {"frames": [frame | {"transform_matrix": {"a": 1}}]}), "not in the format of NeRF"),
        (json.dumps(good | {"frames": [frame | {"transform_matrix": np.ones((4, 4)).tolist()}]}), "not orthogonal"),
        (json.dumps(good | {"frames": [frame | {"transform_matrix": np.zeros((4, 4)).tolist()}]}), "not orthogonal"),
        (json.dumps(good | {"frames": [frame | {"file_path": f"{ROOT}/docs/reconstruct.png"}]}), "no such image"),
        (json.dumps(good | {"frames": [frame, frame]}), "has more than one camera in the files"),
        (json.dumps(good | {"frames": [frame | {"file_path": "../x/80-000"}]}), "no such image beside it"),
        (json.dumps(good), "are at the origin"),
    ]
    Image.new("RGB", (16, 8)).save(root / "x" / "wide.png")
    for text, message in cases:
        (root / "x" / "transforms.json").write_text(text)
        with pytest.raises(DatasetError, match=message):
            opened(root, pose="transforms.json")
    (image,) = root.glob("x/80-000.*")
    text = PngInfo()
    text.add_text("comment", "a" * 2**21, zip=True)  # PIL refuses to unpack so much text
    Image.new("RGB", (8, 8)).save(image, pnginfo=text)
    with pytest.raises(DatasetError, match=f"cannot read {image}, nor any other image of"):
        opened(root, pose="transforms.json")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("views.same=true", "views.same contradicts data.name=posed, whose views are different photographs: remove it"),
        ("views.probe.cutout=0.5", "views.probe.cutout moves or hides pixels"),
        ("evaluation.features=decoder.up.0@20", "is for images without cameras, not for data.name=posed"),
        ("data.pose=a/transforms.json", "a/transforms.json is not the name of a file: write a name without folders"),
        ("data.pose=**.json", "is not the name of a file"),
    ],
)
def test_keys_that_contradict_cameras_are_refused(objects: Path, override: str, message: str) -> None:
    _, path, *rest = posed_args(objects, objects, override)
    with pytest.raises(ConfigError, match=message):
        load_config(path, rest)


def test_weights_of_rays_start_as_the_config_says(objects: Path) -> None:
    """The untrained model of a config has rays of `views.ray_octaves` octaves."""
    soda = initial_state(posed_experiment(objects)).soda
    assert soda.encoder.conv1.rays.in_channels == 6 * 5
    for layer in (soda.encoder.conv1, soda.decoder.conv_in):  # their rays contribute as much as their colours
        before = layer.rays.weight.clone()
        layer.balance()
        torch.testing.assert_close(layer.rays.weight, before)


def test_other_cameras_are_other_images(objects: Path) -> None:
    """The digest by which a run recognises its images includes the cameras."""
    assert opened(objects)[0].digest() != opened(objects, focal=2.0)[0].digest()
