"""Tests of the threads that share torch's work, and of the choice of their number."""

import threading
from functools import partial

import pytest
import torch

from config.reading import load_config
from experiment import threads as thread_choice
from experiment.opening import open_device
from tests.conftest import ROOT
from utils.threads import map_in_threads


def test_items_are_shared_by_threads_that_use_one_thread_each() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        all_at_work = threading.Barrier(3)

        def work(item: int) -> tuple[int, int, str]:
            all_at_work.wait(timeout=20)
            return item, torch.get_num_threads(), threading.current_thread().name

        found = map_in_threads(work, range(6))
        assert [item for item, *_ in found] == list(range(6)) and len({name for *_, name in found}) == 3
        assert all(count == 1 for _, count, _ in found) and torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError):
            map_in_threads(lambda item: 1 // item, range(6))
        torch.set_num_threads(1)
        assert map_in_threads(lambda _: threading.current_thread(), range(2)) == [threading.current_thread()] * 2
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_depends_on_the_work_of_a_pass(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    chosen: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(thread_choice, "_threads_at_start", lambda: 8)
    for name, overrides in (("digits", []), ("cifar10", []), ("cifar10", ["training.micro_batch_size=4"])):
        config = load_config(ROOT / "config" / f"{name}.yaml", overrides)
        thread_choice.choose_num_threads(partial(thread_choice.training_work, config))
    assert chosen == [1, 8, 8] and "computing with one thread: a forward pass of 1.6 GFLOP" in caplog.text
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    digits = load_config(ROOT / "config" / "digits.yaml", ["device=cpu"])
    work = partial(thread_choice.training_work, digits)
    thread_choice.choose_num_threads(work)
    assert len(chosen) == 3, "the user's number must be kept"
    monkeypatch.delenv("OMP_NUM_THREADS")
    open_device(digits, work)
    assert chosen == [1, 8, 8, 1]
    monkeypatch.setattr("experiment.opening.choose_device", lambda asked: torch.device("cuda"))
    monkeypatch.setattr("experiment.opening.choose_amp_dtype", lambda use_amp, device: None)
    open_device(digits, work)
    assert len(chosen) == 4, "on a GPU, the number of threads must not change"
