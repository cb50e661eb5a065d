"""The table of methods: one line each, one file each, both halves in it."""

from collections.abc import Mapping
from typing import Any

from fedkrso_app import config as common
from fedkrso_app.config import Config, ConfigError, Settings, choice
from fedkrso_app.strategies import options, privacy, secure
from fedkrso_app.strategies.base import Method
from fedkrso_app.strategies.decomfl import DeComFL
from fedkrso_app.strategies.fed_dare import FedDARE
from fedkrso_app.strategies.fedblock import FedBlock
from fedkrso_app.strategies.fedex_lora import FedExLoRA
from fedkrso_app.strategies.fedfft import FedFFT
from fedkrso_app.strategies.fedit import FedIT
from fedkrso_app.strategies.fedkrso import FedKRSO
from fedkrso_app.strategies.fedkseed import FedKSeed, FedKSeedPro
from fedkrso_app.strategies.fedmezo import FedMeZO
from fedkrso_app.strategies.fedsa_lora import FedSALora
from fedkrso_app.strategies.fedsrd import FedSRD, FedSRDe
from fedkrso_app.strategies.fedsvd import FedSVD
from fedkrso_app.strategies.ffa_lora import FFALora
from fedkrso_app.strategies.flexlora import FlexLoRA
from fedkrso_app.strategies.flora import FLoRA
from fedkrso_app.strategies.fr_lora import FeDeRA, FRLora
from fedkrso_app.strategies.fwdllm import FwdLLM
from fedkrso_app.strategies.hetlora import HetLoRA
from fedkrso_app.strategies.lora import Lora
from fedkrso_app.strategies.lora_fair import LoRAFAIR
from fedkrso_app.strategies.rolora import RoLoRA
from fedkrso_app.strategies.sketch import Ferret, Separate
from fedkrso_app.training.shapes import Shapes

STRATEGIES: dict[str, type[Method]] = {
    "fedkrso": FedKRSO,
    "fedfft": FedFFT,
    "fedit": FedIT,
    "ffa-lora": FFALora,
    "rolora": RoLoRA,
    "fedsvd": FedSVD,
    "flexlora": FlexLoRA,
    "hetlora": HetLoRA,
    "flora": FLoRA,
    "fedex-lora": FedExLoRA,
    "lora-fair": LoRAFAIR,
    "fed-dare": FedDARE,
    "fedsa-lora": FedSALora,
    "fr-lora": FRLora,
    "federa": FeDeRA,
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
    common_to_all = (options.ClientOptions, options.ServerOptions, privacy.Privacy, secure.SecureSums)
    tables: dict[type[Settings], None] = dict.fromkeys(common_to_all)
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
    options.check(method, config)
    privacy.check(method, config)
    secure.check(method, config)
    if Lora in method.settings and config.of(Lora).ranks and not method.ranked:
        raise ConfigError(
            f"lora.ranks = {config.of(Lora).ranks!r} does not go with {config.strategy}, whose clients share one rank: "
            f"leave it empty, or take {', '.join(name for name, other in STRATEGIES.items() if other.ranked)}."
        )
    if config.state_dtype == "bfloat16" and method.half.dense:
        raise ConfigError(
            f"state-dtype = 'bfloat16' does not go with {config.strategy}, whose clients train the weights themselves, "
            "in float32: set it to 'float32'."
        )
    for key, value, wanted in (
        ("compute-weights", config.compute_weights, "float"),
        ("weights-at-rest", config.weights_at_rest, False),
    ):
        if value != wanted and method.half.dense:
            raise ConfigError(
                f"{key} = {value!r} does not go with {config.strategy}, whose clients train the weights themselves: "
                f"set it to {wanted!r}."
            )
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
    protected = config.of(privacy.Privacy).unit == "client"
    if judged and config.evaluate != "server" and (config.wire_dtype != "float32" or protected):
        entry = method.entry.travelling
        every = {name for name in entry.named("state") if not entry.fields[name].optional}
        unknown = (every | set(method.reply.travelling.named("state"))) - method.known_start().keys()
        if unknown and protected:
            raise ConfigError(
                f"privacy.unit = 'client' needs evaluate = 'server': {', '.join(sorted(unknown))} would be clipped as "
                "a difference to a start that only a server with the model knows."
            )
        if unknown:
            raise ConfigError(
                f"wire-dtype = {config.wire_dtype!r} needs evaluate = 'server': {', '.join(sorted(unknown))} would be "
                "rounded as differences to a start that only a server with the model knows."
            )
    if config.secure_aggregation:
        method.layout(1, method.turns()[0])
    if protected:
        privacy.check_layout(method)
    return method
