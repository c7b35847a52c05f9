"""Tests of ablations/section_measures.py on models with known answers, and of the script ablations/sections.py."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ablations import section_measures, sections
from ablations.sections import VARIANTS
from model.decoder import Stage
from tests.conftest import ROOT, TINY_RUN, experiment_of
from training.state import initial_state
from utils.randomness import generator

NAMES = ["0 (8 and 4 px)", "1 (4 px)", "2 (4 px, middle)", "whole latent"]


def prepared(tmp_path: Path, *overrides: str) -> tuple[Any, Any]:
    """Returns an experiment and a model whose decoder depends on all sections of its latent except section 1."""
    experiment = experiment_of(tmp_path, "decoder.modulation=sectioned", "evaluation.batch_size=99", *overrides)
    soda = initial_state(experiment).soda.eval()
    with torch.no_grad():
        for parameter in soda.decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        for stage in soda.decoder.modules():
            if isinstance(stage, Stage) and stage.section == 1:
                stage.block.adagn.latent_proj.weight.zero_()
        soda.encoder.fc.weight.mul_(5)
    return experiment, soda


def test_a_section_that_is_not_read_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(section_measures, "NUM_PAIRS", 64)
    monkeypatch.setattr(section_measures, "NUM_SAMPLING_STEPS", 5)
    experiment, soda = prepared(tmp_path)
    named = section_measures.sections_of(experiment.config)
    assert list(named) == NAMES and [named[name] for name in NAMES[:3]] == [slice(0, 3), slice(3, 6), slice(6, 8)]
    loss, *without = section_measures.losses_without(experiment, soda, named)
    assert without[1] == loss
    assert abs(without[0] - loss) > 1e-5 and abs(without[2] - loss) > 1e-5 and abs(without[3] - loss) > 1e-4
    swapped, coarse = section_measures.swap_sections(experiment, soda, named)
    assert swapped[1] == 0 and swapped[3] == 1 and 0.01 < swapped[0] < 1.5 and 0.001 < swapped[2] < 1.5
    assert all(0 < share < 1 for share in (coarse[0], coarse[2], coarse[3]))
    # A shared latent is split at the same positions.
    assert section_measures.sections_of(experiment_of(tmp_path).config) == named


def test_the_change_by_swapped_sections_in_closed_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder draws section 0 as brightness, which averaging keeps, and section 2 as a fine checkerboard."""
    monkeypatch.setattr(section_measures, "NUM_PAIRS", 8)
    experiment, soda = prepared(tmp_path)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)  # (8, 8)

    def draw(z: torch.Tensor, x_T: torch.Tensor, num_steps: int) -> torch.Tensor:
        bright, detail = z[:, :1].sum(dim=1), z[:, 6:7].sum(dim=1)
        return (bright[:, None, None] + detail[:, None, None] * board)[:, None].expand(-1, 3, -1, -1)

    monkeypatch.setattr(section_measures, "guided_denoiser", lambda decoder, z: z)
    drawing = replace(experiment, diffusion=SimpleNamespace(ddim_sample=draw))
    swapped, coarse = section_measures.swap_sections(drawing, soda, section_measures.sections_of(experiment.config))
    order = torch.randperm(360, generator=generator(section_measures.SEED, "pairs"))[:16]
    with torch.no_grad():
        z, other = soda.encoder(experiment.views.evaluation(experiment.test.pixels[order])).chunk(2)
    squares = (z - other).square().sum(dim=0)
    bright, detail = squares[0].item(), squares[6].item()
    whole = bright + detail
    assert swapped == pytest.approx([(bright / whole) ** 0.5, 0, (detail / whole) ** 0.5, 1], rel=1e-3)
    assert coarse == pytest.approx([1, 0, 0, bright / whole], abs=1e-3)


def test_a_section_is_probed_alone(tmp_path: Path) -> None:
    """If section 2 has all information about the image and the others are noise, only section 2 is classified well."""
    probe = {"transform": "clean", "epochs": 8, "lr": 5e-3, "batch_size": 16}
    experiment, soda = prepared(tmp_path, *(f"evaluation.probe.{name}={value}" for name, value in probe.items()))
    encode = soda.encoder.features
    brightness = torch.Generator().manual_seed(0)

    def features(views: torch.Tensor) -> dict[str, torch.Tensor]:
        z = torch.randn(len(views), 8, generator=brightness)
        z[:, 6] = views[:, 0, 2:6, 0:3].mean(dim=(1, 2))
        z[:, 7] = views[:, 0, :, 5:].mean(dim=(1, 2))
        return {**encode(views), "z": z}

    soda.encoder.features = features
    (_, whole), probes = section_measures.probe_sections(
        experiment, soda, section_measures.sections_of(experiment.config)
    )
    assert max(probes[:2]) < 20 < 25 < min(probes[2], probes[3], whole)


def test_how_much_of_a_section_is_its_own(tmp_path: Path) -> None:
    experiment, soda = prepared(tmp_path)
    source = torch.Generator().manual_seed(0)

    def encode(views: torch.Tensor) -> torch.Tensor:
        """Returns z. Section 0 is noise. Section 2 is linear in section 1. Then noise is added to section 1."""
        z = torch.randn(len(views), 8, generator=source)
        z[:, 6:] = 2 * z[:, 3:5] - z[:, 4:6]
        z[:, 3:6] += torch.randn(len(views), 3, generator=source)
        return z

    soda.encoder.forward = encode
    named = section_measures.sections_of(experiment.config)
    noise, cause, effect, whole = section_measures.own_variance(experiment, soda, named)
    # Half of the variance of section 1 (cause) is added noise, so that section 1 explains half of section 2 (effect).
    # The total variance of section 1 is 6, of which section 2 explains 2. The linear function is fitted to 180 images
    # and evaluated on the other 180.
    assert [noise, cause, effect, whole] == pytest.approx([1, 4 / 6, 1 / 2, 1], abs=0.12)


@pytest.mark.long
def test_the_script_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(section_measures, "NUM_PAIRS", 8)
    monkeypatch.setattr(section_measures, "NUM_SAMPLING_STEPS", 2)
    arguments = ["--config", str(ROOT / "config" / "digits.yaml"), "--seeds", "1", "--epochs", "1"]
    arguments += ["--out", str(tmp_path), *TINY_RUN, "training.batch_size=128", "output_dir=none"]
    sections.main(arguments)
    table = capsys.readouterr().out.splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in table}
    assert rows["11 steps"] == list(VARIANTS) and len(rows["k-NN"]) == 3
    assert rows["swapped whole latent"] == ["1.00"] * 3
    assert {f"{measure} {name}" for measure in sections.ROWS_BY_SECTION for name in NAMES} < rows.keys()
    results = tmp_path / "results.jsonl"
    lines = [line for line in results.read_text().splitlines() if line]
    results.write_text("\n".join([*lines[:2], lines[2][:50]]))  # a crash has cut the last line
    sections.main(arguments)
    assert capsys.readouterr().out.splitlines() == table, "the cut run must be measured again from its checkpoint"
    again = [json.loads(line) for line in results.read_text().splitlines() if line.endswith("}")]
    assert len(again) == 3 and again[2]["seconds"] == json.loads(lines[2])["seconds"]
