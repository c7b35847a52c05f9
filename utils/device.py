"""The device and its arithmetic, chosen once."""

import logging
import resource
import sys

import torch

from utils.config import ConfigError

logger = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """cuda, else mps, else cpu for `auto`; raises ConfigError for a device that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ConfigError(f"device {name} is not available here: take device=auto")
    return torch.device(name)


def _cpu_computes_bf16() -> bool:
    """Whether the CPU has AMX or AVX512-BF16; elsewhere bf16 is emulated, and slower than fp32."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def choose_amp_dtype(use_amp: bool, device: torch.device) -> torch.dtype | None:
    """bf16 where the hardware computes it, else fp16 on CUDA, else None: float32, with a line that says so."""
    if not use_amp:
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and _cpu_computes_bf16():
        return torch.bfloat16
    logger.info("mixed precision was asked for, but this %s computes no bf16: training in float32", device.type)
    return None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory: of the device on CUDA, else of the process, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
