"""Where models compute: one setting for the server, the clients and their bfloat16 copies."""

import logging
import os
import resource
from functools import lru_cache
from typing import Any

import torch

from fedkrso_app.config import ConfigError

logger = logging.getLogger("flwr")

AUTO = ("cuda", "xpu", "mps")  # the order in which "auto" looks for an accelerator


def device(setting: str) -> torch.device:
    """The device that ``setting`` (a ``device`` of the run config) means on this machine.

    Products of float32 are then exact ones (no TF32), or W^t would be rebuilt with other bits than the server's. Raises
    :class:`ConfigError` where torch has no such device here.
    """
    kind = next((kind for kind in AUTO if _has(kind)), "cpu") if setting == "auto" else setting
    if not _has(kind):
        found = ", ".join(["cpu", *filter(_has, AUTO)])
        raise ConfigError(
            f"device = {setting!r}: torch {torch.__version__} finds none on this machine, only {found}; "
            "set device = 'auto', or install a torch that is built for it."
        )
    exact_products()
    if kind == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, before its first product; same bits
    elif kind != "cpu":
        _warn(f"device {kind}: torch promises same bits for the same seed on cpu and cuda only; results may differ")
    return torch.device(kind)


def exact_products() -> None:
    """No TF32 in products and convolutions of float32, on any device."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def module_of(device: torch.device) -> Any:
    """torch's module for an accelerator: ``torch.cuda`` for cuda. None for the CPU."""
    return None if device.type == "cpu" else getattr(torch, device.type, None)


def reset_peak(device: torch.device) -> None:
    """Begin to measure :func:`peak_bytes` anew, where the device can."""
    if hasattr(module := module_of(device), "reset_peak_memory_stats"):
        module.reset_peak_memory_stats()


def release(device: torch.device) -> None:
    """Give back what torch keeps of an accelerator's memory for later."""
    if hasattr(module := module_of(device), "empty_cache"):
        module.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device; 0 of others, which do not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def peak_bytes(device: torch.device) -> int:
    """Peak memory in bytes: of the accelerator since :func:`reset_peak`, else of this process since it began.

    Of ``mps``, which keeps no peak, what the driver holds now.
    """
    module = module_of(device)
    if hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated()
    if hasattr(module, "driver_allocated_memory"):
        return module.driver_allocated_memory()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _has(kind: str) -> bool:
    if kind == "cpu":
        return True
    owner = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
    return owner is not None and owner.is_available()


@lru_cache(maxsize=8)
def _warn(message: str) -> None:
    logger.warning(message)
