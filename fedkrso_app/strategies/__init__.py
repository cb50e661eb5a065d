"""The table of methods: one line each, one file each, both halves in it."""

from fedkrso_app.strategies.base import FedTune
from fedkrso_app.strategies.fedkrso import FedKRSO

STRATEGIES: dict[str, type[FedTune]] = {
    "fedkrso": FedKRSO,
}
