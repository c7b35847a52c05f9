"""Tests of decoder.image_size: a run on digits of 8 px whose decoder works at 4 px."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import embed as embed_program
import sample as sample_program
import test as judge_program
import train as train_program
from ablations import section_measures
from analysis.grid import Cell, Grid, save_grid
from analysis.image_encoder import load_encoder
from analysis.pictures import PICTURES, Arithmetic, Interpolate, Reconstruct
from analysis.references import choose_images
from benchmarks import inversion
from config.reading import load_config
from docs import draw_model
from evaluation.codec import Codec
from evaluation.encoders import encode_with
from experiment.models import describe_model
from experiment.trained import open_trained, read_trained
from model.diffusion import GaussianDiffusion
from tests.conftest import ROOT, assert_equal_states, digits_args

SMALL = (
    *("decoder.image_size=4", "decoder.modulation=sectioned", "decoder.attn_resolutions=[]"),
    *("training.epochs=2", "evaluation.every=1"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of two epochs, the second after a resume."""
    folder = tmp_path_factory.mktemp("size") / "run"
    for epochs in (1, 2):
        assert train_program.main(digits_args(folder, *SMALL, f"training.epochs={epochs}")) == 0
    return folder


@pytest.fixture(scope="module")
def last(run: Path) -> Path:
    """Last checkpoint of the run."""
    return run / "checkpoints" / "last.pt"


@pytest.fixture(scope="module")
def opened(last: Path) -> Any:
    """The experiment and the EMA model of the checkpoint. `evaluation.features` names a decoder block."""
    return open_trained(read_trained(None, last, ["device=cpu", "evaluation.features=decoder.up.1@20"]))


def test_a_resumed_run_is_the_uninterrupted_one(run: Path, last: Path, tmp_path: Path) -> None:
    assert train_program.main(digits_args(tmp_path, *SMALL)) == 0
    resumed, uninterrupted = (torch.load(path) for path in (last, tmp_path / "checkpoints" / "last.pt"))
    for name in ("model", "ema", "optimizer"):
        assert_equal_states(resumed[name], uninterrupted[name])
    # Three rows of four images. The images are shown at 64 px: one pixel of the encoder is 8, one of the decoder 16.
    grid = np.asarray(Image.open(run / "samples" / "epoch_0002.png"))
    assert grid.shape == (3 * 66 + 2, 4 * 66 + 2, 3)
    for row, pixel in ((0, 8), (1, 16), (2, 16)):
        image = grid[2 + 66 * row :, 2:][:64, :64]
        assert (image == image[::pixel, ::pixel].repeat(pixel, axis=0).repeat(pixel, axis=1)).all()
        coarse = image[:: 2 * pixel, :: 2 * pixel].repeat(2 * pixel, axis=0).repeat(2 * pixel, axis=1)
        assert (image != coarse).any()


