"""The table of methods: one line each, one file each, both halves in it."""

from collections.abc import Mapping
from typing import Any

from fedkrso_app import config as common
from fedkrso_app.config import Config, ConfigError, Settings, choice
from fedkrso_app.strategies.base import Method, Shapes
from fedkrso_app.strategies.decomfl import DeComFL
from fedkrso_app.strategies.fedblock import FedBlock
from fedkrso_app.strategies.fedfft import FedFFT
from fedkrso_app.strategies.fedit import FedIT
from fedkrso_app.strategies.fedkrso import FedKRSO
from fedkrso_app.strategies.fedkseed import FedKSeed, FedKSeedPro
from fedkrso_app.strategies.fedmezo import FedMeZO
from fedkrso_app.strategies.fedsrd import FedSRD, FedSRDe
from fedkrso_app.strategies.ffa_lora import FFALora
from fedkrso_app.strategies.fwdllm import FwdLLM
from fedkrso_app.strategies.sketch import Ferret, Separate

STRATEGIES: dict[str, type[Method]] = {
    "fedkrso": FedKRSO,
    "fedfft": FedFFT,
    "fedit": FedIT,
    "ffa-lora": FFALora,
    "fedsrd": FedSRD,
    "fedsrd-e": FedSRDe,
    "decomfl": DeComFL,
    "fedkseed": FedKSeed,
    "fedkseed-pro": FedKSeedPro,
    "fedmezo": FedMeZO,
    "fwdllm": FwdLLM,
    "fedblock": FedBlock,
    "ferret": Ferret,
    "separate": Separate,
}


def parse(run_config: Mapping[str, Any]) -> Config:
    """The run config with the settings of every method, checked. Raises :class:`ConfigError`."""
    tables: dict[type[Settings], None] = {}
    for method in STRATEGIES.values():
        tables |= dict.fromkeys(method.settings)
    config = common.parse(run_config, list(tables))
    choice("strategy", config.strategy, list(STRATEGIES))
    method = STRATEGIES[config.strategy]
    if config.aggregation != "mean" and not method.linear:
        raise ConfigError(
            f"aggregation = {config.aggregation!r} does not go with {config.strategy}, which needs every "
            "reply itself: set it to 'mean'."
        )
    method.check_settings(config)
    return config


def make(config: Config, shapes: Shapes) -> Method:
    """The method of a run. Raises :class:`ConfigError` where it does not go with the model or the settings."""
    method = STRATEGIES[config.strategy](config, shapes)
    if config.evaluate == "server" and method.reply.named("personal"):
        raise ConfigError(
            f"evaluate = 'server' does not go with {config.strategy}, which leaves a part of the model at each client: "
            "set evaluate = 'clients'."
        )
    return method
