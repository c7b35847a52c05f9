"""Timing of alternatives that take turns in one run, so that other work on the machine slows all of them alike."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def machine(device: torch.device) -> str:
    """Returns the name of the hardware, the number of threads (on a CPU) and the version of torch, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, torch {torch.__version__}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def take_turns(
    work: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, list[float]]:
    """Returns the seconds that each function took in each round.

    Each round calls all functions, one after the other. Synchronises with the device before and after each call.

    Args:
        work: functions by name.
        rounds: number of timed rounds.
        warmup: number of rounds before them, which are not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(-warmup, rounds):
        for name, function in work.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Synchronises with the device on CUDA. On other devices, does nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(seconds: list[float]) -> str:
    """Returns median, minimum and maximum as text, in milliseconds."""
    milliseconds = [1000 * s for s in seconds]
    return f"{statistics.median(milliseconds):8.2f} ms ({min(milliseconds):.2f} to {max(milliseconds):.2f})"


def ratio(slower: list[float], faster: list[float]) -> str:
    """Returns the speed-up as text: the ratio of the medians, and the range of the ratios of single rounds."""
    each = [s / f for s, f in zip(slower, faster, strict=True)]
    return f"{statistics.median(slower) / statistics.median(faster):.2f} times ({min(each):.2f} to {max(each):.2f})"
