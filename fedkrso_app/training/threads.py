"""How many threads torch computes with: the last bits of its sums depend on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedkrso_app.config import ConfigError

_LIMITS = {  # variable of OpenMP -> whether its value (lower case, "" if it is not set) means fewer than count threads
    "OMP_DYNAMIC": lambda value, count: value in ("true", "1", "yes", "on"),
    "OMP_THREAD_LIMIT": lambda value, count: value.isdecimal() and int(value) < count,
    "OMP_MAX_ACTIVE_LEVELS": lambda value, count: value == "0",
}


def hold(count: int) -> None:
    """Have torch compute with ``count`` threads in this process, whatever ``OMP_NUM_THREADS`` says.

    Raises :class:`ConfigError` where torch does not: its bits would be others than those of the run's other processes.
    """
    torch.set_num_threads(count)
    if torch.get_num_threads() != count:
        raise ConfigError(
            f"torch-threads = {count} cannot be set here: torch computes with {torch.get_num_threads()}; "
            "take that number for the whole run, or another build of torch here."
        )
    for variable, limits in _LIMITS.items():  # torch still reports ``count``
        if count > 1 and limits(os.environ.get(variable, "").strip().lower(), count):
            raise ConfigError(
                f"torch-threads = {count} cannot be set here: {variable} = {os.environ[variable]!r} lets OpenMP take "
                "fewer; unset it, or take torch-threads = 1."
            )


def spare(device: torch.device) -> bool:
    """Whether a core has nothing to do while ``device`` trains: on a CPU all of them compute, or other clients do."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return device.type not in ("cpu", "meta") and usable > 1


@contextmanager
def given_back() -> Iterator[None]:
    """On leaving, torch computes with as many threads as before: a run in one process has a caller."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
