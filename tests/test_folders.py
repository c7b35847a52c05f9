"""Tests of the readings of a folder: layouts, splits that are held out, system folders, runs, names, label files."""

import codecs
import logging
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sample as sample_program
import train as train_program
from analysis.references import find_class
from config.errors import ConfigError
from config.reading import load_config
from config.schema import Data
from datasets.folder_layouts import list_folder, list_images
from datasets.holdout import hold_out
from datasets.images import DatasetError
from datasets.label_list import read_label_list
from datasets.labelled_images import list_labelled
from datasets.listing import Listing
from datasets.sources import build_dataset
from datasets.walking import is_listed
from experiment.trained import open_trained, read_trained
from tests.conftest import ROOT, TINY_RUN

NFC, NFD = (unicodedata.normalize(form, "Möwe") for form in ("NFC", "NFD"))


def touch(root: Path, *files: str) -> Path:
    """Writes empty files, which are enough for listings, and returns the root."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def write_images(root: Path, files: Iterable[str]) -> Path:
    """Writes images of 8 x 8 pixels. All pixels of an image have the value of its index. Returns the root."""
    for index, file in enumerate(files):
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(path)
    return root


def labelled(listing: Listing | None) -> dict[str, str]:
    """Returns the name of the class of each file."""
    assert listing is not None and listing.labels is not None
    return {file: listing.classes[label] for file, label in zip(listing.files, listing.labels, strict=True)}


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("training", "validation"),
        ("train", "valid"),
        ("TRAIN", "Val"),
        ("training_set", "test_set"),
        ("train images", "eval-images"),
        ("Training", "testing"),
        ("train2017", "val2017"),
    ],
)
@pytest.mark.parametrize("above", ["", "unpacked/"])
def test_names_of_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture, train: str, test: str, above: str) -> None:
    """Split folders are found by other names and one folder further down, and the log says which were taken."""
    inside = [f"{above}{train}/a/1.png", f"{above}{train}/b/2.png", f"{above}{test}/a/3.png", f"{above}{test}/b/4.png"]
    found = list_folder(touch(tmp_path, *inside, "README.png" if above else "README.txt"))
    assert [labelled(listing) for listing in found] == [
        {"a/1.png": "a", "b/2.png": "b"},
        {"a/3.png": "a", "b/4.png": "b"},
    ]
    assert found[0].root.name == train and found[1] is not None and found[1].root.name == test
    if train != "train":
        assert f"{train}/ is the training split and {test}/ the test split" in caplog.text
    assert ("not read: 1 images" in caplog.text) == bool(above)


def test_train_and_test_of_lower_case_need_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    list_folder(touch(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", "test") for name in "ab")))
    assert caplog.text == ""


def test_class_folders_without_splits_are_not_read_as_classes_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`root`/<class>/* has no labels, and one line says why. With a held-out split, the folders are the classes."""
    touch(tmp_path, "cat/1.png", "cat/2.png", "dog/3.png", "dog/deep/4.png")
    train, test = list_folder(tmp_path)
    assert train.labels is None and test is None and len(train.files) == 4
    (line,) = caplog.messages
    assert "has no train/ folder: all 4 images" in line and "(cat, dog)" in line and "set data.holdout=0.1" in line

    caplog.clear()
    touch(tmp_path, "cover.png")
    train, test = list_folder(tmp_path, held_out=True)
    assert test is None
    assert labelled(train) == {"cat/1.png": "cat", "cat/2.png": "cat", "dog/3.png": "dog", "dog/deep/4.png": "dog"}
    (line,) = caplog.messages
    assert line == f"1 images in {tmp_path} are left out because they are not in a class folder"


def test_a_class_may_be_called_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "bus/1.png", "car/2.png", "train/3.png")
    train, test = list_folder(tmp_path)
    assert (train.files, train.labels, test) == (["3.png"], None, None)
    (line,) = caplog.messages
    assert "train/ has no class folders; not read: bus, car. If train, bus, car are classes, set data.holdout" in line


