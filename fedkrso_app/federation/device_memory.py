"""What fits into a device: what the counts of :mod:`federation.memory` leave out, and activation-memory = "auto"."""

import logging
from dataclasses import replace

import torch

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.data import Task
from fedkrso_app.federation.memory import SETTINGS, client_memory, outlined
from fedkrso_app.strategies.privacy import Privacy
from fedkrso_app.training.device import device, free_bytes
from fedkrso_app.training.model import quiet

logger = logging.getLogger("flwr")

MIB, GIB = 2**20, 2**30

CONTEXT = 512 * MIB  # of CUDA on a GPU, with the code of its kernels: assumed
WORKSPACES = 65 * MIB  # of cuBLAS: measured on one H200 (docs/performance.md, weights of the first case and the second)
LIBRARIES = 640 * MIB  # Python, torch and transformers in a client's process on a CPU: measured (docs/guide.md, 6)
GAPS = 0.05  # a share of what is counted, for what an allocator rounds up and leaves unused: assumed


def allowed(memory: int, cuda: bool) -> int:
    """How many of a device's bytes may be in what is counted here."""
    return max(0, int((memory - (CONTEXT + WORKSPACES if cuda else LIBRARIES)) / (1 + GAPS)))


def settled(config: Config, task: Task) -> Config:
    """``config`` with an ``activation-memory`` of its own where that is "auto": the quickest that fits into the memory
    of a GPU that is free, and keep on other devices. All of them give the same bits, except where steps are captured,
    which only those that keep are: then it is keep or none.

    Raises ConfigError where none fits, or where it cannot be counted.
    """
    if config.activation_memory != "auto":
        return config
    place = device(config.device)
    if place.type != "cuda":
        logger.info("activation-memory = 'auto': keep, as on every %s", place.type)
        return replace(config, activation_memory="keep")
    if config.of(Privacy).unit == "example":
        raise ConfigError("activation-memory = 'auto' does not count the gradients of single rows; set one of them.")
    free = free_bytes(place) + torch.cuda.memory_reserved(place)  # what this process has in hand already
    with quiet():
        settings = SETTINGS[:1] if config.captured_steps == "on" else SETTINGS
        memories, refused = client_memory(*outlined(config, task), cuda=True, settings=settings)
    if not memories:
        raise ConfigError(f"activation-memory = 'auto': nothing can be counted ({next(iter(refused.values()))}).")
    needs = {setting: int(found.total * (1 + GAPS)) + WORKSPACES for setting, found in memories.items()}
    for setting, need in needs.items():
        if need <= free:
            logger.info("activation-memory = 'auto': %s, %.2f GiB of %.2f free", setting, need / GIB, free / GIB)
            return replace(config, activation_memory=setting)
    least = min(needs, key=lambda setting: needs[setting])
    raise ConfigError(
        f"activation-memory = 'auto': even {least!r} needs {needs[least] / GIB:.2f} GiB and {free / GIB:.2f} are free "
        f"on the GPU; `fedkrso plan --device-memory {free / GIB:.2f}GiB` says what would fit."
    )
