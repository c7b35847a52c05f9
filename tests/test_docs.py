"""The figures of docs/ are drawn from the code, and the pages say what it says."""

import re
from pathlib import Path

import pytest

from docs import draw_model, draw_schedules
from model import GaussianDiffusion
from tests.conftest import ROOT
from training.experiment import build_on_meta
from utils.config import Diffusion
from utils.config_file import load_config


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("cifar10_paper", []),
        ("cifar10", []),
        ("digits", ["decoder.modulation=sectioned", "decoder.num_res_blocks=3", "decoder.channel_mult=[1,1,2,2]"]),
    ],
)
def test_the_model_is_drawn_with_every_layer_and_its_section(config: str, overrides: list[str]) -> None:
    resolved = load_config(ROOT / "config" / f"{config}.yaml", overrides)
    decoder = build_on_meta(resolved).decoder
    (axes,) = draw_model.draw(resolved).axes
    words = [" ".join(text.get_text().replace("+ attention", "").split()) for text in axes.texts]
    blocks = [word for word in words if re.match(r"(down|middle|up)\.\d+ \$", word)]
    assert sorted(blocks) == sorted(f"{layer.name} $z_{{{layer.section}}}$" for layer in decoder.layers())
    for section, width in enumerate(decoder.section_dims):
        assert any(word.startswith(f"$z_{{{section}}}$ ({width})") for word in words)


def test_the_figures_are_those_of_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of schedules is what the script prints; the same picture is the same file."""
    for script in (draw_model, draw_schedules):
        contents = []
        for name in ("one.svg", "two.svg"):
            script.main(["--out", str(tmp_path / name)])
            contents.append((tmp_path / name).read_bytes())
        assert contents[0] == contents[1] and len(contents[0]) > 10_000
    *table, brightness_8, brightness_32, brightness_64 = capsys.readouterr().out.splitlines()[-9:]
    page = (ROOT / "docs" / "schedules.md").read_text()
    assert len(table) == 6 and "\n".join(table) in page
    deviations = [line.split()[-2] for line in (brightness_8, brightness_32, brightness_64)]
    assert deviations == ["0.8", "3.3", "6.6"]
    for text in (
        "by 3.3 of its deviations, at 8 px by 0.8, at 64 px by 6.6",
        "at the last timestep is 0.119",
        "deviation 0.993",
    ):
        assert text in " ".join(page.split())
    exact = GaussianDiffusion(**Diffusion(schedule="inverted_cosine").model_dump())
    assert f"{exact.sqrt_alphas_cumprod[-1]:.3f} {exact.sqrt_one_minus_alphas_cumprod[-1]:.3f}" == "0.119 0.993"