@pytest.mark.parametrize("names", [["train"], ["Training"], ["test"], ["val", "valid"], ["eval"], ["Validation"]])
def test_classes_with_names_of_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str]) -> None:
    """With data.holdout, folders in a row are classes, whatever they are called. The log says why."""
    files = {f"{name}/{index}.png": name for name in ("bus", "car", *names) for index in range(2)}
    train, test = list_folder(touch(tmp_path, *files), held_out=True)
    assert test is None and labelled(train) == files
    (line,) = caplog.messages
    assert line.startswith(f"read as classes, not as splits: {', '.join(names)} in {tmp_path}, because data.holdout")
    assert "beside other folders with images (bus, car)" in line


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["train/1.png", "test/2.png", "bus/3.png"],
            "train has no class folders: .*, or, if train is a class, rename it",
        ),
        (["test/1.png", "bus/2.png"], "has test/, but no train/: .*, or, if test is a class, rename test"),
        (["val/a/1.png", "a/2.png", "b/3.png"], "has val/, but no train/: .*, or, if val is a class, rename val"),
    ],
)
def test_folders_that_may_be_test_images_are_no_classes(tmp_path: Path, files: list[str], expected: str) -> None:
    with pytest.raises(DatasetError, match=expected):
        list_folder(touch(tmp_path, *files), held_out=True)


def test_a_training_folder_with_classes_is_a_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, test = list_folder(touch(tmp_path, "train/a/1.png", "train/b/2.png", "bus/3.png"), held_out=True)
    assert test is None and labelled(train) == {"a/1.png": "a", "b/2.png": "b"}
    assert caplog.messages == [
        "train/ has class folders, and there is no test folder: the test split is held out from "
        f"{tmp_path / 'train'}; not read: bus"
    ]
    touch(tmp_path / "flat" / "train", "1.png").joinpath("empty").mkdir()
    assert list_folder(tmp_path / "flat")[0].files == ["1.png"], "folders without images are no classes"


def test_test_images_are_never_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Images in test folders are not read as training images, whatever the layout around them."""
    with pytest.raises(DatasetError, match=r"has Test/, but no train/: rename the folder"):
        list_folder(touch(tmp_path / "no_train", "pictures/a/1.png", "Test/a/2.png"))
    several = [f"{name}/{split}/good/1.png" for name in ("bolt", "nut") for split in ("train", "test")]
    with pytest.raises(DatasetError, match=r"several folders with .* \(bolt, nut\): set data.root to one of them"):
        list_folder(touch(tmp_path / "several", *several))
    train, test = list_folder(touch(tmp_path / "flat", "train/1.png", "test/2.png"))
    assert (train.files, train.labels, test) == (["1.png"], None, None)
    assert "have no labels, because train/ has no class folders; not read: test" in caplog.text
    album = list_folder(touch(tmp_path / "album", "2019/training/1.png", "2020/2.png"))[0]
    assert len(album.files) == 2, "a folder that is called training is no split without a test folder beside it"


def test_imagenet_as_it_is_unpacked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The validation folder has the classes, so it is the test split, and the unlabelled test folder is not read."""
    touch(tmp_path, *(f"{split}/n0{i}/{split}.JPEG" for split in ("train", "val") for i in range(3)))
    touch(tmp_path, "test/1.JPEG", "test/2.JPEG")
    (tmp_path / "test" / "n00").mkdir()
    (tmp_path / "test" / "n01").mkdir()  # folders without images do not count
    train, test = list_folder(tmp_path)
    assert labelled(train) == {f"n0{i}/train.JPEG": f"n0{i}" for i in range(3)}
    assert labelled(test) == {f"n0{i}/val.JPEG": f"n0{i}" for i in range(3)}
    assert "train/ is the training split and val/ the test split; not read: test" in caplog.text
    touch(tmp_path, *(f"test/n0{i}/3.JPEG" for i in range(3)))
    assert list_folder(tmp_path)[1].root.name == "test", "if both fit, test/ is the test split"  # type: ignore[union-attr]


def test_classes_that_one_split_lacks_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "test/a/4.png", "test/d/5.png", "test/d/6.png")
    (tmp_path / "test" / "c").mkdir()
    train, test = list_folder(tmp_path)
    assert train.classes == ["a", "b", "c"] and labelled(test) == {"a/4.png": "a"}
    assert test is not None and test.classes == train.classes
    assert f"classes without test images in {tmp_path / 'test'}, which are not judged: b, c" in caplog.text
    assert f"left out the 2 images in {tmp_path / 'test'} of classes without training images: d" in caplog.text


