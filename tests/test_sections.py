"""Layer modulation of the paper: the section of the latent for each layer, and the effect of dropped sections."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from config.reading import load_config
from experiment.models import build_on_meta, describe_model
from model.blocks import Downsample
from model.decoder import Stage, UNetDecoder
from model.soda import SODA
from tests.conftest import ROOT, batch_of, experiment_of
from training.state import initial_state
from training.step import train_step, training_pixels
from utils.logging import PhaseTimer
from utils.randomness import generator

SHAPES = [([1], 1), ([1], 3), ([1, 2], 1), ([1, 1, 2], 2), ([1, 2, 1, 1], 1)]
# Blocks of the decoder of cifar10_paper.yaml that each section modulates: one row per section, worked out by hand.
PAIRS = [
    ["down.0", "up.13", "up.14"],
    ["down.1", "up.10", "up.12"],
    ["down.3", "up.9"],
    ["down.4", "up.6", "up.8"],
    ["down.6", "up.5"],
    ["down.7", "up.2", "up.4"],
    ["down.9", "up.1"],
    ["down.10", "up.0"],
    ["middle.0", "middle.1"],
]


def decoder_of(channel_mult: list[int], num_res_blocks: int, latent_dim: int = 23, **more: Any) -> UNetDecoder:
    """Returns a small decoder with sectioned modulation and random weights."""
    torch.manual_seed(0)
    decoder = UNetDecoder(
        image_size=8,
        latent_dim=latent_dim,
        model_channels=4,
        channel_mult=channel_mult,
        num_res_blocks=num_res_blocks,
        attn_resolutions=[],
        num_head_channels=None,
        dropout=0.0,
        **{"modulation": "sectioned", **more},
    )
    with torch.no_grad():
        for parameter in decoder.parameters():  # zero-initialised layers would hide an effect
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def seen_by(decoder: UNetDecoder, of: Callable[[str, Any, tuple[Any, ...], Tensor], None]) -> None:
    """Calls `of`(name, module, inputs, output) after each forward pass of conv_in, a stage or a downsampling."""
    for name, module in decoder.named_modules():
        if isinstance(module, Stage | Downsample) or name == "conv_in":
            module.register_forward_hook(lambda m, args, out, name=name: of(name, m, args, out))


def modulation(decoder: UNetDecoder, z: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns {name of the block: (input, output) of its linear layer for the latent}."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        stage.block.adagn.latent_proj.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
        for name, stage in decoder.named_modules()
        if isinstance(stage, Stage)
    ]
    with torch.no_grad():
        decoder(torch.randn(len(z), 3, 8, 8), torch.zeros(len(z)), z)
    for handle in handles:
        handle.remove()
    return seen


def test_the_pairs_of_the_cifar10_config() -> None:
    decoder = build_on_meta(load_config(ROOT / "config" / "cifar10_paper.yaml")).decoder
    pairs: list[list[str]] = [[] for _ in PAIRS]
    for layer in decoder.layers():
        pairs[layer.section].append(layer.name)
    assert pairs == PAIRS
    assert decoder.section_dims == [15, 15, 14, 14, 14, 14, 14, 14, 14]
    resolutions = {layer.name: (layer.resolution, layer.channels) for layer in decoder.layers()}
    assert resolutions["down.1"] == (32, 128) and resolutions["down.3"] == (16, 256) == resolutions["up.10"]
    assert resolutions["middle.0"] == (4, 256) == resolutions["up.2"] and resolutions["up.14"] == (32, 128)


@pytest.mark.parametrize(("channel_mult", "num_res_blocks"), SHAPES)
def test_the_section_follows_the_skip(channel_mult: list[int], num_res_blocks: int) -> None:
    """Each block uses the section that the rule of UNetDecoder gives for its skip connection.

    The test finds the skip connection of a block from the last channels of the block's input. They equal the output of
    the layer that produced the skip connection.
    """
    decoder = decoder_of(channel_mult, num_res_blocks)
    outputs: list[tuple[str, Tensor]] = []
    consumed: dict[str, str] = {}

    def look(name: str, module: Any, args: tuple[Any, ...], out: Tensor) -> None:
        if name.startswith("up."):
            equal = [skip for skip, values in outputs if torch.equal(args[0][:, -values.shape[1] :], values)]
            (consumed[name],) = equal
        else:
            outputs.append((name, out))

    seen_by(decoder, look)
    decoder(torch.randn(1, 3, 8, 8), torch.zeros(1), torch.randn(1, 23))

    section = {layer.name: layer.section for layer in decoder.layers()}
    going_down = [name for name, _ in outputs if name.startswith("down.")]
    stages = [name for name in going_down if name in section]
    assert [section[name] for name in stages] == list(range(len(channel_mult) * num_res_blocks))
    assert section["middle.0"] == section["middle.1"] == len(stages) == len(decoder.section_dims) - 1
    assert len(consumed) == len(channel_mult) * (num_res_blocks + 1)
    for name, skip in consumed.items():
        if skip == "conv_in":
            block = stages[0]
        elif skip in section:
            block = skip
        else:  # a downsampling belongs to the block before it
            block = going_down[going_down.index(skip) - 1]
        assert section[name] == section[block], name


@pytest.mark.parametrize(("channel_mult", "num_res_blocks"), SHAPES)
def test_a_section_modulates_its_pair_of_layers_and_nothing_else(channel_mult: list[int], num_res_blocks: int) -> None:
    decoder = decoder_of(channel_mult, num_res_blocks)
    z = torch.randn(2, 23)
    before = modulation(decoder, z)
    start = 0
    for section, width in enumerate(decoder.section_dims):
        changed_z = z.clone()
        changed_z[:, start : start + width] += 1
        start += width
        after = modulation(decoder, changed_z)
        changed = {name for name, (_, out) in after.items() if not torch.equal(out, before[name][1])}
        assert changed == {layer.name for layer in decoder.layers() if layer.section == section}
    assert start == 23


def test_sections_are_as_even_as_they_can_be() -> None:
    for latent_dim in (5, 6, 23, 128):
        widths = decoder_of([1, 2], 2, latent_dim).section_dims
        assert len(widths) == 5 and sum(widths) == latent_dim and max(widths) - min(widths) <= 1
    with pytest.raises(ValueError, match="latent_dim is 4: set it to at least 5, the number of sections"):
        decoder_of([1, 2], 2, 4)
    assert decoder_of([1, 2], 2, 4, modulation="shared").section_dims == [4]


@pytest.mark.parametrize(("channel_mult", "num_res_blocks"), SHAPES)
@pytest.mark.parametrize("modulation", ["shared", "sectioned"])
def test_the_config_knows_the_number_of_sections(channel_mult: list[int], num_res_blocks: int, modulation: str) -> None:
    config = load_config(
        ROOT / "config" / "digits.yaml",
        [
            f"decoder.channel_mult={channel_mult}",
            f"decoder.num_res_blocks={num_res_blocks}",
            f"decoder.modulation={modulation}",
        ],
    )
    assert config.decoder.num_sections == len(build_on_meta(config).decoder.section_dims)


def test_what_a_dropped_section_modulates_sees_the_null_latent(sectioned_soda: SODA) -> None:
    soda, decoder = sectioned_soda, sectioned_soda.decoder
    drop_mask = torch.tensor([[False, False, False], [True, False, False], [False, True, True], [True, True, True]])
    z = torch.randn(4, 8)
    kept, dropped, null = (modulation(decoder, v) for v in (z, decoder.mask(z, drop_mask), torch.zeros(4, 8)))
    for layer in decoder.layers():
        given, gives = dropped[layer.name]
        for sample, drop in enumerate(drop_mask[:, layer.section]):
            expected = null if drop else kept
            assert torch.equal(given[sample], expected[layer.name][0][sample])
            assert torch.equal(gives[sample], expected[layer.name][1][sample])
            assert not drop or given[sample].eq(0).all()
    # SODA applies the mask to z before the decoder. With a row of True, eps does not depend on the source view.
    x_source, x_t, timesteps = torch.randn(4, 1, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    eps = soda(x_source, x_t, timesteps, drop_mask).prediction
    masked = soda.encoder(x_source[:, 0]).clone()
    masked[1, :3], masked[2, 3:], masked[3] = 0, 0, 0
    torch.testing.assert_close(eps, decoder(x_t, timesteps, masked))
    other = soda(torch.randn(4, 1, 3, 8, 8), x_t, timesteps, drop_mask).prediction
    assert torch.equal(other[3], eps[3]) and not torch.isclose(other[:3], eps[:3]).all(dim=(1, 2, 3)).any()


MASKED = ["decoder.modulation=sectioned", "training.batch_size=1024", "training.mask.latent_probability=0.25"]


def test_latents_and_sections_are_dropped_at_their_rates_independently(tmp_path: Path) -> None:
    plain, masked = (
        experiment_of(tmp_path, *MASKED, f"training.mask.section_probability={rate}") for rate in (0.0, 0.3)
    )
    wholes, masks = [], []
    for step in range(4):
        before, after = batch_of(plain, step, range(1024)), batch_of(masked, step, range(1024))
        for name in ("x_source", "x_start", "timesteps", "noise"):
            assert torch.equal(getattr(before, name), getattr(after, name)), name
        whole = before.drop_mask.all(dim=1)
        assert torch.equal(before.drop_mask, whole[:, None].expand(-1, 3)), "a single section was dropped"
        assert after.drop_mask[whole].all(), "a dropped latent was restored"
        wholes.append(whole)
        masks.append(after.drop_mask[~whole].float())
    whole, sections = torch.cat(wholes), torch.cat(masks)

    def within(share: Tensor, expected: float, count: int) -> bool:
        return abs(share.item() - expected) < 4 * math.sqrt(expected * (1 - expected) / count)

    assert within(whole.float().mean(), 0.25, len(whole))
    assert 2900 < len(sections) < 3250
    for i in range(3):
        assert within(sections[:, i].mean(), 0.3, len(sections))
        assert within((sections[:, i] * sections[:, i - 1]).mean(), 0.09, len(sections)), "not independent"
    assert within(sections.prod(dim=1).mean(), 0.027, len(sections))


def test_a_part_of_the_batch_gets_its_own_sections_dropped(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, *MASKED, "training.mask.section_probability=0.3")
    whole, part = batch_of(experiment, 1, range(1024)), batch_of(experiment, 1, range(256, 512))
    assert torch.equal(part.drop_mask, whole.drop_mask[256:512])
    assert not torch.equal(whole.drop_mask, batch_of(experiment, 2, range(1024)).drop_mask)


def test_the_default_draws_what_it_always_drew(tmp_path: Path) -> None:
    """Only whole latents are dropped by default, with shared and with sectioned modulation.

    The mask depends only on the random stream "drop mask".
    """
    shared = batch_of(experiment_of(tmp_path, "training.batch_size=1024"), 5, range(1024)).drop_mask
    drawn = torch.rand(1024, generator=generator(0, "drop mask", 5)) < 0.1
    assert torch.equal(shared, drawn[:, None])
    sectioned = experiment_of(tmp_path, "training.batch_size=1024", "decoder.modulation=sectioned")
    assert torch.equal(batch_of(sectioned, 5, range(1024)).drop_mask, shared.expand(-1, 3))


@pytest.mark.parametrize("initialization", ["default", "torch", "paper"])
def test_all_of_the_paper_trains(tmp_path: Path, initialization: str) -> None:
    experiment = experiment_of(
        tmp_path,
        "decoder.modulation=sectioned",
        "training.mask.section_probability=0.1",
        "diffusion.schedule=inverted_cosine",
        f"initialization={initialization}",
    )
    state, pixels = initial_state(experiment), training_pixels(experiment, 0)
    zeros = {name for name, weight in state.soda.named_parameters() if name.endswith("weight") and not weight.any()}
    assert bool(zeros) == (initialization == "default")
    projections = [stage.block.adagn.latent_proj.weight for stage in state.soda.modules() if isinstance(stage, Stage)]
    moved: list[Tensor] = []
    for projection in projections:
        projection.register_hook(lambda gradient: moved.append(gradient.abs().max()))
    losses = [train_step(experiment, state, pixels, PhaseTimer())[0].item() for _ in range(20)]
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]
    # In the last step, each block's linear layer for the latent has a gradient, so every section has an effect.
    assert len(moved) == 20 * len(projections) == 160 and min(moved[-len(projections) :]) > 0


def test_the_dry_run_lists_what_modulates_which_layer() -> None:
    """The dry run prints one row per layer for the paper's config, and no rows if all layers share the latent."""
    lines = describe_model(load_config(ROOT / "config" / "cifar10_paper.yaml")).splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.startswith("layer")]
    rows = [line.split() for line in lines[head + 1 :]]
    assert rows[0] == ["down.0", "32", "128", "0", "0", "to", "14", "(15)"]
    assert rows[-2] == ["up.13", "32", "128", "0", "0", "to", "14", "(15)"]
    assert ["up.10", "16", "256", "1", "15", "to", "29", "(15)"] in rows
    assert [row[0] for row in rows if row[3] == "8"] == ["middle.0", "middle.1"] and len(rows) == 22
    assert "down.0" not in describe_model(load_config(ROOT / "config" / "cifar10.yaml"))
