"""Compiled models give the same results as eager models, up to rounding.

Code for the device is generated only in long tests: it takes half a minute for the decoder and minutes for a complete
model. The other tests compile to graphs of torch's own operations.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from model.decoder import UNetDecoder
from tests import processes
from tests.conftest import TWO_PROCESSES, launch
from utils.device import choose_compile
from utils.distributed.data_parallel import _moments

needs_compiler = pytest.mark.skipif(
    not choose_compile(True, torch.device("cpu")), reason="torch.compile needs a C++ compiler and Python.h"
)


@needs_compiler
@pytest.mark.parametrize(
    ("modulation", "backend"),
    [
        ("shared", "aot_eager"),
        pytest.param("sectioned", "aot_eager", marks=pytest.mark.long),
        pytest.param("shared", "inductor", marks=pytest.mark.long),
        pytest.param("sectioned", "inductor", marks=pytest.mark.long),
    ],
)
def test_a_compiled_decoder_learns_what_the_eager_one_does(modulation: str, backend: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"model_channels": 8, "channel_mult": [1], "num_res_blocks": 1, "attn_resolutions": []}
    sizes |= {"modulation": modulation, "latent_dim": 9}
    eager = UNetDecoder(image_size=8, num_head_channels=None, dropout=0.0, **sizes)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    compiled = copy.deepcopy(eager)
    compiled.compile(backend=backend)
    counters.clear()
    inputs = torch.randn(8, 3, 8, 8), torch.randint(0, 1000, (8,)), torch.randn(8, 9)
    target = torch.randn(8, 3, 8, 8)
    losses: list[list[float]] = []
    for decoder in (eager, compiled):
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, fused=True)
        losses.append([])
        for _ in range(20):
            loss = (decoder(*inputs) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=3e-4) and losses[0][-1] < 0.95 * losses[0][0]
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert list(compiled.state_dict()) == list(eager.state_dict()), "compilation changed the keys"


@needs_compiler
def test_batch_statistics_are_compiled_for_any_batch_size() -> None:
    compiled = torch.compile(lambda x: 2 * _moments(x), fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (4, 8, 12):
        x = torch.randn(count, 3, 5, 5)
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(compiled(x), 2 * torch.stack([mean, variance]))


@needs_compiler
@pytest.mark.long
def test_a_compiled_model_whose_sections_are_masked_trains_as_the_eager_one_does(tmp_path: Path) -> None:
    masked = ["decoder.modulation=sectioned", "training.mask.section_probability=0.3"]
    eager, compiled = (processes.training(tmp_path, 20, *masked, compiled=compiled) for compiled in (False, True))
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=3e-4) and compiled["graphs"] == (1, {})


@needs_compiler
@pytest.mark.long
def test_a_compiled_model_trains_as_the_eager_one_does(tmp_path: Path) -> None:
    """One process and two processes both give the losses of the eager model.

    The model is a single graph: collectives cause no graph breaks.
    """
    eager, compiled = (processes.training(tmp_path, 20, compiled=compiled) for compiled in (False, True))
    done = launch(*TWO_PROCESSES, "-m", "tests.processes", "compiled", str(tmp_path), timeout=900)
    assert done.returncode == 0, done.stderr
    for found in (compiled, *(torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))):
        assert found["losses"] == pytest.approx(eager["losses"], rel=3e-4)
        assert found["graphs"] == (1, {}) and eager["graphs"] == (0, {})
        assert found["keys"] == eager["keys"], "compilation changed the keys"