@pytest.mark.parametrize(
    ("files", "held_out", "expected"),
    [
        (["train/a/1.png", "train/b/1.png"], False, "neither test/ nor val/: add test/.*or set data.holdout=0.1"),
        (["train/a/1.png", "train/b/1.png", "val/c/1.png"], False, r"val in .* has no images .*\(a, b\): add them, or"),
        (["train/a/1.png", "train/b/1.png", "test/1.png", "val/2.png"], False, "test and val in .* have no images"),
        (["train/a/1.png", "test/a/1.png"], False, "only one class"),
        (["1.png", "2.png"], True, "data.holdout needs labels, but .* has no class folders"),
        (["train/1.png"], True, "data.holdout needs labels, but .*train has no class folders"),
        (["a/1.png", "2.png"], True, "only one class, a: add another class, or remove data.holdout"),
    ],
)
def test_layouts_without_a_reading_are_explained(
    tmp_path: Path, files: list[str], held_out: bool, expected: str
) -> None:
    with pytest.raises(DatasetError, match=expected) as raised:
        list_folder(touch(tmp_path / "photos", *files), held_out)
    assert "\n" not in str(raised.value)


def test_a_test_folder_that_does_not_fit_gives_way_to_a_held_out_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, test = list_folder(touch(tmp_path, "train/a/1.png", "train/b/1.png", "test/1.png"), held_out=True)
    assert test is None and labelled(train) == {"a/1.png": "a", "b/1.png": "b"}
    assert "test split is held out" in caplog.text


def test_each_class_gives_its_share_to_the_held_out_split(caplog: pytest.LogCaptureFixture) -> None:
    """The held-out split is stratified, depends on the paths alone, and hardly changes when a file is added."""
    counts = {"a": 100, "b": 37, "c": 3, "d": 1}
    files = [f"{name}/{index}.png" for name, count in counts.items() for index in range(count)]
    listing = Listing(Path("here"), files, [list(counts).index(file[0]) for file in files], list(counts), "classes")
    train, test = hold_out(listing, 0.1)
    assert np.bincount(test.labels or []).tolist() == [10, 4, 1] and np.bincount(train.labels or []).tolist()[3] == 1
    assert sorted(train.files + test.files) == sorted(files) and test.files == [f for f in files if f in test.files]
    assert labelled(train) | labelled(test) == {file: file[0] for file in files}
    names = {listing.cache_name, train.cache_name, test.cache_name, hold_out(listing, 0.2)[0].cache_name}
    assert len(names) == 4, "their caches differ"
    assert "15 of the 141 images in here are held out" in caplog.text and "single image, which is not held out: d" in (
        caplog.text
    )
    moved = Listing(Path("there"), files[::-1], (listing.labels or [])[::-1], listing.classes, "classes")
    assert set(hold_out(moved, 0.1)[1].files) == set(test.files)
    more = Listing(Path("here"), [*files, "a/more.png"], [*(listing.labels or []), 0], listing.classes, "classes")
    assert len(set(hold_out(more, 0.1)[1].files) ^ set(test.files)) <= 2
    single = Listing(Path("here"), ["a/0.png", "b/0.png"], [0, 1], ["a", "b"], "classes")
    with pytest.raises(
        DatasetError,
        match=r"^data\.holdout=0\.1 holds out no image of here, .* a single image, which is trained on: add images$",
    ):
        hold_out(single, 0.1)


def run_args(root: Path, output_dir: Path, *overrides: str) -> list[str]:
    """Returns arguments of a tiny run on the images in `root`."""
    data = ["data.name=folder", f"data.root={root}", f"data.cache_dir={output_dir.parent / 'cache'}"]
    short = ["training.batch_size=8", "evaluation.knn.k=2", "evaluation.probe.epochs=1", "evaluation.batch_size=8"]
    return [
        "--config",
        str(ROOT / "config/digits.yaml"),
        *TINY_RUN,
        *data,
        *short,
        f"output_dir={output_dir}",
        *overrides,
    ]


