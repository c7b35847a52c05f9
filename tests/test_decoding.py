"""Tests of image files as people have them: metadata, ranges, transparency, formats, damage and size."""

import io
import logging
import os
import struct
import sys
import types
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from config.schema import Data
from datasets import decoding, formats
from datasets.decoding import Rules, decode
from datasets.findings import Findings, ImageError
from datasets.formats import describe_endings, image_endings
from datasets.images import DatasetError
from datasets.sources import build_dataset

pytestmark = pytest.mark.filterwarnings("ignore")  # pytest removes the filter that decoding sets

WHITE = [255, 255, 255]


@pytest.fixture(autouse=True)
def limit_of_pil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores PIL's limit of pixels, which decoding sets, after each test."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def open_folder(root: Path, size: int = 4, **how: Any) -> tuple[Any, Any]:
    """Opens both splits of a folder; `how` sets further keys of the section `data`."""
    data = Data(name="folder", root=str(root), cache_dir=str(root.parent / "cache"), image_size=size, **how)
    return build_dataset(data)[:2]


def pixels_of(images: Any) -> torch.Tensor:
    """Returns all pixels of a split."""
    (pixels,) = images.batches([range(len(images))])
    return pixels


def save(path: Path, array: np.ndarray, **how: Any) -> None:
    """Writes an array as an image file, and creates the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **how)


# Metadata.


def exif(tag: int, kind: int) -> bytes:
    """Returns EXIF data with orientation 6 and one tag of any type, whose 8 bytes of value follow the directory."""
    entries = sorted(
        [(0x0112, struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)), (tag, struct.pack("<HHII", tag, kind, 1, 38))]
    )
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(e for _, e in entries) + b"\0\0\0\0" + b"\1" * 8


TAGS = (254, 256, 257, 258, 270, 271, 272, 282, 283, 296, 305, 306, 315, 513, 531, 33432, 34665, 34853, 37500, 40965)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_only_the_orientation_is_read_from_metadata(tmp_path: Path, ending: str) -> None:
    """An image whose left half is red is turned so that its upper half is red, whatever the other tag is."""
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:, :12, 0] = 255
    for tag in TAGS if ending == "jpg" else TAGS[1:3]:
        for kind in range(1, 13):
            path = tmp_path / f"a.{ending}"
            save(path, stored, exif=exif(tag, kind))
            shown = decode(path, 16)
            assert shown[:6, :, 0].min() > 200 and shown[10:, :, 0].max() < 50, (tag, kind)


def tiff(pixels: np.ndarray, tag: int, kind: int) -> bytes:
    """Returns an uncompressed RGB TIFF with orientation 6 and one tag of any type, whose value follows the pixels."""
    height, width, _ = pixels.shape
    known = {256: width, 257: height, 258: 8, 259: 1, 262: 2, 273: 0, 274: 6, 277: 3, 278: height, 279: pixels.size}
    start = 8 + 2 + 12 * (len(known) + 1) + 4
    entries = {name: struct.pack("<HHII", name, 4, 1, value) for name, value in (known | {273: start}).items()}
    entries[tag] = struct.pack("<HHII", tag, kind, 1, start + pixels.size)
    directory = struct.pack("<H", len(entries)) + b"".join(entries[name] for name in sorted(entries)) + b"\0\0\0\0"
    return b"II*\0\x08\0\0\0" + directory + pixels.tobytes() + b"\1" * 64


def test_only_the_orientation_is_read_from_the_tags_of_a_tiff(tmp_path: Path) -> None:
    """The tags of a TIFF also hold its XMP data and the places of other directories."""
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:, :12, 0] = 255
    for tag in (270, 282, 700, 33432, 34665, 34675, 34853, 37500, 40965):
        for kind in range(1, 13):
            (tmp_path / "a.tif").write_bytes(tiff(stored, tag, kind))
            shown = decode(tmp_path / "a.tif", 16)
            assert shown[:6, :, 0].min() > 200 and shown[10:, :, 0].max() < 50, (tag, kind)


@pytest.mark.parametrize("metadata", [b"Exif\0\0II*\0", b"Exif\0\0" + b"\xff" * 40, exif(256, 3)[:-30]])
def test_damaged_metadata_do_not_make_an_image_unreadable(tmp_path: Path, metadata: bytes) -> None:
    save(tmp_path / "a.jpg", np.full((8, 8, 3), 77, np.uint8), exif=metadata)
    assert (decode(tmp_path / "a.jpg", 8) == 77).all()


@pytest.mark.parametrize("error", [struct.error("x"), TypeError("x"), AttributeError("x"), MemoryError(), IndexError()])
def test_every_error_of_a_decoder_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ImageError, match=r"cannot read the image .*a\.png \(") as caught:
        decode(tmp_path / "a.png", 8)
    assert caught.value.damaged == (not isinstance(error, MemoryError))


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "tif", "webp", "avif", "jp2", "bmp", "tga", "ppm", "sgi"])
def test_a_file_without_its_end_is_unreadable(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    save(path, np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    assert decode(path, 8).shape == (8, 8, 3)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    for _ in range(2):
        with pytest.raises(ImageError) as caught:
            decode(path, 8)
        assert caught.value.damaged


@pytest.mark.long
@pytest.mark.parametrize(
    "ending", ["jpg", "png", "gif", "tif", "webp", "avif", "jp2", "bmp", "tga", "ppm", "ico", "pcx", "sgi", "im", "dds"]
)
def test_randomly_damaged_files_are_read_or_named(tmp_path: Path, ending: str) -> None:
    """1,500 damaged files of each format: bytes are changed, removed or repeated, or the end is missing."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((48, 32))
    with_exif = {"exif": exif(282, 3)} if ending in ("jpg", "png", "webp", "tif", "avif") else {}
    sources = []
    for image in (noise, noise.convert("RGBA"), noise.convert("L"), noise.convert("P")):
        stored = io.BytesIO()
        try:
            image.save(stored, image.format or Image.registered_extensions()[f".{ending}"], **with_exif)
        except (OSError, ValueError):  # the format has no such mode
            continue
        sources.append(stored.getvalue())
    path, rules, unreadable = tmp_path / f"a.{ending}", Rules(max_megapixels=1.0), 0
    for index in range(1500):
        data = bytearray(sources[index % len(sources)])
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(len(data))) if rng.random() < 0.5 else int(rng.integers(min(len(data), 200)))
            length = int(rng.integers(1, 9))
            action = rng.integers(4)
            if action == 0:
                data[at : at + length] = rng.bytes(length)
            elif action == 1:
                del data[at : at + length]
            elif action == 2:
                data[at:at] = data[at : at + length]
            elif len(data) > 20:
                del data[max(10, at) :]
        path.write_bytes(data)
        try:
            found = decode(path, 8, rules, Findings())
            assert found.shape == (8, 8, 3) and found.dtype == np.uint8
        except ImageError as error:
            unreadable += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert 0 < unreadable < 1500


