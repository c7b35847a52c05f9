"""The figures and numbers in docs/ agree with the code."""

import re
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from config.reading import load_config
from config.schema import Diffusion
from docs import draw_model, draw_schedules, list_keys
from experiment.models import build_on_meta
from model.diffusion import SCHEDULES, GaussianDiffusion
from tests.conftest import ROOT


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


def written(svg: str) -> list[str]:
    """Returns the texts of a figure. Matplotlib writes each text as a comment next to its outlines."""
    return re.findall(r"<!-- (.+?) -->", svg, re.DOTALL)


def schedules_table(lines: list[str]) -> list[str]:
    """Returns the last table of schedules in `lines`: header, separator, and one line per schedule."""
    header = max(i for i, line in enumerate(lines) if line.startswith("| (t + 1/2) / T |"))
    return list(takewhile(lambda line: line.startswith("|"), lines[header:]))


def test_the_figures_are_those_of_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The committed figures and numbers are those that the scripts produce, and the scripts are deterministic."""
    for script in (draw_model, draw_schedules):
        contents = []
        for name in ("one.svg", "two.svg"):
            script.main(["--out", str(tmp_path / name)])
            contents.append((tmp_path / name).read_bytes())
        assert contents[0] == contents[1]
        # Only the texts are compared, because the outlines depend on the version of matplotlib.
        committed = (ROOT / "docs" / script.__name__.replace("docs.draw_", "")).with_suffix(".svg").read_text()
        assert written(committed) == written(contents[0].decode()) and len(written(committed)) > 10
    printed = capsys.readouterr().out.splitlines()
    table, brightness = schedules_table(printed), [line for line in printed if line.startswith("inverted cosine, ")]
    page = (ROOT / "docs" / "schedules.md").read_text()
    assert [line.split("`")[1] for line in table[2:]] == list(SCHEDULES)
    assert schedules_table(page.splitlines()) == table
    brightness_8, brightness_32, brightness_64 = brightness[-3:]  # the script has run twice
    exact = GaussianDiffusion(**Diffusion(schedule="inverted_cosine").model_dump())
    signal, noise = exact.sqrt_alphas_cumprod[-1].item(), exact.sqrt_one_minus_alphas_cumprod[-1].item()
    for line, size in ((brightness_8, 8), (brightness_32, 32), (brightness_64, 64)):
        uniform = torch.full((3, size, size), 0.5)
        assert f" by {signal * uniform.norm().item() / noise:.1f} standard deviations" in line
    said = " ".join(page.split())
    numbers = [line.split()[-3] for line in (brightness_32, brightness_8, brightness_64)]
    assert "by {} standard deviations, at 8 px by {}, at 64 px by {}.".format(*numbers) in said
    assert f"the last timestep is {signal:.3f}" in said and f"standard deviation {noise:.3f}" in said


def test_links_between_the_pages_lead_somewhere() -> None:
    """Files exist, and sections have the heading that a link names, as GitHub forms its anchors."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    assert len(links) > 30
    for page, link in links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page.name}: {link}"


def test_the_list_of_keys_is_that_of_the_schemas() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == list_keys.page(), "run python -m docs.list_keys"
    for line in (
        "| `training.min_snr_gamma` | number or null | > 0 | `null` | weight the denoising loss by min-SNR",
        "| `data.num_workers` * | integer or null | >= 1, <= 1024 | `null` | number of threads",
        "| `method` | `probe`, `finetune`, `laplacenet` |  | `finetune` | training of the classifier",
    ):
        assert line in page