def test_runs_with_different_seeds_are_judged_on_the_same_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A held-out split is a property of the images: another seed has the same split, and finds it in the cache."""
    root = write_images(tmp_path / "photos", [f"{name}/{index}.png" for name in "ab" for index in range(20)])
    run, other = tmp_path / "run", tmp_path / "other"
    arguments = run_args(root, run, "data.holdout=0.1", "sampling.num_images=0")
    assert train_program.main([*arguments, "seed=3"]) == 0
    assert '"knn_top1"' in (run / "metrics.jsonl").read_text()
    written = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert len(written) == 4 and "4 of the 40 images in" in caplog.text
    opened = [open_trained(read_trained(None, run / "checkpoints" / "last.pt", ["device=cpu"]))[0]]
    caplog.clear()
    assert train_program.main([*arguments, f"output_dir={other}", "seed=4"]) == 0
    assert "decoding" not in caplog.text
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == written
    opened.append(open_trained(read_trained(None, other / "checkpoints" / "last.pt", ["device=cpu"]))[0])
    names = [[images.names for images in (each.train, each.test) if images] for each in opened]
    assert names[0] == names[1]
    train, test = (set(each or []) for each in names[0])
    assert len(train) == 36 and len(test) == 4 and not train & test
    assert "are not the images that the checkpoint was trained on" not in caplog.text
    open_trained(read_trained(None, run / "checkpoints" / "last.pt", ["device=cpu", "data.holdout=0.2"]))
    assert "was trained on, which may include images that are now held out for testing" in caplog.text


def test_a_holdout_is_ignored_if_there_is_a_test_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_images(tmp_path / "photos", [f"{split}/{name}/1.png" for split in ("train", "test") for name in "ab"])
    data = Data(name="folder", root=str(root), cache_dir=str(tmp_path / "cache"), image_size=8, holdout=0.5)
    train, test, _ = build_dataset(data)
    assert (len(train), len(test or [])) == (2, 2)
    assert "data.holdout=0.5 is ignored, because there is a test split" in caplog.text


@pytest.mark.parametrize(
    ("key", "users"),
    [("data.holdout=0.1", "folder or posed"), ("data.labels=labels.csv", "folder"), ("data.focal=2", "posed")],
)
def test_the_keys_of_a_folder_are_refused_for_other_data_sets(key: str, users: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{key.partition('=')[0]} is for data.name={users}, not for digits: remove it"
    ):
        load_config(ROOT / "config/digits.yaml", [key])


def test_what_systems_leave_behind_is_no_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", "test") for name in "ab"))
    for name in (
        "@eaDir",
        "__MACOSX",
        "lost+found",
        "$RECYCLE.BIN",
        "System Volume Information",
        "#recycle",
        ".Trash-1",
    ):
        touch(tmp_path, f"train/{name}/2.png", f"{name}/3.png")
    touch(tmp_path, "train/a/@eaDir/1.png/SYNOPHOTO_THUMB_XL.jpg", "train/a/._1.png")
    train, test = list_folder(tmp_path)
    assert labelled(train) == labelled(test) == {"a/1.png": "a", "b/1.png": "b"}
    assert f"left out {tmp_path / '#recycle'}, {tmp_path / '$RECYCLE.BIN'}, " in caplog.text
    assert "(13 in total), made by systems or by runs" in caplog.text
    assert list_images(tmp_path / "train").classes == ["a", "b"]


def test_each_real_folder_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Links to folders that are read anyway, or to a parent folder, add no images. Other links are followed."""
    root = touch(tmp_path / "photos", *(f"{split}/{name}/1.png" for split in ("train", "test") for name in "bc"))
    touch(tmp_path, "elsewhere/deep/2.png", "photos/train/.store/d/3.png")
    for link, target in {
        "train/b/up": "photos",
        "train/b/train": "photos/train",
        "train/a": "photos/train/c",  # a second name of a class
        "train/c/b": "photos/train/b",
        "train/c/other": "elsewhere",
        "train/d": "photos/train/.store/d",
        "train/d/twice": "elsewhere/deep",
        "test/b/self": "photos/test/b",
    }.items():
        (root / link).symlink_to(tmp_path / target)
    train, test = list_folder(root)
    assert labelled(train) == {"b/1.png": "b", "c/1.png": "c", "c/other/deep/2.png": "c", "d/3.png": "d"}
    assert labelled(test) == {"b/1.png": "b", "c/1.png": "c"}
    (line,) = [message for message in caplog.messages if message.startswith("not followed: ")]
    assert f"{root}/test/b/self, {root}/train/a, {root}/train/b/train, {root}/train/b/up, {root}/train/c/b, ..." in line
    assert "(6 in total), because these links lead to folders that are read already" in line

    (root / "train" / "b" / "leak").symlink_to(root / "test" / "c")
    with pytest.raises(DatasetError, match=r"train/b/leak and .*test/c are the same folder: remove the link"):
        list_folder(root)

    (tmp_path / "flat").mkdir()
    touch(tmp_path / "flat", "1.png", "sub/2.png")
    (tmp_path / "flat" / "sub" / "again").symlink_to(tmp_path)
    assert list_folder(tmp_path / "flat")[0].files == list_images(tmp_path / "flat").files == ["1.png", "sub/2.png"]


