"""Tests that two processes compute the same results as one process. tests/processes.py holds their programs."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import HashStore

from tests import processes
from tests.conftest import launch_two
from utils.distributed import collectives
from utils.distributed.data_parallel import GlobalBatchNorm2d, convert_batch_norm
from utils.distributed.processes import RendezvousError, my_range
from utils.distributed.rendezvous import Patience, _call_roll


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of one process."""
    return processes.numbers(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of two processes, by rank."""
    folder = tmp_path_factory.mktemp("two")
    launch_two("-m", "tests.processes", "numbers", str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference, divided by the norm of the expected tensor."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Checks that the losses, and the gradients and buffers of the first step, agree to 1e-5.

    The error of a gradient or buffer is relative to its own norm.
    """
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for kind in ("gradients", "buffers"):
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            assert value.abs().max() > 0, f"{name} is zero, so comparing it proves nothing"
            assert relative_error(found[kind][name], value) < 1e-5, name


def without_constant_biases(found: dict[str, Any]) -> dict[str, Any]:
    """Leaves out the gradients of constants that a time-dependent encoder adds before BatchNorm: they are zero."""
    kept = {name: each for name, each in found["gradients"].items() if not re.search(r"time\.biases.*bias$", name)}
    assert len(kept) < len(found["gradients"])
    return found | {"gradients": kept}


def test_the_number_of_processes_does_not_change_training(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert_same_training(rank["training"], one["training"])
        assert_same_training(rank["adaptive"], one["adaptive"])
        assert_same_training(*map(without_constant_biases, (rank["time-dependent"], one["time-dependent"])))
        assert rank["training"]["keys"] == one["training"]["keys"], "DDP must not change the keys of the state dict"


def test_the_number_of_processes_does_not_change_training_with_a_frozen_encoder(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    expected = one["frozen encoder"]
    assert all(name.startswith("decoder.") for name in expected["gradients"])
    for found in (rank["frozen encoder"] for rank in two):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["gradients"].keys() == expected["gradients"].keys() and found["EMA is the same everywhere"]
        for name, value in expected["gradients"].items():
            assert relative_error(found["gradients"][name], value) < 1e-5, name


def test_batch_norm_of_one_process_would_change_it(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """Training in two processes differs from training in one if each process normalises over its own samples only."""
    for rank in two:
        found, expected = rank["unsynchronised"], one["training"]
        assert found["losses"] != pytest.approx(expected["losses"], rel=1e-5)
        for kind in ("gradients", "buffers"):
            with pytest.raises(AssertionError):
                assert_same_training({**expected, kind: found[kind]}, expected)


def test_with_fixed_statistics_neither_processes_nor_micro_batches_matter(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    expected = one["micro-batches"][0]
    assert abs(expected["losses"][-1] / expected["losses"][0] - 1) > 0.01, "the loss has not changed"
    for found in (*one["micro-batches"][1:], *two[0]["micro-batches"], *two[1]["micro-batches"]):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6) and len(found["losses"]) == 6
        # Gradients are compared directly, because AdamW's updates hardly depend on their scale.
        for name, gradient in expected["gradients"].items():
            assert relative_error(found["gradients"][name], gradient) < 1e-5, name


def test_gradients_are_reduced_once_a_step(two: list[dict[str, Any]]) -> None:
    """Gradients are reduced in each step's last backward pass, and in the run's first, because DDP requires that."""
    for rank in two:
        assert [found["unreduced"] for found in rank["micro-batches"]] == [0, 6 * 1 - 1, 6 * 3 - 1]
        assert rank["training"]["DDP"] == (True, True, False), (
            "DDP must have a static graph and bucket views, and not broadcast buffers"
        )


def test_the_ema_is_the_same_on_all_ranks(two: list[dict[str, Any]]) -> None:
    for rank in two:
        for found in (rank["training"], *rank["micro-batches"]):
            assert found["EMA is the same everywhere"]
        assert not rank["unsynchronised"]["EMA is the same everywhere"], (
            "without GlobalBatchNorm2d the EMAs must differ"
        )


def assert_like_torch(found: list[dict[str, Tensor]], device: str) -> None:
    """Checks that BatchNorm of two processes agrees with torch's BatchNorm on the whole batch, in float64.

    The tolerance is 1e-5. For bf16 inputs and outputs it is 1e-2, because bf16 rounds more coarsely.
    """
    exact = processes.batch_norms(nn.BatchNorm2d, device, exact=True)
    for (dtype, _), values, expected in zip(processes.LAYOUTS, found, exact, strict=True):
        assert values.keys() == expected.keys()
        for name, value in expected.items():
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(values[name], value, rtol=tolerance, atol=tolerance * value.abs().max().item())


def test_batch_norm_of_two_processes_against_torch_on_the_whole_batch(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert_like_torch(rank["batch norms"], "cpu")


def test_batch_norm_is_converted_in_place() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)), nn.BatchNorm1d(4))
    before = module.state_dict()
    convert_batch_norm(module)
    assert type(module[1][0]) is GlobalBatchNorm2d and type(module[2]) is nn.BatchNorm1d  # type: ignore[index]
    after = module.state_dict()
    assert after.keys() == before.keys() and all(after[name] is not None for name in before)
    x = torch.randn(5, 4, 2, 2)
    assert torch.equal(module[1].train()(x), nn.BatchNorm2d(4)(x)), "one process must give torch's result"


def test_judging_gives_the_same_numbers(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for rank in two:
        for found, expected in zip(rank["judging"], one["judging"], strict=True):
            (table, grid, effective), (expected_table, expected_grid, expected_effective) = found, expected
            assert table == expected_table and effective == expected_effective
            assert (grid.int() - expected_grid.int()).abs().max() <= 1, "the grids differ by more than one grey level"
    assert one["judging"][0][1].unique().numel() > 100


def test_measuring_gives_the_same_numbers(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["measuring"] == one["measuring"]


def test_novel_views_get_the_same_scores(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """Model and baselines have the same scores, except for the rounding of the sum of the training images."""
    expected = one["novel views"]
    assert [*expected["SSIM"]] == ["model", "source", "mean object", "nearest object"]
    for rank in two:
        for row, cells in expected.items():
            for name, cell in cells.items():
                assert rank["novel views"][row][name]["value"] == pytest.approx(cell["value"], rel=1e-5), (row, name)


def test_processes_take_turns_and_learn_of_each_others_failures(two: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(two):
        printed = "" if rank else "error: the last process failed\n"
        assert found["turns"] == {"mine": rank, "log": "0 1 ", "status": 2, "printed": printed}


@pytest.mark.parametrize(("rank", "local_rank", "turn"), [(0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 2)])
def test_one_process_of_each_machine_goes_before_the_others(
    monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, turn: int
) -> None:
    """On two machines with two processes each, rank 0 works first, then the first process of the other machine.

    All other processes follow. If the machines share storage, the second machine finds the files of the first.
    """
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    meetings: list[bool] = []

    def all_gather_object(busy: bool) -> list[bool]:
        """Answers for this process and one other, which is busy in odd calls and idle in even calls."""
        meetings.append(busy)
        return [busy, len(meetings) % 2 == 1]

    def work() -> int:
        began_at = len(meetings)
        while len(meetings) < began_at + 3:  # collectives continue during the work
            time.sleep(0.001)
        return began_at

    monkeypatch.setattr(collectives, "all_gather_object", all_gather_object)
    monkeypatch.setattr(collectives, "SIGN_OF_LIFE_S", 0.001)
    assert collectives.first_on_each_node(work) == 2 * turn
    assert sum(meetings) >= 3 and not meetings[-1]


@pytest.mark.parametrize("slow", [None, 0, 2])
def test_processes_of_one_start_do_not_take_anothers_keys_for_theirs(slow: int | None) -> None:
    """Three starts, one after another, share a store that keeps all keys.

    The processes of each start agree on a new digest, even if one process is late.
    """
    store, timeout = HashStore(), timedelta(seconds=20)
    rolls: list[str] = []

    def start(rank: int) -> str:
        time.sleep(0.2 if rank == slow else 0)
        return _call_roll(store, rank, 3, Patience(timeout))

    for _ in range(3):
        with ThreadPoolExecutor(3) as processes:
            found = set(processes.map(start, range(3)))
        assert len(found) == 1
        rolls += found
    assert len(set(rolls)) == 3
    with ThreadPoolExecutor(2) as processes:  # a start with one process fewer
        assert len(set(processes.map(lambda rank: _call_roll(store, rank, 2, Patience(timeout)), range(2)))) == 1
    with pytest.raises(RendezvousError, match="no process with rank 1, 2 has started within"):
        _call_roll(store, 0, 3, Patience(timedelta(seconds=0.1)))  # the other tokens are those of an earlier start


@pytest.mark.parametrize(("total", "multiple"), [(16, 4), (6, 4), (1, 4), (0, 1), (7, 1), (64, 8)])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_cover_everything_once(
    monkeypatch: pytest.MonkeyPatch, total: int, multiple: int, processes: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    shares = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(my_range(total, multiple))
    assert [index for part in shares for index in part] == list(range(total))
    assert all(part.start % multiple == 0 for part in shares if part)
    assert max(map(len, shares)) - min(map(len, shares)) <= multiple