# Ranges.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("dtype", "ending", "largest", "bits"),
    [
        (np.uint16, "png", 250, 8),
        (np.uint16, "png", 1000, 10),
        (np.uint16, "tif", 4095, 12),
        (np.uint16, "png", 4096, 16),
        (np.int32, "tif", 255, 8),
        (np.int32, "tif", 65535, 16),
    ],
)
def test_greys_are_scaled_by_the_range_that_training_images_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: Any, ending: str, largest: int, bits: int, stream: bool
) -> None:
    """The training images choose the range. A test image with larger values is clipped, and the log counts images."""
    caplog.set_level("INFO")
    root = tmp_path / "photos"
    ramp = np.linspace(0, largest, 16).reshape(4, 4).astype(dtype)
    save(root / "train" / "a" / f"0.{ending}", ramp)
    save(root / "train" / "b" / f"0.{ending}", ramp // 2)
    for name in "ab":
        save(root / "test" / name / f"0.{ending}", np.minimum(ramp.astype(np.int64) * 3, 65535).astype(dtype))
    results = []
    for _ in range(2):
        caplog.clear()
        train, test = open_folder(root, stream=stream)
        results.append(train.digest() + test.digest())
        assert f"read as {bits} bits" in caplog.text and f"{bits} bits: " in caplog.text
        assert train.grey_bits == bits
        assert (pixels_of(train)[0].numpy() == (ramp >> (bits - 8))).all()
        tripled = (ramp.astype(np.int64) * 3).clip(0, 2**bits - 1) >> (bits - 8)
        assert (pixels_of(test)[0].numpy() == tripled).all()
    assert results[0] == results[1] == "".join(s.digest() for s in open_folder(root, stream=not stream))


def test_a_new_range_of_the_training_images_changes_the_test_images(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for split in ("train", "test"):
        for name in "ab":
            save(root / split / name / "0.png", np.full((4, 4), 1000, np.uint16))
    assert open_folder(root)[1].pixels.unique().tolist() == [1000 >> 2]
    save(root / "train" / "a" / "1.png", np.full((4, 4), 4000, np.uint16))
    train, test = open_folder(root)
    assert test.pixels.unique().tolist() == [1000 >> 4] and train.pixels.unique().tolist() == [1000 >> 4, 4000 >> 4]


def test_greys_keep_the_range_of_other_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A range that is given replaces that of the images. Each range has one cache, and clipped images are counted."""
    caplog.set_level("INFO")
    root = tmp_path / "photos"
    for name in "ab":
        save(root / "train" / name / "0.png", np.full((4, 4), 1000, np.uint16))
        save(root / "test" / name / "0.png", np.full((4, 4), 1000, np.uint16))
    data = Data(name="folder", root=str(root), cache_dir=str(tmp_path / "cache"), image_size=4)
    for given, bits, decodes in ((None, 10, True), (10, 10, False), (12, 12, True), (12, 12, False), (8, 8, True)):
        caplog.clear()
        train, _, info = build_dataset(data, grey_bits=given)
        assert pixels_of(train).unique().tolist() == [min(1000 >> (bits - 8), 255)] and info.grey_bits == bits
        assert ("2 of them have greys above this range, which become white" in caplog.text) == (bits == 8)
        assert ("decoding 2 images of" in caplog.text) == decodes


def raw_png(depth: int, color: int, width: int, height: int, rows: bytes, **chunks: bytes) -> bytes:
    """Returns a PNG file with the given depth, colour type and uncompressed rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    others = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + others + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_images_that_stay_dark_or_are_clipped_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PIL reads only the high byte of 16-bit colours. Values outside 16 bits cannot be shown."""
    caplog.set_level("INFO")
    root = tmp_path / "photos"
    root.mkdir()
    rows = b"".join(b"\0" + struct.pack(">12H", *[4000] * 12) for _ in range(4))
    (root / "dark.png").write_bytes(raw_png(16, 2, 4, 4, rows))
    save(root / "large.tif", np.full((4, 4), 70000, np.int32))
    assert pixels_of(open_folder(root)[0]).amax(dim=(1, 2, 3)).tolist() == [15, 255]
    for part in ("are nearly black", "are greyscale with values below 0 or above 65535"):
        assert f"1 of the 2 images of {root} {part}" in caplog.text


# Transparency.


@pytest.mark.parametrize("background", [WHITE, [10, 200, 30]])
@pytest.mark.parametrize(
    "kind", ["RGBA", "LA", "P-alphas", "P-index", "L", "RGB", "1", "L2", "L4", "I;16", "RGB16", "gif", "webp", "tif"]
)
def test_transparent_pixels_show_the_background(tmp_path: Path, kind: str, background: list[int]) -> None:
    """The left half is transparent and hides black or another grey. The right half is opaque."""
    path = tmp_path / (f"a.{kind}" if kind in ("gif", "webp", "tif") else "a.png")
    left = np.zeros((4, 4), bool)
    left[:, :2] = True
    results = []
    for hidden in (0, 1):
        if kind in ("RGBA", "LA", "webp", "tif"):  # with an alpha channel
            channels = [np.where(left, 90 * hidden, 255)] * (1 if kind == "LA" else 3) + [np.where(left, 0, 255)]
            how: dict[str, Any] = {"lossless": True, "exact": True} if kind == "webp" else {}
            Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).save(path, **how)
        elif kind in ("P-alphas", "P-index", "gif"):  # with transparent entries of the palette
            image = Image.new("P", (4, 4))
            image.putdata(left.ravel().astype(int).tolist())
            image.putpalette([*WHITE, *[90 * hidden] * 3])
            image.save(path, transparency=bytes([255, 0]) if kind == "P-alphas" else 1)
        else:  # with one transparent colour
            depth, color = {"1": (1, 0), "L2": (2, 0), "L4": (4, 0), "L": (8, 0), "I;16": (16, 0)}.get(kind, (8, 2))
            depth = 16 if kind == "RGB16" else depth
            channels_count = 3 if color == 2 else 1
            clear, opaque = hidden * (256 if kind == "RGB16" else 1), 2**depth - 1
            if kind == "1":
                opaque = 1 - hidden
            row = [value for value in (clear, clear, opaque, opaque) for _ in range(channels_count)]
            bits = "".join(f"{value:0{depth}b}" for value in row)
            packed = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
            tRNS = struct.pack(f">{channels_count}H", *[clear] * channels_count)
            path.write_bytes(raw_png(depth, color, 4, 4, (b"\0" + packed) * 4, tRNS=tRNS))
        found = decode(path, 4, Rules(background=(background[0], background[1], background[2])))
        assert (found[:, :2] == background).all()
        assert (found[:, 2:] == (255 * (1 - hidden) if kind == "1" else 255)).all()
        results.append(found)
    assert kind == "1" or (results[0] == results[1]).all()


def test_half_transparent_pixels_are_mixed_with_the_background(tmp_path: Path) -> None:
    """The result is alpha * colour + (1 - alpha) * background. Opaque pixels keep their values exactly."""
    values, alpha = np.meshgrid(np.arange(256), np.arange(256))
    array = np.stack([values, 255 - values, values // 2, alpha], axis=-1).astype(np.uint8)
    save(tmp_path / "a.png", array)
    for background in (255, 40):
        found = decode(tmp_path / "a.png", 256, Rules(background=(background,) * 3))
        share = array[..., 3:].astype(float) / 255
        expected = share * array[..., :3] + (1 - share) * background
        assert abs(found - expected).max() <= 1
        assert (found[255] == array[255, :, :3]).all() and (found[0] == background).all()


def test_the_background_is_part_of_the_cache_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    save(tmp_path / "opaque" / "a.png", np.full((4, 4, 4), 255, np.uint8))
    open_folder(tmp_path / "opaque")
    assert "transparent" not in caplog.text
    save(tmp_path / "photos" / "a.png", np.zeros((4, 4, 4), np.uint8))
    assert open_folder(tmp_path / "photos")[0].pixels.unique().tolist() == [255]
    assert open_folder(tmp_path / "photos", background=[7, 7, 7])[0].pixels.unique().tolist() == [7]
    assert open_folder(tmp_path / "photos", stream=True)[0].summary.statistics[0] == (1.0, 1.0, 1.0)
    assert caplog.text.count("1 of the 1 images of") == 3 and "show the colour data.background" in caplog.text


# Formats.


def test_files_of_all_endings_that_pil_reads_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Other files are counted by ending in one line, and the plug-in for HEIC is named."""
    caplog.set_level("INFO")
    root = tmp_path / "photos"
    endings = ["avif", "bmp", "gif", "jfif", "jp2", "jpe", "jpeg", "jpg", "png", "pgm", "tga", "tif", "webp", "JPG"]
    for ending in endings:
        save(root / "deep" / f"{ending}.{ending}", np.full((8, 8), 120, np.uint8))
    for name in ("a.txt", "b.txt", "c.HEIC", "film.mpg", "script.eps", "README", ".hidden", ".cache/d.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no image")
    train, _ = open_folder(root)
    assert train.names == sorted(f"deep/{ending}.{ending}" for ending in endings)
    assert (pixels_of(train).int() - 120).abs().max() <= 2
    (line,) = [message for message in caplog.messages if "not images" in message]
    assert line.startswith(f"left out files of {root} that are not images: 2 .txt, ")
    for part in ("1 .heic (pip install pillow-heif to read them)", "1 .mpg", "1 .eps", "1 without an ending"):
        assert part in line
    assert "hidden" not in line
    with pytest.raises(DatasetError, match=r"no images in .* \(left out: 1 \.heic \(pip install pillow-heif"):
        (tmp_path / "phone").mkdir()
        (root / "c.HEIC").rename(tmp_path / "phone" / "c.HEIC")
        open_folder(tmp_path / "phone")


def test_an_installed_plug_in_for_heic_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = types.ModuleType("pillow_heif")
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    monkeypatch.setattr(plugin, "register_heif_opener", lambda: Image.register_extension("PNG", ".heic"), raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    assert ".heic" in image_endings.__wrapped__()
    assert ".heic" not in image_endings()


def test_many_endings_are_counted_in_few_words() -> None:
    assert describe_endings(Counter(f".x{index:02}" for index in range(30))).endswith("1 .x09, 20 with other endings")
    assert set(Image.OPEN) >= formats.NOT_DECODED


def test_the_first_frame_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Animations, documents with several pages and JPEG files with several pictures are read and counted."""
    caplog.set_level("INFO")
    root = tmp_path / "photos"
    root.mkdir()
    endings = ["avif", "gif", "mpo", "png", "tif", "webp"]
    for ending in endings:
        for count in (1, 3):
            first, *others = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (40, 200, 90)[:count])
            how: dict[str, Any] = {"lossless": True} if ending == "webp" else {}
            how |= {"save_all": True, "append_images": others} if others else {}
            first.save(root / f"{ending}{count}.{ending}", **how)
    train, _ = open_folder(root)
    assert train.names == [f"{ending}{count}.{ending}" for ending in endings for count in (1, 3)]
    assert (pixels_of(train).int() - 40).abs().max() <= 2
    (line,) = [message for message in caplog.messages if "frames or pages" in message]
    assert line.startswith(f"6 of the 12 images of {root} have several frames or pages, of which the first is read")

    path, found = root / "gif3.gif", Findings()
    path.write_bytes(path.read_bytes()[:-20])  # the last frames are damaged
    assert (decode(path, 8, findings=found) == 40).all() and found.counts["frames"] == 1


# Unreadable files.


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Folder with 8 + 8 training and 4 + 4 test images, of which 6 + 7 and 1 + 0 are damaged.

    All pixels of an image have the value 100 for class a, 200 for class b.
    """
    for split, count, bad in (("train", 8, (6, 7)), ("test", 4, (1, 0))):
        for name, value, broken in zip("ab", (100, 200), bad, strict=True):
            for index in range(count):
                path = tmp_path / "photos" / split / name / f"{index}.png"
                save(path, np.full((8, 8, 3), value, np.uint8))
                if index < broken:
                    path.write_bytes(path.read_bytes()[:40] if index % 2 else b"no image")
    return tmp_path / "photos"


@pytest.mark.parametrize("stream", [False, True])
def test_all_unreadable_files_are_named_at_the_first_start(damaged: Path, stream: bool) -> None:
    with pytest.raises(DatasetError) as caught:
        open_folder(damaged, stream=stream)
    line = str(caught.value)
    assert (
        line.startswith(f"cannot read 14 images: {damaged}/train/a/0.png (cannot identify image file), ")
        and "\n" not in line
    )
    assert line.count(".png (") == 10 and line.endswith("repair or remove them, or set data.unreadable=skip")
    (listed,) = (damaged.parent / "cache").glob("unreadable-*.txt")
    assert str(listed) in line
    rows = listed.read_text().splitlines()
    assert len(rows) == 14 and rows[-1].startswith(f"{damaged}/test/a/0.png\tcannot identify")
    assert [path.suffix for path in (damaged.parent / "cache").iterdir()].count(".npy") == 0


def test_a_single_unreadable_file_is_named(tmp_path: Path) -> None:
    save(tmp_path / "photos" / "a.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "photos" / "b.png").write_bytes(b"")
    with pytest.raises(DatasetError) as caught:
        open_folder(tmp_path / "photos")
    start, end = (
        f"cannot read the image {tmp_path}/photos/b.png (",
        "): repair or remove it, or set data.unreadable=skip",
    )
    assert str(caught.value).startswith(start) and str(caught.value).endswith(end)
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "photos" / "b.png").unlink()
    (tmp_path / "photos" / "b.png").symlink_to("b.png")
    for unreadable in ("error", "skip"):  # the system does not deliver it, which is always an error
        with pytest.raises(DatasetError, match=r"levels of symbolic links\): repair or remove it$"):
            open_folder(tmp_path / "photos", unreadable=unreadable)


@pytest.mark.parametrize("stream", [False, True])
def test_unreadable_files_are_skipped_and_counted(
    damaged: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    caplog.set_level("INFO")
    open_folder(damaged, unreadable="skip", stream=stream)
    with monkeypatch.context() as patch:
        if not stream:
            patch.setattr(decoding, "decode", None)
        caplog.clear()
        train, test = open_folder(damaged, unreadable="skip", stream=stream)  # from the cache
        assert train.names == ["a/6.png", "a/7.png", "b/7.png"] and train.labels.tolist() == [0, 0, 1]
        assert pixels_of(train)[:, 0, 0, 0].tolist() == [100, 100, 200] and train.shape == (3, 3, 4, 4)
        assert test.labels.tolist() == [0, 0, 0, 1, 1, 1, 1] and len(pixels_of(test)) == 7
        assert f"skipping 13 of the 16 images of {damaged}/train" in caplog.text
        assert "skipping 1 of the 8 images" in caplog.text
        other = open_folder(damaged, unreadable="skip", stream=not stream)[0] if stream else train
        assert other.digest() == train.digest()
        with pytest.raises(DatasetError, match="cannot read 14 images"):
            open_folder(damaged, stream=stream)
    save(damaged / "train" / "b" / "0.png", np.full((8, 8, 3), 200, np.uint8))
    assert open_folder(damaged, unreadable="skip", stream=stream)[0].names[2] == "b/0.png"
    for path in damaged.glob("train/*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(DatasetError, match="cannot read 16 images"):
        open_folder(damaged, unreadable="skip", stream=stream)


def test_files_that_the_system_does_not_deliver_are_not_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / "photos" / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "photos" / "c.png").write_bytes(b"")
    opener = Image.open

    def refuse(path: Path) -> Any:
        if path.name == "b.png":
            raise PermissionError(13, "Permission denied")
        return opener(path)

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DatasetError, match=r"cannot read the image .*b\.png \(\[Errno 13\] Permission denied\)"):
        open_folder(tmp_path / "photos", unreadable="skip")


@pytest.mark.parametrize("stream", [False, True])
def test_links_to_missing_files_are_unreadable_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """All of them are named at the first start, or skipped. When a file is there again, its image is read."""
    caplog.set_level("INFO")
    root = tmp_path / "photos"
    save(root / "a.png", np.full((8, 8, 3), 10, np.uint8))
    for name in "bc":
        (root / f"{name}.png").symlink_to(tmp_path / "away" / f"{name}.png")
    both = rf"cannot read 2 images: {root}/b\.png \(it is a link to a missing file\), {root}/c\.png \(it is a link"
    with pytest.raises(DatasetError, match=both):
        open_folder(root, stream=stream)
    assert open_folder(root, stream=stream, unreadable="skip")[0].names == ["a.png"]
    assert "skipping 2 of the 3 images" in caplog.text
    save(tmp_path / "away" / "b.png", np.full((8, 8, 3), 20, np.uint8))
    train, _ = open_folder(root, stream=stream, unreadable="skip")
    assert train.names == ["a.png", "b.png"] and pixels_of(train).unique().tolist() == [10, 20]


def test_skipping_must_leave_images_of_each_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for split, names in (("train", "abc"), ("test", "abc")):
        for name in names:
            save(tmp_path / "photos" / split / name / "1.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "photos" / "test" / "b" / "1.png").write_bytes(b"damaged")
    _, test = open_folder(tmp_path / "photos", unreadable="skip")
    assert test.labels.tolist() == [0, 2]
    assert "classes without test images that can be read, which are not judged: b" in caplog.text
    (tmp_path / "photos" / "train" / "c" / "1.png").write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"leaves no training images in .*photos of the classes c: restore some"):
        open_folder(tmp_path / "photos", unreadable="skip")


# Size.


def test_the_limit_of_pixels_can_be_raised(tmp_path: Path) -> None:
    save(tmp_path / "photos" / "a.png", np.full((30, 40, 3), 9, np.uint8))
    save(tmp_path / "photos" / "b.png", np.full((30, 20, 3), 9, np.uint8))
    with pytest.raises(DatasetError, match=r"a\.png \(it has more pixels than data\.max_megapixels=0\.001 allows\)"):
        open_folder(tmp_path / "photos", max_megapixels=0.001)
    assert len(open_folder(tmp_path / "photos", max_megapixels=0.001, unreadable="skip")[0]) == 1
    assert len(open_folder(tmp_path / "photos", max_megapixels=0.0012)[0]) == 2
    assert len(open_folder(tmp_path / "photos")[0]) == 2


def upright_square(image: Image.Image, size: int) -> np.ndarray:
    """Returns the central square of an opaque image by PIL alone, from complete copies."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    width, height = upright.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(upright.resize((size, size), Image.Resampling.BILINEAR, box=box))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK"])
def test_large_images_are_converted_in_bands_with_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int, mode: str
) -> None:
    rng = np.random.default_rng(orientation)
    copied: list[int] = []
    for name in ("convert", "transpose", "copy", "crop"):
        done = getattr(Image.Image, name)

        def counting(self: Image.Image, *rest: Any, done: Any = done, **more: Any) -> Image.Image:
            result: Image.Image = done(self, *rest, **more)
            copied.append(result.width * result.height)
            return result

        monkeypatch.setattr(Image.Image, name, counting)
    for shape in ((61, 90), (90, 61), (75, 75), (40, 64)):
        metadata = Image.Exif()
        metadata[0x0112] = orientation
        image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)
        image.save(tmp_path / "a.tif" if mode == "CMYK" else tmp_path / "a.png", exif=metadata)
        path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
        with Image.open(path) as opened:
            expected = upright_square(opened, 9)
        whole = decode(path, 9)
        monkeypatch.setattr(decoding, "BAND_PIXELS", 700)
        copied.clear()
        assert (decode(path, 9) == expected).all() and (whole == expected).all()
        if mode != "CMYK":  # PIL itself turns TIFF files
            assert max(copied, default=0) <= 700
        monkeypatch.setattr(decoding, "BAND_PIXELS", 2**24)


# The cache.


def test_a_file_replaced_with_equal_size_and_time_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "photos" / "a.bmp"
    for value in (50, 90, 130):
        before = path.stat() if path.exists() else None
        if value == 130:  # another file takes its name
            save(path.with_name("new.bmp"), np.full((8, 8, 3), value, np.uint8))
            path.with_name("new.bmp").rename(path)
        else:
            save(path, np.full((8, 8, 3), value, np.uint8))
        if before:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        assert open_folder(tmp_path / "photos")[0].pixels.unique().tolist() == [value]


def test_a_mark_without_its_facts_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    save(tmp_path / "photos" / "a.png", np.zeros((8, 8, 3), np.uint8))
    open_folder(tmp_path / "photos")
    (mark,) = (tmp_path / "cache").glob("*.json")
    mark.write_text(mark.read_text().replace('"unreadable": {}', '"unreadable": 3'))
    open_folder(tmp_path / "photos")
    assert "is damaged" in caplog.text