@pytest.mark.parametrize("output_dir", ["runs/mine", "."])
def test_a_run_does_not_read_its_own_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, output_dir: str
) -> None:
    """A run with data.root=. can be resumed after it has drawn samples and pictures below this folder."""
    monkeypatch.chdir(write_images(tmp_path / "photos", [f"{index}.png" for index in range(16)]))
    arguments = [*run_args(Path(), Path(output_dir)), "data.cache_dir=cache"]
    assert train_program.main(arguments) == 0
    assert sample_program.main(["reconstruct", *arguments, "--num_images", "1", "--num_samples", "1"]) == 0
    assert len(list(Path(output_dir).rglob("*.png"))) >= 2
    caplog.clear()
    assert train_program.main([*arguments, "training.epochs=2"]) == 0
    assert "resuming from" in caplog.text and "decoding all images again" not in caplog.text
    assert len(list_folder(Path())[0].files) == 16
    left_out = [message for message in caplog.messages if "not images" in message]
    assert left_out == ["left out files of . that are not images: 1 .json, 1 .npy"] * 2, "one line per start: the cache"


def test_run_folders_are_named_if_there_are_no_other_images(tmp_path: Path) -> None:
    run = touch(tmp_path / "runs" / "x", "config.yaml", "checkpoints/last.pt", "samples/1.png", "pictures/2.png")
    touch(run.parent, "notes.txt")
    for read in (list_folder, list_images):
        with pytest.raises(DatasetError, match="runs/x is the folder of a run, whose pictures are not read: choose"):
            read(run)
        with pytest.raises(DatasetError, match=r"no images in .* \(left out: the run folder .*/x, 1 \.txt\): choose"):
            read(run.parent)


def test_composed_and_decomposed_names_are_equal(tmp_path: Path) -> None:
    """A class is the same in both Unicode forms: between splits, in one split, for sample.py and for label files."""
    assert NFC != NFD
    touch(tmp_path, f"train/{NFC}/1.png", f"train/{NFD}/2.png", "train/b/3.png", f"test/{NFD}/4.png", "test/b/5.png")
    train, test = list_folder(tmp_path)
    assert train.classes == ["Möwe", "b"] and list(labelled(train).values()) == ["Möwe", "Möwe", "b"]
    assert labelled(test) == {f"{NFD}/4.png": "Möwe", "b/5.png": "b"}
    assert find_class(train.classes, NFD) == 0
    assert list_images(tmp_path / "train").classes == ["Möwe", "b"]
    (tmp_path / "labels.csv").write_text(f"test/{NFC}/4.png,x\ntrain/b/3.png,{NFC}\ntrain/{NFC}/1.png,{NFD}\n", "utf-8")
    found = read_label_list(
        tmp_path / "labels.csv", [f"test/{NFD}/4.png", "train/b/3.png", f"train/{NFC}/1.png"], tmp_path
    )
    assert found.labels == {f"test/{NFD}/4.png": "x", "train/b/3.png": "Möwe", f"train/{NFC}/1.png": "Möwe"}
    one, other = (
        hold_out(Listing(tmp_path, [f"{form}/{i}.png" for i in range(40)], [0] * 40, ["Möwe"]), 0.1)[1].files
        for form in (NFC, NFD)
    )
    assert [Path(file).name for file in one] == [Path(file).name for file in other]


@pytest.mark.parametrize(
    ("in_classes", "loose", "have_labels"),
    [(2, 1, True), (2, 2, False), (19, 2, False), (20, 2, True), (100, 5, True), (1000, 5, True), (1000, 6, False)],
)
def test_a_cover_picture_does_not_cost_the_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, in_classes: int, loose: int, have_labels: bool
) -> None:
    """A few images beside class folders are left out and counted. With more of them, all images have no labels."""
    inside = {f"{'ab'[index % 2]}/{index}.png": "ab"[index % 2] for index in range(in_classes)}
    found = list_images(touch(tmp_path, *inside, *(f"cover{index}.png" for index in range(loose))))
    (line,) = caplog.messages
    if have_labels:
        assert labelled(found) == inside
        assert line == f"{loose} images in {tmp_path} are left out because they are not in a class folder"
    else:
        assert found.labels is None and len(found.files) == in_classes + loose
        assert f"have no labels: {loose} are directly in {tmp_path}, and {in_classes} in its sub-folders" in line


