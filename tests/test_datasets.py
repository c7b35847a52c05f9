"""Tests of the data sets: listing, decoding, cache, streaming, digests and the messages about unusable images."""

import errno
import gzip
import os
import pickle
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from config.schema import Data
from datasets import cache, decoding, sources, splits
from datasets.decoding import StreamedImages, decode_batches
from datasets.folder_layouts import list_folder
from datasets.images import DatasetError, StoredImages, Summary, from_arrays, summarize
from datasets.listing import Listing
from datasets.sources import SOURCES, DatasetInfo, build_dataset


def write_image(path: Path, array: np.ndarray) -> None:
    """Writes an array as an image file, and creates the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Folder with two classes of different brightness: 3 + 3 training images and 1 + 1 test images.

    One training image is greyscale and in a deeper folder. A text file and a hidden folder must be ignored.
    """
    root = tmp_path / "photos"
    for split, counts in (("train", (3, 2)), ("test", (1, 1))):
        for label, (name, count) in enumerate(zip(("ant", "bee"), counts, strict=True)):
            for index in range(count):
                write_image(root / split / name / f"{index}.png", np.full((9, 12, 3), 100 * label + index, np.uint8))
    write_image(root / "train" / "bee" / "deeper" / "grey.PNG", np.full((12, 9), 200, np.uint8))
    (root / "train" / "bee" / "notes.txt").write_text("not an image")
    (root / "train" / ".hidden").mkdir()
    return root


def open_data(name: Any, root: object, cache_dir: object, size: int) -> tuple[StoredImages, StoredImages, DatasetInfo]:
    """Opens a data set of stored images by name."""
    data = Data(name=name, root=str(root), cache_dir=str(cache_dir), image_size=size)
    train, test, info = build_dataset(data, processes=1)
    assert isinstance(train, StoredImages) and isinstance(test, StoredImages)
    return train, test, info


def open_folder(root: Path, tmp_path: Path, size: int = 8, **how: Any) -> tuple[Any, Any]:
    """Opens both splits of a folder; `how` sets further keys of the section `data`."""
    data = Data(name="folder", root=str(root), cache_dir=str(tmp_path / "cache"), image_size=size, **how)
    return build_dataset(data, processes=1)[:2]


def test_every_name_of_the_config_is_a_source() -> None:
    assert list(SOURCES) == list(get_args(Data.model_fields["name"].annotation))


def test_digits_are_embedded() -> None:
    train, test, info = open_data("digits", "unused", "unused", 8)
    assert test is not None and (len(train), len(test)) == (1437, 360)
    assert train.pixels.shape == (1437, 3, 8, 8) and info.classes == [str(i) for i in range(10)]
    assert train.pixels.max() == 255 and train.labels is not None and train.labels.bincount().min() > 130
    for mean, std, channel in zip(info.mean, info.std, train.pixels.transpose(0, 1).double() / 255, strict=True):
        assert (mean, std) == (pytest.approx(channel.mean().item()), pytest.approx(channel.std().item(), rel=1e-4))
    larger = open_data("digits", "unused", "unused", 16)[0]
    assert larger.pixels.shape[-2:] == (16, 16) and larger.labels is not None
    assert torch.equal(larger.labels, train.labels)


def test_folder_with_classes(tree: Path, tmp_path: Path) -> None:
    train, test = open_folder(tree, tmp_path)
    assert train.summary == summarize([train.pixels])
    assert test is not None and train.labels is not None and test.labels is not None
    assert train.classes == ["ant", "bee"] == test.classes
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 1]
    assert train.pixels.shape == (6, 3, 8, 8)
    assert train.pixels[:, :, 4, 4].tolist() == [[v] * 3 for v in (0, 1, 2, 100, 101, 200)]


def test_images_are_cropped_to_their_central_square(tmp_path: Path) -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    write_image(tmp_path / "flat" / "a.png", wide)
    train, test = open_folder(tmp_path / "flat", tmp_path)
    assert test is None and train.labels is None
    assert torch.equal(train.pixels[0, 0], torch.arange(64, dtype=torch.uint8).view(8, 8))


