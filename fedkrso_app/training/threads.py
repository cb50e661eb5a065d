"""How many threads torch computes with: the last bits of its sums depend on it."""

import torch

from fedkrso_app.config import ConfigError


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