def test_one_folder_beside_a_cover_is_no_class(tmp_path: Path) -> None:
    assert list_images(touch(tmp_path, "cover.png", "a/1.png", "a/2.png")).labels is None


LISTS: dict[str, str | bytes] = {
    "commas": "path,label\ntrain/1.png,cat\ntrain/2.png,dog\nval/3.png,dog\n",
    "UTF-16 of a spreadsheet": "train/1.png\tcat\r\ntrain/2.png\tdog\r\nval/3.png\tdog\r\n".encode("utf-16"),
    "UTF-16, big-endian": codecs.BOM_UTF16_BE + "train/1.png,cat\ntrain/2.png,dog\nval/3.png,dog".encode("utf-16-be"),
    "byte-order mark and CRLF": "\ufefftrain/1.png,cat\r\ntrain/2.png,dog\r\n\r\nval/3.png,dog\r\n",
    "tabs": "train/1.png\tcat\n./train/2.png\tdog\nval/3.png\tdog\n",
    "semicolons and quotes": 'file;class\n"train/1.png"; "cat"\ntrain\\2.png;dog\nval/3.png;dog',
    "CR": "train/1.png,cat\rtrain/2.png,dog\rval/3.png,dog\r",
    "blanks": "3\nimage label\ntrain/1.png  cat\ntrain/2.png  dog\nval/3.png  dog\n",
    "blanks and quotes": 'train/1.png "cat"\n"train/2.png" dog\nval/3.png dog\n',
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_labels_from_a_list(tmp_path: Path, text: str | bytes, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "train/1.png", "train/2.png", "val/3.png", "val/unnamed.png")
    (tmp_path / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    train, test = list_labelled(tmp_path, Path("labels.csv"))
    assert (train.classes, labelled(train)) == (["cat", "dog"], {"train/1.png": "cat", "train/2.png": "dog"})
    assert labelled(test) == {"val/3.png": "dog"} and train.cache_name != (test and test.cache_name)
    assert "left out 1 images" in caplog.text and "which are not judged: cat" in caplog.text
    assert f"have labels in {tmp_path / 'labels.csv'}. Its lines are read as a path and a label, separated by" in (
        caplog.text
    )


SEPARATORS = {"tabs": "\t", "semicolons": ";", "commas": ",", "blanks": " "}


@pytest.mark.parametrize(("name", "separator"), SEPARATORS.items(), ids=SEPARATORS)
@pytest.mark.parametrize("values", [["cat", "dog", "cat"], ["0", "1", "1"], ["0{}1{}1", "1{}-1{}0", "1{}0{}1"]])
def test_paths_may_contain_the_separator(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, separator: str, values: list[str]
) -> None:
    """The separator is the one with which the lines name images, not the first that occurs in them."""
    files = ["a, b/1; 0 1.png", "a, b/2,  x.png", "a, b/plain.png"]
    values = [value.format(separator, separator) for value in values]
    lines = [f"{file}{separator}{value}" for file, value in zip(files, values, strict=True)]
    missing = f"a, b/missing; x.png{separator}{values[0]}"
    (tmp_path / "list.txt").write_text("\n".join(["", "path;label, or values", *lines, missing]))
    found = read_label_list(tmp_path / "list.txt", files, tmp_path)
    assert found.files == files
    if separator in values[0]:
        assert found.attributes == dict(zip(files, [[0, 1, 1], [1, 0, 0], [1, 0, 1]], strict=True))
    else:
        assert found.labels == dict(zip(files, values, strict=True))
    assert f"separated by {name}, because this names the most existing images; 1 before the first" in caplog.text
    assert "names 1 images that are not in" in caplog.text and "such as a, b/missing; x.png" in caplog.text


def test_labels_may_contain_the_separator_in_quotes(tmp_path: Path) -> None:
    lines = ['1.png,"tench, Tinca tinca"', "2.png,cat", '"a, b.png","cat"', "3.png,two words"]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    found = read_label_list(tmp_path / "labels.csv", ["1.png", "2.png", "3.png", "a, b.png"], tmp_path)
    assert found.labels == {"1.png": "tench, Tinca tinca", "2.png": "cat", "3.png": "two words", "a, b.png": "cat"}


def test_only_test_folders_divide_the_images_of_a_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Images that are not in a test folder are training images, also if there is a folder train beside them."""
    files = {"bus/1.png": "bus", "car/2.png": "car", "train/3.png": "train"}
    touch(tmp_path, *files, "test/4.png", "val/5.png", "val/6.png")
    list_file = tmp_path / "labels.csv"
    list_file.write_text("".join(f"{file},{name}\n" for file, name in files.items()))
    train, test = list_labelled(tmp_path, Path("labels.csv"), held_out=True)
    assert labelled(train) == files and test is None and "of these images" not in caplog.text

    list_file.write_text(list_file.read_text() + "test/4.png,bus\nval/5.png,car\nval/6.png,car\n")
    train, test = list_labelled(tmp_path, Path("labels.csv"))
    assert labelled(train) == files and labelled(test) == {"test/4.png": "bus"}
    assert "the 1 in test/ are test images, the 2 in val are left out, and the other 3 are training" in caplog.text


def test_names_that_differ_in_their_unicode_form_are_two_files(tmp_path: Path) -> None:
    """Both files are kept. A line of a list names the file of its own form, or is refused if it can name either."""
    files = [f"{form}.png" for form in (NFC, NFD)]
    touch(tmp_path, *files, "1.png")
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system does not distinguish the forms")
    assert len(list_images(tmp_path).files) == len(list_folder(tmp_path)[0].files) == 3
    labels = tmp_path / "labels.csv"
    labels.write_text(f"{NFD}.png,b\n{NFC}.png,a\n1.png,a\n", "utf-8")
    train, _ = list_labelled(tmp_path, labels, held_out=True)
    assert labelled(train) == {f"{NFC}.png": "a", f"{NFD}.png": "b", "1.png": "a"}

    accented = unicodedata.normalize("NFC", "ê")
    files = [unicodedata.normalize(form, f"{accented}{NFC}.png") for form in ("NFC", "NFD")]
    labels.write_text(f"1.png,a\n{accented}{NFD}.png,a\n", "utf-8")  # a third form: only one letter is composed
    with pytest.raises(DatasetError, match=r"line 2: .* is the name of 2 files .*\\u0308.*: rename one of them"):
        read_label_list(labels, [*files, "1.png"], tmp_path)


def test_labels_that_are_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{index}.png" for index in range(12)))
    (tmp_path / "labels.csv").write_text("".join(f"{index}.png,{index}\n" for index in range(12)))
    train, test = list_labelled(tmp_path, Path("labels.csv"), held_out=True)
    assert train.classes == [str(index) for index in range(12)] and test is None


def test_the_labels_of_a_list_are_trained_and_judged_with(tmp_path: Path) -> None:
    """Absolute paths are relative to the data set as well. Changed labels give another data set."""
    root = write_images(tmp_path / "photos", [f"{index}.png" for index in range(8)])
    (tmp_path / "labels.csv").write_text("".join(f"{root}/{index}.png,{'ab'[index % 2]}\n" for index in range(8)))

    def opened() -> Any:
        labels = str(tmp_path / "labels.csv")
        cache = str(tmp_path / "cache")
        data = Data(name="folder", root=str(root), cache_dir=cache, image_size=8, labels=labels, holdout=0.25)
        return build_dataset(data)

    train, test, info = opened()
    assert info.classes == ["a", "b"] and (len(train), len(test)) == (6, 2)
    for images in (train, test):
        assert images.pixels[:, 0, 0, 0].remainder(2).tolist() == images.labels.tolist()
        assert [int(Path(name).stem) for name in images.names] == images.pixels[:, 0, 0, 0].tolist()
    (tmp_path / "labels.csv").write_text("".join(f"{index}.png,{'ab'[index // 4]}\n" for index in range(8)))
    assert opened()[0].digest() != train.digest()


def test_files_that_count_as_images_of_a_folder(tmp_path: Path) -> None:
    root = touch(tmp_path / "photos", "a.png", "run/config.yaml", "run/checkpoints/last.pt", "@eaDir/thumb.png")
    listed = ["new.png", "deep/new.JPG", "sub/../new.png", "../photos/new.webp"]
    others = ["new.npz", ".new.png", ".hidden/new.png", "@eaDir/new.png", "run/pictures/new.png", "../new.png"]
    assert [is_listed(root / name, root) for name in listed] == [True] * 4
    assert not any(is_listed(root / name, root) for name in others)


CELEBA = "4\nYoung Smiling\n000001.png  1 -1\n000002.png -1 -1\n000003.png -1  1\n000009.png  1  1\n"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (CELEBA, ["Young", "Smiling"]),
        ("image_id,Young,Smiling\n000001.png,1,0\n000002.png,0,0\n000003.png,0,1\n", ["Young", "Smiling"]),
        ("000001.png,1,0\n000002.png,0,0\n000003.png,0,1\n", ["attribute 1", "attribute 2"]),
    ],
)
def test_attributes_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, names: list[str]) -> None:
    root = write_images(tmp_path / "photos", [f"00000{index}.png" for index in (1, 2, 3)])
    (tmp_path / "list.txt").write_text(text)
    cache, labels = str(tmp_path / "cache"), str(tmp_path / "list.txt")
    train, test, _ = build_dataset(Data(name="folder", root=str(root), cache_dir=cache, image_size=8, labels=labels))
    assert train.labels is None and test is None and train.attribute_names == names
    assert train.attributes is not None and train.attributes.dtype == torch.uint8
    assert train.attributes.tolist() == [[1, 0], [0, 0], [0, 1]]
    assert "have 2 attributes in" in caplog.text
    assert ("names 1 images that are not in" in caplog.text) == (text == CELEBA)


def test_two_attributes_of_one_name_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.png")
    (tmp_path / "list.csv").write_text("path,a,b,a\n1.png,1,0,0\n")
    with pytest.raises(DatasetError, match=r"list.csv has two columns 'a': rename one"):
        list_labelled(tmp_path, Path("list.csv"))


def test_attributes_are_not_held_out(tmp_path: Path) -> None:
    """The measure of attributes holds out images by itself. If there are test images, data.holdout is ignored."""
    touch(tmp_path, "1.png", "2.png", "test/3.png")
    (tmp_path / "list.txt").write_text("1.png,1,0\n2.png,0,0\n")
    with pytest.raises(DatasetError, match=r"data.holdout needs labels, but .*list.txt gives attributes: remove"):
        list_labelled(tmp_path, Path("list.txt"), held_out=True)
    (tmp_path / "list.txt").write_text("1.png,1,0\n2.png,0,0\ntest/3.png,0,1")
    train, test = list_labelled(tmp_path, Path("list.txt"), held_out=True)
    assert (train.files, test and test.files) == (["1.png", "2.png"], ["test/3.png"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n", "labels.csv is empty: write one line per image"),
        ("x.png,a\ny.png,b\n", "names none of the images in .*, such as 1.png, and not as in its last line, y.png,b"),
        ("1.png,a\n2.png\n", "line 2 is not complete: write a path and a label, separated by commas"),
        ("1.png\n2.png\n", "line 1: the path 1.png has no label: write its label behind it"),
        ("1.png,a\n2.png,\n", "line 2 is not complete: write a path and a label, separated by commas"),
        ("1.png,a\n2.png,b\n./1.png,b\n", "line 3: 1.png is in line 1 already: remove one of the two lines"),
        (
            "1.png,a,x\n2.png,b,x\n",
            "line 1: 2 columns follow the path 1.png: write a path and a label, separated by co",
        ),
        ("1.png a\n2.png b c\n", "line 2: 2 columns follow the path 2.png: .* contains blanks in double quotes"),
        ("1.png,0,1\n2.png,0\n", "line 2 is not complete: write a path and 2 values of 0 and 1, separated by commas"),
        ("1.png,0,1\n2.png,0,1,0\n", "line 2: 3 columns follow the path 2.png: write a path and 2 values"),
        ("1.png,0,1\n2.png,0,2\n", "line 2: the value 2 of an attribute is neither 0 nor 1: write 0 or 1"),
        ("1.png,a\n2.png,a\n", "all 2 training images that .* names have the label a: add images with another label"),
        ("1.png,a\n2.png,b\ntest/3.png,c\n", "the 1 test images that .* names have no label of a training image: add"),
        ("1.png,a\n2.png,b\n", "names no images in a folder test/ or val/: add such images, or set data.holdout=0.1"),
        ("test/3.png,a\n", "names only images in test/"),
        (b"1.png,\xff\n", "is not UTF-8 text"),
        ("1.png,a\n2.png,b\n".encode("utf-16-le"), "is not UTF-8 text: save it as UTF-8"),
        (None, "no file labels.csv in the current folder or in .*: set data.labels to the path"),
    ],
)
def test_lists_that_cannot_be_used_are_explained(tmp_path: Path, text: str | bytes | None, expected: str) -> None:
    touch(tmp_path, "1.png", "2.png", "test/3.png")
    if text is not None:
        (tmp_path / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DatasetError, match=re.compile(expected)) as raised:
        list_labelled(tmp_path, Path("labels.csv"))
    assert "\n" not in str(raised.value)
