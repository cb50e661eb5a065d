"""The table ``privacy`` of the run config: the unit that a run protects, its clip and noise, and what goes with it."""

import logging
import math
from dataclasses import dataclass
from typing import Any

from fedkrso_app.config import Config, ConfigError, Settings, choice, need
from fedkrso_app.core.accounting import INSTALL, Releases, can_sample, epsilon, shown
from fedkrso_app.core.noise import LARGEST
from fedkrso_app.strategies.base import Method
from fedkrso_app.strategies.lora import Lora

logger = logging.getLogger("flwr")

UNITS = ("none", "example", "client")
_LEAST_NOISE = 0.3  # below, ε of a round is above 30, and computing it fills the memory
_LEAST_DELTA = 1e-8  # ten times what the ends of the noise's tails take of it
_FEW_STEPS = 20  # between two starts of Adam's moments: fewer average too few draws of noise


@dataclass(frozen=True)
class Privacy(Settings):
    table = "privacy"
    unit: str
    clip: float  # C, the largest L2 norm that one unit may add
    noise: float  # σ, in units of the clip
    delta: float
    max_epsilon: float
    randomness: str

    def __post_init__(self) -> None:
        choice("privacy.unit", self.unit, UNITS)
        choice("privacy.randomness", self.randomness, ["os", "seed"])
        for name in ("clip", "noise", "max_epsilon"):
            value = getattr(self, name)
            need(0 <= value < float("inf"), f"privacy.{name.replace('_', '-')}", value, "0 (off) or above")
        need(_LEAST_DELTA <= self.delta < 1, "privacy.delta", self.delta, f"at least {_LEAST_DELTA:g} and below 1")
        if self.unit != "none" and not (self.clip and self.noise):
            raise ConfigError(
                f"privacy.unit = {self.unit!r} needs privacy.clip and privacy.noise above 0; fedkrso plan prints ε for "
                "a noise."
            )


def check(method: type[Method], config: Config) -> None:
    """Raise :class:`ConfigError` where the unit does not go with ``method`` or with the other settings."""
    if config.of(Privacy).unit == "example":
        check_example(method, config)
    if config.of(Privacy).unit == "client":
        check_client(method, config)


def check_client(method: type[Method], config: Config) -> None:
    """The same for the unit "client"; :func:`check_layout` knows the rest."""
    own = config.of(Privacy)
    if not method.linear:
        raise _refused(config, "strategy", config.strategy, "its server needs each client's reply")
    wrong: list[tuple[str, Any, Any, str]] = [
        ("weighting", config.weighting, "uniform", "a weight would multiply what a client adds"),
        ("aggregation", config.aggregation, "mean", "the noise is made for a mean"),
        ("max-update-norm", config.max_update_norm, 0.0, "a refusal would tell of a client's data"),
        ("client-metrics", config.client_metrics, False, "they are of single clients"),
    ]
    for key, value, needed, reason in wrong:
        if value != needed:
            raise _refused(config, key, value, reason)
    for name in ("clip", "noise"):
        need(getattr(own, name) <= LARGEST, f"privacy.{name}", getattr(own, name), f"at most {LARGEST:g}")
    if own.max_epsilon and (one := epsilon([Releases(own.noise)], own.delta)) > own.max_epsilon:
        raise ConfigError(
            f"privacy.max-epsilon = {own.max_epsilon:g} would be exceeded in round 1 ({shown(one)}): raise "
            "privacy.noise."
        )


def check_layout(method: Method) -> None:
    """Raise :class:`ConfigError` where the server does not know what the sum of a round consists of before anybody
    replies: noise goes to all of it."""
    try:
        method.layout(1, method.turns()[0])
    except ConfigError:
        reason = "what its clients add up depends on what each of them sends"
        raise _refused(method.config, "strategy", method.config.strategy, reason) from None


def _refused(config: Config, key: str, value: Any, reason: str) -> ConfigError:
    return ConfigError(f"privacy.unit = 'client' does not go with {key} = {value!r}: {reason}.")


def noise_over_clip(noise: float, size: int, clients: int) -> float:
    """The norm of the noise in the mean of ``clients`` updates of ``size`` numbers, in units of a full clip: σ√d/n."""
    return noise * math.sqrt(size) / clients


def check_example(method: type[Method], config: Config) -> None:
    """The same for the unit "example"."""
    if method.zeroth_order or not method.half.by_row:
        reason = "takes no gradients" if method.zeroth_order else "trains more than linear layers"
        raise ConfigError(
            f"privacy.unit = 'example' does not go with {config.strategy}, which {reason}: take fedkrso, or a method "
            "that trains LoRA's factors."
        )
    if config.of(Privacy).noise < _LEAST_NOISE:
        raise ConfigError(
            f"privacy.noise = {config.of(Privacy).noise:g} is too small for privacy.unit = 'example': it must be at "
            f"least {_LEAST_NOISE:g}."
        )
    if config.max_grad_norm:
        raise ConfigError(
            f"max-grad-norm = {config.max_grad_norm:g} does not go with privacy.unit = 'example', which clips row by "
            "row: set it to 0."
        )
    if config.of(Lora).ranks:
        raise ConfigError(
            f"lora.ranks = {config.of(Lora).ranks!r} does not go with privacy.unit = 'example', whose noise reaches "
            "every component: leave it empty."
        )
    if config.batch_clients not in ("auto", "1"):
        raise ConfigError(
            f"batch-clients = {config.batch_clients!r} does not go with privacy.unit = 'example', whose clients train "
            "one after another: set it to 'auto'."
        )
    if config.captured_steps == "on":
        raise ConfigError(
            "captured-steps = 'on' does not go with privacy.unit = 'example', whose batches have no fixed size: set it "
            "to 'off'."
        )
    if tau := config.to_dict()["client.logit-adjustment"]:
        raise ConfigError(
            f"client.logit-adjustment = {tau:g} does not go with privacy.unit = 'example': it would use class counts "
            "without noise; set it to 0."
        )
    if not can_sample():
        raise ConfigError(f"privacy.unit = 'example' needs dp-accounting: {INSTALL}.")


def warn(config: Config) -> None:
    """Warn of settings that are allowed and seldom meant, once at the beginning of a run."""
    own = config.of(Privacy)
    if own.unit != "none" and own.randomness == "seed":
        logger.warning("privacy.randomness = 'seed': NOT PRIVATE, since everyone who knows the seed knows the noise")
    if own.unit != "none" and config.evaluate == "clients":
        logger.warning("evaluate = 'clients': what clients tell of their validation rows is outside epsilon")
    if own.unit != "example":
        return
    key = "fedkrso.interval" if config.strategy == "fedkrso" else "local-steps"
    if (steps := config.to_dict()[key]) < _FEW_STEPS:
        logger.warning(
            "%s = %d: Adam's moments begin anew after each, and average too few draws of the noise; take 50 or more",
            key,
            steps,
        )