def test_16_bit_grey_and_orientation_are_read_right(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    write_image(tmp_path / "flat" / "a.png", ramp)
    turned = np.zeros((8, 8, 3), np.uint8)
    turned[0] = 255  # the top row is bright, and EXIF asks for a turn by 180 degrees
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(turned).save(tmp_path / "flat" / "b.png", exif=exif)
    first, second = open_folder(tmp_path / "flat", tmp_path)[0].pixels
    assert (first.numpy() == (ramp >> 8)[None]).all()
    assert second[:, 7].eq(255).all() and second[:, :7].eq(0).all()


def test_a_palettes_transparency_raises_no_warning(tmp_path: Path) -> None:
    decoding._silence_pil.cache_clear()  # pytest removes the filter after every test
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Image.open(tmp_path / "a.png") as opened:
            opened.convert("RGB")
        assert len(caught) == 1, "PIL itself gives this warning"
        assert decoding.decode(tmp_path / "a.png", 8).shape == (8, 8, 3)
        assert len(caught) == 1


def test_linked_folders_are_read_once(tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tree / "train" / "ant" / "self").symlink_to(tree / "train" / "ant")
    write_image(tree / "train" / "stray.png", np.zeros((8, 8, 3), np.uint8))
    caplog.set_level("INFO")
    train, _ = open_folder(tree, tmp_path)
    assert len(train) == 6
    assert "1 images in" in caplog.text and "left out" in caplog.text


def test_digests_tell_data_sets_apart(tree: Path, tmp_path: Path) -> None:
    train, _ = open_folder(tree, tmp_path)
    assert train.labels is not None
    same = StoredImages(train.pixels.clone(), train.labels.clone(), ["ant", "bee"])
    assert same.digest() == train.digest()
    one_pixel = train.pixels.clone()
    one_pixel[3, 1, 2, 2] += 1
    others = [
        StoredImages(one_pixel, train.labels, train.classes),
        StoredImages(train.pixels + 1, train.labels, train.classes),
        StoredImages(train.pixels, 1 - train.labels, train.classes),
        StoredImages(train.pixels[:5], train.labels[:5], train.classes),
        StoredImages(train.pixels, train.labels, ["ant", "cow"]),
        StoredImages(train.pixels, None, train.classes),
    ]
    assert len({train.digest(), *(other.digest() for other in others)}) == 7


@pytest.mark.parametrize("inside", ["", "train"])
def test_flat_folders_have_no_labels(tmp_path: Path, inside: str) -> None:
    for index in range(3):
        write_image(tmp_path / "flat" / inside / f"{index}.jpg", np.full((8, 8, 3), 9, np.uint8))
    train, test = open_folder(tmp_path / "flat", tmp_path)
    assert len(train) == 3 and train.labels is None and test is None


def test_the_cache_serves_until_its_source_changes(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = open_folder(tree, tmp_path)
    decoded: list[Path] = []
    decode = decoding.decode

    def counting(path: Path, *rest: Any) -> np.ndarray:
        decoded.append(path)
        return decode(path, *rest)

    monkeypatch.setattr(decoding, "decode", counting)

    second, _ = open_folder(tree, tmp_path)
    assert decoded == [] and torch.equal(first.pixels, second.pixels)

    changed = tree / "train" / "ant" / "0.png"
    status = changed.stat()
    write_image(changed, np.full((9, 12, 3), 50, np.uint8))
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    third, _ = open_folder(tree, tmp_path)
    assert len(decoded) == 6 and third.pixels[0].eq(50).all()

    for mark in (tmp_path / "cache").glob("*.json"):
        mark.write_text("")  # a full disk can leave an empty file
    assert torch.equal(open_folder(tree, tmp_path)[0].pixels, third.pixels)

    for pixels_file in (tmp_path / "cache").glob("*.npy"):
        os.truncate(pixels_file, pixels_file.stat().st_size - 100)
    assert torch.equal(open_folder(tree, tmp_path)[0].pixels, third.pixels)

    (tree / "train" / "ant" / "2.png").unlink()
    assert len(open_folder(tree, tmp_path)[0]) == 5
    assert open_folder(tree, tmp_path, size=4)[0].pixels.shape[-1] == 4
    assert not list((tmp_path / "cache").glob("*.partial.*"))


def test_data_sets_on_one_root_keep_their_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same folder is read with its classes, as a flat folder and as another data set. Each has its own cache."""
    for name in ("a", "b"):
        for index in range(2):
            pixels = np.full((8, 8, 3), 10 * (name == "b") + index, np.uint8)
            for split in ("train", "test"):
                write_image(tmp_path / "root" / split / name / f"{index}.png", pixels)
    write_image(tmp_path / "root" / "train" / "beside.png", np.full((8, 8, 3), 77, np.uint8))
    train, flat = list_folder(tmp_path / "root")[0], list_folder(tmp_path / "root" / "train")[0]
    listings = [train, flat, Listing(train.root, train.files[1:], [0] * 3, ["a"], "tiny")]
    expected = [[0, 1, 10, 11], [0, 1, 10, 11, 77], [1, 10, 11]]

    def open_all() -> list[list[int]]:
        opened = [
            cache.open_listing(listing, 8, tmp_path / "cache", stream=False, num_workers=1, processes=1)
            for listing in listings
        ]
        return [next(images.batches([range(len(images))]))[:, 0, 0, 0].tolist() for images in opened]

    caplog.set_level("INFO")
    assert open_all() == expected
    monkeypatch.setattr(decoding, "decode", None)
    assert open_all() == expected
    assert "decoding all images again" not in caplog.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_stale_cache_is_named_with_the_reason(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level("INFO")

    def reasons() -> list[str]:
        caplog.clear()
        open_folder(tree, tmp_path, stream=stream)
        return [line for line in caplog.messages if line.endswith("decoding all images again")]

    assert reasons() == [] == reasons(), "no message the first time, and none from a valid cache"
    before = {*(tmp_path / "cache").iterdir()}
    (tree / "train" / "ant" / "2.png").unlink()
    (line,) = reasons()
    assert str(tree / "train") in line and "files were added, removed or changed" in line
    (mark,) = (path for path in {*(tmp_path / "cache").iterdir()} - before if path.suffix == ".json")
    mark.write_text("")
    (line,) = reasons()
    assert f"{mark.name} of {tree / 'train'} is damaged" in line
    with monkeypatch.context() as patch:
        patch.setattr(cache, "CACHE_VERSION", cache.CACHE_VERSION + 1)
        assert len(reasons()) == 2 and "another version" in caplog.text
    if not stream:
        pixels_file = mark.with_suffix(".npy")
        os.truncate(pixels_file, pixels_file.stat().st_size - 100)
        (line,) = reasons()
        assert f"{pixels_file} are truncated or damaged" in line
        pixels_file.unlink()
    assert reasons() == []


def test_each_rule_has_a_cache_and_caches_of_earlier_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of other files is kept for an hour after its last use, because it may be another machine's."""
    image, folder = tmp_path / "photos" / "0.png", tmp_path / "cache"
    write_image(image, np.zeros((8, 8, 4), np.uint8))

    def level(background: int) -> int:
        return int(open_folder(image.parent, tmp_path, background=[background] * 3)[0].pixels.unique().item())

    assert [level(255), level(7)] == [255, 7]
    first = {*folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode", None)
        assert [level(255), level(7)] == [255, 7] and {*folder.iterdir()} == first
    for path in first:
        os.utime(path, (0, 0))
    level(7)  # used again
    write_image(image, np.full((8, 8, 4), 255, np.uint8))
    assert level(7) == 255
    assert len(first) == 4 and len(first & {*folder.iterdir()}) == 2 and len({*folder.iterdir()}) == 4


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partial file of a killed process is removed. A partial file that another process is writing is kept.

    A second call decodes the same folder before the first call has finished.
    """
    open_folder(tree, tmp_path)
    (pixels_file, *_) = sorted((tmp_path / "cache").glob("*.npy"))
    left = pixels_file.with_name(f"{pixels_file.stem}.0.partial.npy")
    left.write_text("")
    decode_all, seen = cache._decode_all, []

    def slowly(listing: Listing, *rest: Any) -> Iterator[torch.Tensor]:
        yield from decode_all(listing, *rest)
        seen.append(len(list((tmp_path / "cache").glob(f"{pixels_file.stem}.*.partial.npy"))))
        if len(seen) == 1:
            assert not left.exists()
            pixels_file.with_suffix(".json").unlink(missing_ok=True)
            cache.open_listing(listing, 8, tmp_path / "cache", stream=False, num_workers=None, processes=1)

    pixels_file.with_suffix(".json").unlink()
    monkeypatch.setattr(cache, "_decode_all", slowly)
    open_folder(tree, tmp_path)
    assert seen == [1, 2] and not list((tmp_path / "cache").glob("*.partial.*"))


def test_images_that_fill_half_of_the_memory_are_streamed(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Images that fill more than half of the memory are streamed, unless data.stream says otherwise."""
    assert splits.memory_bytes() > 1e8
    caplog.set_level("INFO")
    needed = 8 * 3 * 8**2
    for memory, kind in ((2 * needed, StoredImages), (2 * needed - 1, StreamedImages)):
        monkeypatch.setattr(splits, "memory_bytes", lambda memory=memory: memory)
        assert isinstance(open_folder(tree, tmp_path)[0], kind)
        assert ("8 images in" in caplog.text) == (kind is StreamedImages)
        assert isinstance(open_folder(tree, tmp_path, stream=False)[0], StoredImages)
        assert isinstance(open_folder(tree, tmp_path, stream=True)[1], StreamedImages)


def test_images_larger_than_the_memory_are_not_stored(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "memory_bytes", lambda: 8 * 3 * 4096**2 - 1)
    with pytest.raises(DatasetError, match=r"8 images in .*photos take 0\.4 GB at 4096 px.*data\.stream=false"):
        open_folder(tree, tmp_path, size=4096, stream=False)
    assert not (tmp_path / "cache").exists()


def test_streamed_images_are_the_stored_ones(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, streamed = open_folder(tree, tmp_path), open_folder(tree, tmp_path / "streamed", stream=True)
    assert not list((tmp_path / "streamed" / "cache").glob("*.npy"))
    for here, there in zip(stored, streamed, strict=True):
        assert here.digest() == there.digest() and here.summary == there.summary and len(here) == len(there)
        assert here.classes == there.classes and torch.equal(here.labels, there.labels)
    wanted = [torch.tensor([5, 0, 3]), range(1, 5), torch.tensor([2])]
    for here, there in zip(stored[0].batches(wanted), streamed[0].batches(wanted), strict=True):
        assert torch.equal(here, there)

    decoded: list[Path] = []
    monkeypatch.setattr(decoding, "decode", lambda path, *_: decoded.append(path))
    again, _ = open_folder(tree, tmp_path / "streamed", stream=True)
    assert decoded == [] and again.summary == stored[0].summary


@pytest.fixture
def numbered(tmp_path: Path) -> Listing:
    """Listing of 20 images; all pixels of an image have the value of its index."""
    for index in range(20):
        write_image(tmp_path / "numbered" / f"{index:02}.png", np.full((4, 4, 3), index, np.uint8))
    return Listing(tmp_path / "numbered", [f"{index:02}.png" for index in range(20)], None, [])


def decoding_threads() -> list[str]:
    """Returns the names of the decoding threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize(("num_workers", "together"), [(3, True), (2, False)])
def test_a_batch_is_decoded_by_as_many_threads_as_there_should_be(
    numbered: Listing, monkeypatch: pytest.MonkeyPatch, num_workers: int, together: bool
) -> None:
    """A barrier opens only if the three groups of a batch are decoded at the same time, which needs three threads."""
    barrier, decode = threading.Barrier(3), decoding.decode

    def meet(path: Path, *rest: Any) -> np.ndarray:
        if path.name in ("00.png", "08.png", "16.png"):
            barrier.wait(timeout=60 if together else 1)
        return decode(path, *rest)

    monkeypatch.setattr(decoding, "decode", meet)
    batches = decode_batches(numbered, 4, [range(20)], num_workers)
    if together:
        assert next(batches)[:, 0, 0, 0].tolist() == list(range(20))
    else:
        with pytest.raises(threading.BrokenBarrierError):
            next(batches)


def test_batches_are_decoded_ahead_and_no_further(numbered: Listing) -> None:
    asked: list[int] = []

    def wanted() -> Iterator[torch.Tensor]:
        for index in range(19, -1, -1):
            asked.append(index)
            yield torch.tensor([index])

    batches = decode_batches(numbered, 4, wanted(), num_workers=2)
    for index in (19, 18):
        assert next(batches).unique().tolist() == [index]
        assert asked[-1] == index - decoding.AHEAD
    batches.close()
    assert not decoding_threads()
    assert [b.unique().item() for b in decode_batches(numbered, 4, (range(i, i + 1) for i in range(3)), 2)] == [0, 1, 2]


def test_an_image_that_goes_bad_is_named_when_its_batch_is_due(numbered: Listing) -> None:
    (numbered.root / "02.png").write_bytes(b"")
    batches = decode_batches(numbered, 4, (range(i, i + 1) for i in range(20)), num_workers=2)
    assert [next(batches).unique().item() for _ in range(2)] == [0, 1]
    with pytest.raises(DatasetError, match=r"cannot read the image .*02\.png"):
        next(batches)
    assert not decoding_threads()


@pytest.mark.parametrize("then", [True, False])
def test_pixels_are_those_of_the_files_however_they_were_held_before(tree: Path, tmp_path: Path, then: bool) -> None:
    """Stored images follow a change of their files.

    The images are opened as stored, and their files change. Then they are opened again (streamed if `then`, else
    stored), and once more as stored. Both times the pixels are the new ones.
    """
    open_folder(tree, tmp_path, stream=False)
    for path in tree.rglob("*.png"):
        write_image(path, 255 - np.asarray(Image.open(path)))
    found = open_folder(tree, tmp_path, stream=then)[0], open_folder(tree, tmp_path, stream=False)[0]
    (first,), (last,) = (images.batches([range(6)]) for images in found)
    assert torch.equal(first, last) and first[0, 0, 0, 0] == 255
    assert found[0].summary == found[1].summary == summarize([last])


def test_what_was_looked_through_is_still_known_when_storing_fails(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cached statistics of streamed images stay valid if the pixels cannot be written to the cache later."""
    open_folder(tree, tmp_path, stream=True)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_allocate", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
        with pytest.raises(DatasetError, match=r"\(Read-only\): set data\.cache_dir to another folder$"):
            open_folder(tree, tmp_path, stream=False)
    monkeypatch.setattr(decoding, "decode", None)
    assert len(open_folder(tree, tmp_path, stream=True)[0]) == 6


def test_large_images_are_decoded_few_at_a_time(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counting(blocks: Iterator[torch.Tensor]) -> Summary:
        kept = list(blocks)
        sizes.extend(len(block) for block in kept)
        return summarize(kept)

    monkeypatch.setattr(cache, "BLOCK_BYTES", 2 * 3 * 64**2)
    monkeypatch.setattr(cache, "summarize", counting)
    images, _ = open_folder(tree, tmp_path, size=64, stream=False)
    assert sizes == [2, 2, 2, 2] and images.summary == summarize([images.pixels])
    open_folder(tree, tmp_path, size=128, stream=True)
    assert sizes[4:] == [1] * 8, "an image that is larger than a block is a block of its own"


def test_pipes_are_refused(tree: Path, tmp_path: Path) -> None:
    os.mkfifo(tree / "train" / "ant" / "pipe.png")
    with pytest.raises(DatasetError, match=r"pipe\.png is not a regular file: remove it"):
        open_folder(tree, tmp_path)


def test_the_digest_of_what_runs_were_trained_on_stays() -> None:
    """The digest of a data set never changes, because checkpoints store it."""
    assert open_data("digits", "unused", "unused", 8)[0].digest() == "4693b1156cb4fd053639a6059230c3b9"


def test_a_disk_that_is_full_is_explained(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DatasetError, match=r"No space left on device.*data\.cache_dir"):
        open_folder(tree, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_tiny_imagenet_is_read_in_its_official_layout(tmp_path: Path) -> None:
    base = tmp_path / "tiny-imagenet-200"
    for label, name in enumerate(("n02", "n01")):
        for index in range(2):
            write_image(
                base / "train" / name / "images" / f"{name}_{index}.JPEG", np.full((8, 8, 3), 90 * label, np.uint8)
            )
    for index in range(3):
        write_image(base / "val" / "images" / f"val_{index}.JPEG", np.full((8, 8, 3), 40 * index, np.uint8))
    (base / "wnids.txt").write_text("n02\nn01\n")
    (base / "val" / "val_annotations.txt").write_text(
        "val_1.JPEG\tn01\t0\t0\t7\t7\nval_0.JPEG\tn02\t0\t0\t7\t7\nval_2.JPEG\tn01\t0\t0\t7\t7\n"
    )
    for root in (base, tmp_path):
        train, test, info = open_data("tiny", str(root), str(tmp_path / "cache"), 8)
        assert test is not None and train.labels is not None and test.labels is not None
        assert info.classes == ["n01", "n02"] and train.labels.tolist() == [0, 0, 1, 1]
        assert train.pixels[:, 0, 0, 0].tolist() == [90, 90, 0, 0]
        assert test.labels.tolist() == [0, 1, 0] and test.pixels[:, 0, 0, 0].tolist() == [40, 0, 80]


def write_idx(path: Path, array: np.ndarray) -> None:
    """Writes an array as a compressed file in the IDX format of Fashion-MNIST."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


@pytest.mark.parametrize("where", [".", "FashionMNIST/raw", "debian"])
def test_fashion_mnist_from_archives_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr("datasets.sources.DEBIAN_FASHION_MNIST", tmp_path / "root" / "debian")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("t10k", 3)):
        folder = tmp_path / "root" / where
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8))
    train, test, info = open_data("fashion_mnist", str(tmp_path / "root"), "unused", 28)
    assert test is not None and (len(train), len(test)) == (6, 3) and len(info.classes) == 10
    expected = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    assert (train.pixels.numpy() == expected[:, None]).all()
    assert open_data("fashion_mnist", str(tmp_path / "root"), "unused", 32)[0].pixels.shape == (6, 3, 32, 32)


def test_cifar_is_read_from_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [3, 7]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    train, test, info = open_data("cifar10", str(tmp_path), "unused", 32)
    assert test is not None and train.labels is not None
    assert len(train) == 10 and (train.pixels[:2].numpy() == data.reshape(2, 3, 32, 32)).all()
    assert train.labels[:2].tolist() == [3, 7]
    values = data.reshape(2, 3, 1024) / 255
    assert info.mean == pytest.approx(values.mean(axis=(0, 2))) and info.std == pytest.approx(values.std(axis=(0, 2)))


def test_a_damaged_archive_is_named_and_can_be_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.sources.DEBIAN_FASHION_MNIST", tmp_path / "none")
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", rng.integers(0, 256, (6, 28, 28), dtype=np.uint8))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", np.arange(6, dtype=np.uint8))
    archive = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=archive.name):
        open_data("fashion_mnist", str(tmp_path), "unused", 28)
    with gzip.open(archive, "wb") as file:
        file.write(b"not an idx file")
    with pytest.raises(DatasetError, match="damaged"):
        open_data("fashion_mnist", str(tmp_path), "unused", 28)
    archive.write_bytes(whole)
    unpacked = tmp_path / "FashionMNIST" / "raw" / archive.stem
    unpacked.unlink()
    assert len(open_data("fashion_mnist", str(tmp_path), "unused", 28)[0]) == 6
    unpacked.write_bytes(unpacked.read_bytes()[:2000])
    with pytest.raises(DatasetError, match=r"damaged .*: remove it"):
        open_data("fashion_mnist", str(tmp_path), "unused", 28)


def test_two_runs_that_start_together_download_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    archive, downloads, both_look = tmp_path / "archive", [], threading.Barrier(2)

    def build(root: Path, train: bool, download: bool) -> bytes:
        if not archive.exists() and not download:
            both_look.wait(timeout=60)
            raise RuntimeError("Dataset not found or corrupted.")
        if not archive.exists():
            downloads.append(train)
            with open(archive, "wb") as file:
                file.write(b"half")
                file.flush()
                time.sleep(0.3)
                file.write(b"half")
        return archive.read_bytes()

    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(sources._open, build, tmp_path, "a set", "nowhere", "wait") for _ in range(2)]
    assert [run.result() for run in runs] == [(b"halfhalf", b"halfhalf")] * 2 and downloads == [True]
    assert caplog.text.count("waiting for another process that downloads a set into") == 1


@pytest.mark.parametrize(("name", "archive"), [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python")])
def test_a_refused_download_says_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, archive: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("connection refused")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(DatasetError, match="connection refused") as caught:
        open_data(name, str(tmp_path), "unused", 32)
    assert archive in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda root: (root / "train" / "ant" / "0.png").write_bytes(b"no image"), "ant/0.png"),
        (lambda root: os.truncate(root / "test" / "bee" / "0.png", 45), "bee/0.png"),
        (lambda root: (root / "test").rename(root / "other"), "neither test/ nor val/"),
        (lambda root: [f.rename(f"{f}_") for f in (root / "test").iterdir()], "no images in the classes of"),
        (lambda root: [p.unlink() for p in root.rglob("*.*") if p.is_file()], "no images in"),
        (lambda root: [p.unlink() for p in (root / "train" / "ant").iterdir()], "only one class"),
        (lambda root: root.rename(root.parent / "gone"), "no folder"),
    ],
)
def test_unusable_folders_are_explained(tree: Path, tmp_path: Path, damage, expected: str) -> None:  # type: ignore[no-untyped-def]
    damage(tree)
    with pytest.raises(DatasetError) as caught:
        open_folder(tree, tmp_path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_tiny_imagenet_that_is_not_there_says_what_to_unpack(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"tiny-imagenet-200\.zip"):
        open_data("tiny", str(tmp_path), "unused", 64)


def test_tiny_imagenet_without_annotations_is_explained(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "n01" / "images" / "a.JPEG", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "wnids.txt").write_text("n01\n")
    (tmp_path / "val").mkdir()
    for text, expected in (("", "is empty"), ("val_0.JPEG\tn99\t0\n", "not a complete"), ("x", "not a complete")):
        (tmp_path / "val" / "val_annotations.txt").write_text(text)
        with pytest.raises(DatasetError, match=expected):
            open_data("tiny", str(tmp_path), str(tmp_path / "cache"), 8)


def test_statistics_against_numpy() -> None:
    pixels = torch.randint(0, 256, (1500, 3, 5, 5), dtype=torch.uint8)
    mean, std = summarize(pixels.split(100)).statistics
    np.testing.assert_allclose(mean, pixels.numpy().mean((0, 2, 3)) / 255)
    np.testing.assert_allclose(std, pixels.numpy().std((0, 2, 3)) / 255)


def test_resizing_against_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.images.RESIZED_AT_ONCE", 3)
    arrays = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    ours = from_arrays(arrays, np.zeros(4), ["a"], 16).pixels
    theirs = torchvision.transforms.v2.functional.resize(torch.from_numpy(arrays)[:, None], [16, 16], antialias=True)
    assert (ours.int() - theirs.int()).abs().max() <= 1
