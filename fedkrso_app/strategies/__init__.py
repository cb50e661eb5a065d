"""The table of methods: one line each, one file each, both halves in it."""

from collections.abc import Mapping
from typing import Any

from fedkrso_app import config as common
from fedkrso_app.config import Config, ConfigError, Settings, choice
from fedkrso_app.strategies import options
from fedkrso_app.strategies.base import Method, Shapes
from fedkrso_app.strategies.fedfft import FedFFT
from fedkrso_app.strategies.fedit import FedIT
from fedkrso_app.strategies.fedkrso import FedKRSO
from fedkrso_app.strategies.fedsa_lora import FedSALora
from fedkrso_app.strategies.fedsrd import FedSRD, FedSRDe
from fedkrso_app.strategies.ffa_lora import FFALora
from fedkrso_app.strategies.fr_lora import FeDeRA, FRLora

STRATEGIES: dict[str, type[Method]] = {
    "fedkrso": FedKRSO,
    "fedfft": FedFFT,
    "fedit": FedIT,
    "ffa-lora": FFALora,
    "fedsa-lora": FedSALora,
    "fr-lora": FRLora,
    "federa": FeDeRA,
    "fedsrd": FedSRD,
    "fedsrd-e": FedSRDe,
}


def parse(run_config: Mapping[str, Any]) -> Config:
    """The run config with the settings of every method, checked. Raises :class:`ConfigError`."""
    tables: dict[type[Settings], None] = dict.fromkeys((options.ClientOptions, options.ServerOptions))
    for method in STRATEGIES.values():
        tables |= dict.fromkeys(method.settings)
    config = common.parse(run_config, list(tables))
    choice("strategy", config.strategy, list(STRATEGIES))
    method = STRATEGIES[config.strategy]
    if config.aggregation != "mean" and not method.linear:
        raise ConfigError(
            f"aggregation = {config.aggregation!r} does not go with {config.strategy}, which averages products: "
            "set it to 'mean'."
        )
    options.check(method, config)
    method.check_settings(config)
    return config


def make(config: Config, shapes: Shapes, judged: bool = True) -> Method:
    """The method of a run. Raises :class:`ConfigError` where it does not go with the model or the settings; with
    ``judged`` also where it does not go with who evaluates."""
    method = options.applied(STRATEGIES[config.strategy], config)(config, shapes)
    if judged and config.evaluate == "server" and method.reply.named("personal"):
        raise ConfigError(
            f"evaluate = 'server' does not go with {config.strategy}, which leaves a part of the model at each client: "
            "set evaluate = 'clients'."
        )
    unknown = set(method.reply.travelling.named("state")) - method.known_start().keys()
    if judged and config.evaluate != "server" and config.wire_dtype != "float32" and unknown:
        names = ", ".join(sorted(unknown))
        raise ConfigError(
            f"wire-dtype = {config.wire_dtype!r} needs evaluate = 'server': {names} would be rounded as differences to "
            "a start that only a server with the model knows."
        )
    return method
