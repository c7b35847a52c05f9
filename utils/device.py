"""Choice of the device and of its arithmetic, errors of failed allocations, and peak memory."""

import ctypes
import importlib.util
import logging
import math
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.errors import UserError
from utils.distributed.processes import local_rank, local_world_size, world_size

FUSED = ("cpu", "cuda")  # types of device whose fused optimisers can skip a step if a flag on the device is set

logger = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """Returns the device of this process, and configures torch for it.

    `auto` is the best available device: cuda, else mps, else cpu. If `name` is not available, falls back to the best
    available device and logs it. The processes of a machine are spread evenly over its GPUs. Several processes do not
    use mps, because gloo cannot send its tensors. On a CPU, glibc is set to keep freed memory.
    """
    mps = torch.backends.mps.is_available() and world_size() == 1
    available = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    best = next(kind for kind, there in available.items() if there)
    if name != "auto" and not available[name]:
        logger.info("device=%s is not available here: using %s", name, best)
    kind = name if available.get(name) else best
    if kind == "cpu":
        _keep_freed_memory()
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    if local_world_size() > count:
        logger.info("%d processes share %d GPU(s), which is slower than one GPU per process", local_world_size(), count)
    device = torch.device("cuda", local_rank() % count)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # input sizes are constant, so one search for the fastest kernels is enough
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 for float32 products, except k-NN's distances
    return device


def copy_to(values: Tensor, device: torch.device) -> Tensor:
    """Copies `values` from the host to `device` without synchronising with the device."""
    if device.type == "cuda":
        values = values.pin_memory()  # a large copy from other memory would wait for the device
    return values.to(device, non_blocking=True)


def compute_exactly() -> None:
    """Makes cuDNN deterministic and turns TensorFloat-32 off, from this call on.

    Call it before computing features or pictures that are stored or compared.
    """
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def choose_compile(setting: bool | None, device: torch.device) -> bool:
    """Returns True if the model is to be compiled: as `setting` says, or only on CUDA if it is None.

    Returns False and logs the reason if the machine lacks something that torch.compile needs.
    """
    if not (device.type == "cuda" if setting is None else setting):
        return False
    compiler = (os.environ.get("CXX", "").split() or ["clang++" if sys.platform == "darwin" else "g++"])[0]
    there: dict[str, Any] = {
        f"the compiler {compiler}": shutil.which(compiler),
        "Python.h (in Python's development package)": Path(sysconfig.get_path("include"), "Python.h").exists(),
    }
    if device.type == "cuda":
        there["triton"] = importlib.util.find_spec("triton")
        there["a GPU of compute capability 7.0 or higher"] = torch.cuda.get_device_capability(device) >= (7, 0)
    missing = [what for what, found in there.items() if not found]
    if missing:
        logger.info(
            "training without torch.compile, because this machine lacks %s",
            " and ".join(missing),
        )
    return not missing


def _keep_freed_memory() -> None:
    """Sets glibc to keep freed memory, in pieces of up to 32 MB, instead of returning it to the system.

    Page faults of returned memory would double the time that the views of a batch take.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
    with suppress(OSError, AttributeError):  # the C library is not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(arena_max, 1)  # glibc's other arenas return memory whatever the thresholds are


def _cpu_computes_bf16() -> bool:
    """Returns True if the CPU has AMX or AVX512-BF16. Other CPUs emulate bf16, which is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def choose_amp_dtype(use_amp: bool, device: torch.device) -> torch.dtype | None:
    """Returns the number format of mixed precision, or None for float32.

    Without `use_amp`, it is None. With `use_amp`, it is bf16 if the hardware computes it, else fp16 on CUDA, else None;
    any choice other than bf16 is logged.
    """
    if not use_amp:
        return None
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        logger.info("this GPU does not compute bf16: mixed precision is fp16, with scaled gradients")
        return torch.float16
    if device.type == "cpu" and _cpu_computes_bf16():
        return torch.bfloat16
    logger.info("mixed precision was requested, but this %s does not compute bf16: using float32", device.type)
    return None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Returns torch's autocast to `dtype` on `device`; None turns autocast off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class OutOfMemoryError(UserError):
    """A failed allocation. The message says how much memory was requested and which key to change."""


@contextmanager
def memory_for(advice: Callable[[], str]) -> Iterator[None]:
    """Turns errors of failed allocations inside the context into OutOfMemoryError.

    Args:
        advice: returns the last part of the message, which says how to use less memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # Texts of CUDA's, the CPU's and numpy's allocators. The CPU and CUDA's libraries raise plain RuntimeErrors.
        asked = re.search(r"(?:tried to|Tried to|Unable to) allocate (\d[\d.]*) (\w+)", str(error))
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not (asked or known or re.search(r"out of memory|ALLOC_FAILED", str(error))):
            raise
        amount = "an unknown amount" if not asked else f"{asked[1]} {asked[2]}"
        if asked and asked[2] == "bytes":
            amount = f"{int(asked[1]) / 2**30:.2f} GiB"
        raise OutOfMemoryError(f"out of memory: {amount} was requested; {advice()}") from None


def peak_memory_mb(device: torch.device) -> float:
    """Returns the peak memory in MB: of the device on CUDA, else of the process (on Windows: NaN)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return math.nan
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
