"""The device and its arithmetic, chosen once."""

import ctypes
import importlib.util
import logging
import os
import re
import resource
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from config.errors import UserError
from utils.distributed.processes import local_rank, local_world_size, world_size

FUSED = ("cpu", "cuda")  # devices whose fused optimisers are known to take a step or not by a number on the device

logger = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """The device of this process: for `auto`, or one that is not there (with a line), cuda, else mps, else cpu.

    Processes of one machine take its GPUs in turn. Several do not use mps, whose tensors gloo does not carry. On a
    CPU, glibc is told to keep what is freed.
    """
    mps = torch.backends.mps.is_available() and world_size() == 1
    available = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    best = next(kind for kind, there in available.items() if there)
    if name != "auto" and not available[name]:
        logger.info("device is %s, which is not available here: taking %s", name, best)
    kind = name if available.get(name) else best
    if kind == "cpu":
        _keep_freed_memory()
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    if local_world_size() > count:
        logger.info(
            "%d processes share the GPUs, of which there are %d: slower than one each", local_world_size(), count
        )
    device = torch.device("cuda", local_rank() % count)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # sizes do not vary: the fastest kernels are found once
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 where float32 is left, but for k-NN's distances
    return device


def compute_exactly() -> None:
    """From now on, the same numbers for the same inputs, and float32 as it is: for what is kept and compared."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def choose_compile(setting: bool | None, device: torch.device) -> bool:
    """True if the model is to be compiled: as set, by default on CUDA; logs it if the machine cannot compile."""
    if not (device.type == "cuda" if setting is None else setting):
        return False
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++").split()[0]
    there: dict[str, Any] = {
        f"the compiler {compiler}": shutil.which(compiler),
        "Python.h, of Python's development package,": Path(sysconfig.get_path("include"), "Python.h").exists(),
    }
    if device.type == "cuda":
        there["triton"] = importlib.util.find_spec("triton")
        there["a GPU of compute capability 7"] = torch.cuda.get_device_capability(device) >= (7, 0)
    missing = [what for what, found in there.items() if not found]
    if missing:
        logger.info("%s is missing, without which nothing can be compiled: training eagerly", " and ".join(missing))
    return not missing


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed, up to 32 MB a piece: faulting it in anew doubles the time of a batch's views."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**25)


def _cpu_computes_bf16() -> bool:
    """True if the CPU has AMX or AVX512-BF16. Other CPUs emulate bf16, which is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def choose_amp_dtype(use_amp: bool, device: torch.device) -> torch.dtype | None:
    """bf16 where the hardware computes it, else fp16 on CUDA, else None: float32, with a line that says so."""
    if not use_amp:
        return None
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        logger.info("this GPU computes no bf16: mixed precision is fp16 with scaled gradients")
        return torch.float16
    if device.type == "cpu" and _cpu_computes_bf16():
        return torch.bfloat16
    logger.info("mixed precision was asked for, but this %s computes no bf16: taking float32", device.type)
    return None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class OutOfMemoryError(UserError):
    """The message says how much memory was asked for and which key to change."""


@contextmanager
def memory_for(advice: Callable[[], str]) -> Iterator[None]:
    """Inside, memory that is not there becomes an OutOfMemoryError; `advice` says what takes less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # Of CUDA's allocator; of its libraries and the CPU's, whose errors are plain RuntimeErrors; numpy's.
        asked = re.search(r"(?:tried to|Tried to|Unable to) allocate (\d[\d.]*) (\w+)", str(error))
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not (asked or known or re.search(r"out of memory|ALLOC_FAILED", str(error))):
            raise
        amount = "an amount that is not told" if not asked else f"{asked[1]} {asked[2]}"
        if asked and asked[2] == "bytes":
            amount = f"{int(asked[1]) / 2**30:.2f} GiB"
        raise OutOfMemoryError(f"out of memory: {amount} was asked for; {advice()}") from None


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory: of the device on CUDA, else of the process, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