def test_another_size_than_the_checkpoints_is_refused(last: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [argument for argument in digits_args(last.parent, *SMALL) if "decoder.image_size" not in argument]
    with pytest.raises(SystemExit, match="2"):
        judge_program.main([*others, "--checkpoint", str(last)])
    assert "was trained with another config: add decoder.image_size=4 to the command" in capsys.readouterr().err


def test_features_of_the_decoder_are_those_of_averaged_images(opened: Any) -> None:
    """A block of the decoder is judged at its own size: averaging the images first does not change its features."""
    experiment, soda = opened
    encode = encode_with(experiment, soda)
    (pixels,) = experiment.test.batches([range(4)])
    coarse = F.avg_pool2d(pixels.float(), 2).round().byte().repeat_interleave(2, 2).repeat_interleave(2, 3)
    name = "decoder.up.1@20"
    found, expected = (encode(experiment.views.evaluation(some), range(4))[name] for some in (pixels, coarse))
    assert found.shape == (4, 16) and (found - expected).abs().max() < 0.05 * expected.std()


def sizes(cells: list[Cell]) -> list[int]:
    """Returns the width in pixels of each image of a row."""
    return [cell.image.shape[-1] for cell in cells if cell.image is not None]


def test_decoded_images_are_compared_with_averaged_sources(opened: Any) -> None:
    experiment, soda = opened
    codec = Codec(experiment, soda, seed=0)
    one, two = (choose_images({"test": experiment.test}, None, count, 0) for count in (1, 2))
    picture = Reconstruct(num_samples=1).draw(codec, two)
    assert "reduced from 8 to 4 px" in picture.explanation and sizes(picture.cells[0]) == [8, 4, 4, 4]
    for pixels, (_, sample, _, decoded) in zip(two.pixels, picture.cells, strict=True):
        reduced = np.asarray(Image.fromarray(pixels.permute(1, 2, 0).numpy()).reduce(2)).astype(float)
        for cell in (sample, decoded):
            assert cell.image is not None
            squares = (cell.image.permute(1, 2, 0).numpy() - reduced) ** 2
            assert float(re.findall(r"[\d.]+", cell.caption)[0]) == pytest.approx(
                10 * np.log10(255**2 / squares.mean()), abs=0.2
            )
    assert sizes(Interpolate(num_steps=2).draw(codec, two).cells[0]) == [8, 4, 4, 8]
    assert [sizes(row) for row in Arithmetic(num_samples=1).draw(codec, [0, 1, one]).cells] == [[8], [4] * 4, [4] * 4]


def test_images_of_two_sizes_are_shown_at_one_width(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    cells = [
        Cell(torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, size, size))
        for colour, size in zip(colours, (4, 8, 24), strict=True)
    ]
    save_grid(Grid("A title", "An explanation.", ["a", "b", "c"], [], [cells]), tmp_path / "a.png", "made so")
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    for colour in colours:
        y, x = np.nonzero((pixels == colour).all(axis=2))
        assert len(y) == 72 * 72 and np.ptp(y) == np.ptp(x) == 71


@pytest.mark.long
def test_every_program_accepts_the_checkpoint(
    last: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ["--checkpoint", str(last), "device=cpu"]
    for name in (name for name, kind in PICTURES.items() if not kind.needs_cameras):
        assert sample_program.main([name, *checkpoint, "--out", str(tmp_path / f"{name}.png")]) == 0
    assert embed_program.main([*checkpoint, "--export", str(tmp_path / "encoder.pt2")]) == 0
    monkeypatch.setattr("sys.argv", ["inversion", str(last), "--steps", "2", "--iterations", "1"])
    assert inversion.main() == 0
    assert "| 2 | 1 | " in capsys.readouterr().out


def test_a_run_on_stored_images_resizes_them_for_every_program(tmp_path: Path) -> None:
    """Images of 20 px, an encoder of 8 px and a decoder of 4 px. Features are those of images resized by Pillow."""
    arguments = digits_args(tmp_path, *SMALL, "training.epochs=1", "data.stored_size=20")
    assert train_program.main(arguments) == 0
    last, features = tmp_path / "checkpoints" / "last.pt", tmp_path / "features.npz"
    checkpoint = ["--checkpoint", str(last), "device=cpu"]
    assert sample_program.main(["reconstruct", *checkpoint, "--out", str(tmp_path / "picture.png")]) == 0
    assert embed_program.main([*checkpoint, "--split", "test", "--out", str(features)]) == 0
    experiment, soda = open_trained(read_trained(None, last, ["device=cpu"]))
    assert experiment.test is not None
    (pixels,) = experiment.test.batches([range(6)])
    assert pixels.shape == (6, 3, 20, 20)
    resized = [
        np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR))
        for image in pixels.permute(0, 2, 3, 1).numpy()
    ]
    encoder = load_encoder(last)
    expected = encoder(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2))["z"]
    found = torch.from_numpy(np.load(features)["z"][:6])
    torch.testing.assert_close(encoder(pixels)["z"], found)
    wide = torch.nn.functional.pad(pixels, (3, 3, 0, 0))  # of another size: the central square is the stored image
    torch.testing.assert_close(load_encoder(last, resize=True)(wide)["z"], found)
    with pytest.raises(ValueError, match=r"not .6, 3, 20, 26.: resize them"):
        encoder(wide)
    judged = encode_with(experiment, soda)(experiment.views.evaluation(pixels), range(6))["z"]
    assert (found - expected).abs().max() < 0.05 * expected.std()  # torchvision and Pillow round to levels differently
    torch.testing.assert_close(judged, found)


def test_sections_are_measured_at_the_decoders_size(opened: Any) -> None:
    experiment, soda = opened
    named = section_measures.sections_of(experiment.config)
    assert list(named) == ["0 (4 and 2 px)", "1 (2 px)", "2 (2 px, middle)", "whole latent"]
    losses = section_measures.losses_without(experiment, soda, named)
    swapped, _ = section_measures.swap_sections(experiment, soda, named)
    assert len(losses) == 5 and losses[0] > 0 and swapped[-1] == 1
    # The same weights, read as a prediction of x_start. The decoder's output is replaced by zeros.
    settings = {**experiment.config.diffusion.model_dump(), "prediction": "x_start"}
    other = replace(experiment, diffusion=GaussianDiffusion(**settings))
    (pixels,) = experiment.test.batches([range(len(experiment.test))])
    with mock.patch.object(soda.decoder, "forward", lambda x_t, timesteps, z: torch.zeros_like(x_t)):
        losses = section_measures.losses_without(other, soda, named)
    assert losses[0] == pytest.approx(experiment.views.x_start(pixels).square().mean().item(), rel=1e-4)


def test_a_decoder_of_half_the_size_does_a_quarter_of_the_work() -> None:
    """The numbers are those of a narrow model for images of 32 px."""
    narrow = ["encoder.width=32", "decoder.model_channels=32", "decoder.channel_mult=[1,2,2]"]
    narrow += ["decoder.num_res_blocks=1", "decoder.attn_resolutions=[]"]
    found = []
    for more in ([], ["decoder.image_size=16"], ["views.num_sources=2"]):
        text = describe_model(load_config(ROOT / "config" / "cifar10.yaml", narrow + more))
        found.append(re.findall(r"([\d.]+) GFLOP per image(?: of (\d+) px)?", text))
    assert found[0] == [("0.2787", "32"), ("0.4907", "32"), ("2.308", "")]
    assert found[1] == [("0.2787", "32"), ("0.1230", "16"), ("1.205", "")]
    assert found[2] == [("0.2787", "32"), ("0.4907", "32"), ("3.144", "")]


def test_the_model_is_drawn_with_both_sizes() -> None:
    config = load_config(ROOT / "config" / "cifar10.yaml", ["decoder.image_size=16"])
    (axes,) = draw_model.draw(config).axes
    words = {text.get_text() for text in axes.texts}
    assert {"source view (N, 3, 32, 32)", "target view (N, 3, 16, 16)", "$x_t$ (N, 3, 16, 16)", "16 px"} <= words
