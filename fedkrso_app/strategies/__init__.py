"""The table of methods: one line each, one file each, both halves in it."""

from fedkrso_app.federation.round import FedTune
from fedkrso_app.strategies.fedfft import FedFFT
from fedkrso_app.strategies.fedit import FedIT
from fedkrso_app.strategies.fedkrso import FedKRSO
from fedkrso_app.strategies.fedsrd import FedSRD, FedSRDe
from fedkrso_app.strategies.ffa_lora import FFALora

STRATEGIES: dict[str, type[FedTune]] = {
    "fedkrso": FedKRSO,
    "fedfft": FedFFT,
    "fedit": FedIT,
    "ffa-lora": FFALora,
    "fedsrd": FedSRD,
    "fedsrd-e": FedSRDe,
}
