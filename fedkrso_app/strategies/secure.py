"""The settings of secure sums, and what they do not go with."""

from dataclasses import dataclass
from typing import Any

from fedkrso_app.config import Config, ConfigError, Settings, need
from fedkrso_app.core.ring import BITS
from fedkrso_app.strategies.base import Method
from fedkrso_app.strategies.privacy import Privacy

_WIDEST = 2.0**14  # of the noise: its tails stay within what the sum of honest clients may be


@dataclass(frozen=True)
class SecureSums(Settings):
    table = "secagg"
    bits: int
    threshold: int  # 0: by the number of nodes
    min_cohort: int
    range: float  # 0: by learning rate and steps
    colluders: int

    def __post_init__(self) -> None:
        need(self.bits in BITS, "secagg.bits", self.bits, "64, 32 or 16")
        need(self.threshold >= 0, "secagg.threshold", self.threshold, "0 (by the number of nodes) or above")
        need(self.min_cohort >= 3, "secagg.min-cohort", self.min_cohort, "at least 3 nodes")
        need(self.colluders >= 0, "secagg.colluders", self.colluders, "0 or above")
        need(0 <= self.range < float("inf"), "secagg.range", self.range, "0 (by learning rate and steps) or above")


def narrow(config: Config) -> bool:
    """Whether sums are taken on a grid coarser than that of plain means."""
    return config.secure_aggregation and config.of(SecureSums).bits < 64


def by_difference(config: Config) -> bool:
    """Whether states travel as differences to the newest ones (:mod:`federation.transforms`)."""
    return config.wire_dtype != "float32" or narrow(config) or config.of(Privacy).unit == "client"


def check(method: type[Method], config: Config) -> None:
    """Raise :class:`ConfigError` where secure sums are asked for and do not go with ``method`` or another setting."""
    if not config.secure_aggregation:
        return
    if not method.linear:
        raise ConfigError(
            f"secure-aggregation does not work with strategy = {config.strategy!r}: its server needs each client's "
            "reply."
        )
    wrong: list[tuple[str, Any, Any, str]] = [
        ("aggregation", config.aggregation, "mean", "it sorts the values of all clients, which nobody sees"),
        ("max-update-norm", config.max_update_norm, 0.0, "it looks at single updates, which nobody sees"),
        ("client-metrics", config.client_metrics, False, "they would be of single clients"),
    ]
    for key, value, needed, reason in wrong:
        if value != needed:
            raise ConfigError(f"secure-aggregation does not work with {key} = {value!r}: {reason}.")
    if config.of(Privacy).unit == "client":
        _check_noise(config)
    if narrow(config):
        bits = config.of(SecureSums).bits
        if config.evaluate != "server":
            raise ConfigError(
                f"secagg.bits = {bits} needs evaluate = 'server': updates are rounded as differences to a start that "
                "only a server with the model knows."
            )
        if config.weighting != "uniform":
            raise ConfigError(f"secagg.bits = {bits} needs weighting = 'uniform'.")


def _check_noise(config: Config) -> None:
    """The same for the noise that nodes add where each client is protected."""
    own, bits = config.of(Privacy), config.of(SecureSums).bits
    if bits < 64:
        raise ConfigError(
            f"secagg.bits = {bits} does not go with privacy.unit = 'client', whose noise needs a fine grid: set it to "
            "64."
        )
    if own.clip * own.noise > _WIDEST:
        raise ConfigError(
            f"privacy.clip · privacy.noise = {own.clip * own.noise:g} is more than fits under masks: it must be at "
            f"most {_WIDEST:g}."
        )
