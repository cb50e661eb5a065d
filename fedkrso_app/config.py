"""The run config as frozen dataclasses: cast, checked and explained once, at the door.

The defaults live in ``[tool.flwr.app.config]`` of pyproject.toml and nowhere else; this file knows the keys, their
types and what values make sense together.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A setting or an input that the user can mend; the message names it and says how."""


@dataclass(frozen=True)
class FedKRSOConfig:
    rank: int
    num_seeds: int
    interval: int
    projection: str
    learning_rate: float


@dataclass(frozen=True)
class FedFFTConfig:
    learning_rate: float


@dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float
    learning_rate: float


@dataclass(frozen=True)
class FFALoraConfig:
    learning_rate: float


@dataclass(frozen=True)
class FedSRDConfig:
    learning_rate: float
    alpha: float
    max_sparsity: float
    compensate: str
    download_sparsity: float
    rcond: float
    sparsify_head: bool


@dataclass(frozen=True)
class Config:
    """One run's settings. Field ``dirichlet_alpha`` is key ``dirichlet-alpha``; a nested class is a table."""

    strategy: str
    model: str
    task: str
    data_dir: str
    dataset: str
    text_columns: str
    label_column: str
    labels: str
    bad_rows: str
    partition: str
    partition_column: str
    dirichlet_alpha: float
    num_server_rounds: int
    fraction_train: float
    min_replies: int
    round_timeout: float
    local_steps: int
    batch_size: int
    max_length: int
    warmup: float
    gradient_accumulation: int
    max_grad_norm: float
    activation_memory: str
    compute_dtype: str
    weighting: str
    aggregation: str
    max_update_norm: float
    wire_dtype: str
    evaluate: str
    holdout: float
    seed: int
    output_dir: str
    run_name: str
    resume: str
    tracker: str
    client_metrics: bool
    fedkrso: FedKRSOConfig
    fedfft: FedFFTConfig
    lora: LoraConfig
    ffa_lora: FFALoraConfig
    fedsrd: FedSRDConfig

    @property
    def on_device(self) -> bool:
        """Whether W^t itself may lie on the GPU; else it stays in the host's memory, and a copy computes."""
        return self.compute_dtype == "float32"

    def to_dict(self) -> dict[str, Any]:
        """The flat mapping with the user's keys (``fedkrso.num-seeds``) that :func:`parse` takes."""
        return {_key(name): value for name, value in flatten(dataclasses.asdict(self)).items()}


def parse(run_config: Mapping[str, Any]) -> Config:
    """Check a flat run config (``{"fedkrso.rank": 4, ...}``, as Flower hands it over) and give it types.

    Raises :class:`ConfigError` with one sentence that names the key and the mend.
    """
    config = _build(Config, "", dict(run_config))
    _check(config)
    return config


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as Flower hands them over: ``{"fedkrso": {"rank": 4}}`` -> ``{"fedkrso.rank": 4}``."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def resolved_path(path: str) -> Path:
    """``path`` as an absolute one, a leading ``~`` expanded."""
    return Path(path).expanduser().resolve()


def names(text: str) -> list[str]:
    """The names in a text that separates them by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _key(field: str) -> str:
    return field.replace("_", "-")


def _keys(cls: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for field in dataclasses.fields(cls):
        key = prefix + _key(field.name)
        keys += _keys(field.type, key + ".") if dataclasses.is_dataclass(field.type) else [key]  # type: ignore[arg-type]
    return keys


def _build(cls: Any, prefix: str, values: dict[str, Any]) -> Any:
    if not prefix:
        known = _keys(cls)
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}."
                raise ConfigError(f"unknown key {key!r} in the run config; {hint}")
    fields = {}
    for field in dataclasses.fields(cls):
        key = prefix + _key(field.name)
        if dataclasses.is_dataclass(field.type):
            fields[field.name] = _build(field.type, key + ".", values)
        elif key not in values:
            raise ConfigError(f"key {key!r} is missing from the run config; pyproject.toml has its default.")
        else:
            fields[field.name] = _cast(key, values[key], field.type)
    return cls(**fields)


def _cast(key: str, value: Any, kind: Any) -> Any:
    fits = {
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool),
        str: isinstance(value, str),
        bool: isinstance(value, bool),
    }[kind]
    if not fits:
        quoted = f"{key}='{value}'" if kind is str else f"{key}={_example(kind)}"
        raise ConfigError(f"{key} = {value!r} is not a {kind.__name__}; write for instance {quoted}.")
    return kind(value)


def _example(kind: type) -> str:
    return {int: "10", float: "0.5", bool: "true"}[kind]


def _check(c: Config) -> None:
    from fedkrso_app.strategies import STRATEGIES  # here, because the strategies take a Config themselves

    def choice(key: str, value: str, allowed: list[str]) -> None:
        if value not in allowed:
            close = difflib.get_close_matches(value, allowed, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{key} = {value!r} is not one of {', '.join(allowed)}.{hint}")

    def need(holds: bool, key: str, value: Any, rule: str) -> None:
        if not holds:  # NaN fails every comparison and so ends up here too
            raise ConfigError(f"{key} = {value} is impossible: it must be {rule}.")

    choice("strategy", c.strategy, list(STRATEGIES))
    choice("partition", c.partition, ["iid", "dirichlet", "natural"])
    if c.partition == "natural" and not c.partition_column:
        raise ConfigError("partition = 'natural' needs partition-column, the column whose values are the clients.")
    if c.data_dir and c.dataset:
        raise ConfigError(
            f"data-dir = {c.data_dir!r} and dataset = {c.dataset!r} are both set; leave one of them empty."
        )
    choice("bad-rows", c.bad_rows, ["stop", "skip"])
    choice("weighting", c.weighting, ["uniform", "examples"])
    choice("aggregation", c.aggregation, ["mean", "median", "trimmed-mean"])
    if c.aggregation != "mean" and not STRATEGIES[c.strategy].robust:
        raise ConfigError(
            f"aggregation = {c.aggregation!r} does not go with {c.strategy}, which averages products: take 'mean'."
        )
    if c.aggregation != "mean" and c.weighting != "uniform":
        raise ConfigError(f"aggregation = {c.aggregation!r} knows no weights: take weighting = 'uniform'.")
    need(0 <= c.max_update_norm < float("inf"), "max-update-norm", c.max_update_norm, "0 (no bound) or above")
    choice("wire-dtype", c.wire_dtype, ["float32", "float16", "int8", "int4"])
    choice("activation-memory", c.activation_memory, ["keep", "recompute", "checkpoint"])
    choice("compute-dtype", c.compute_dtype, ["float32", "bfloat16"])
    need(0 <= c.max_grad_norm < float("inf"), "max-grad-norm", c.max_grad_norm, "0 (no bound) or above")
    choice("evaluate", c.evaluate, ["server", "clients", "off"])
    if c.evaluate != "server" and c.wire_dtype != "float32":
        raise ConfigError(
            f"wire-dtype = {c.wire_dtype!r} needs evaluate = 'server': numbers are rounded as differences to a start "
            "that only a server with the model knows."
        )
    choice("fedkrso.projection", c.fedkrso.projection, ["gaussian", "rademacher", "orthonormal"])
    choice("fedsrd.compensate", c.fedsrd.compensate, ["l1", "none"])
    positive = ["num-server-rounds", "min-replies", "local-steps", "batch-size", "gradient-accumulation"]
    positive += ["fedkrso.rank", "lora.rank"]
    values = c.to_dict()
    for key in positive:
        need(values[key] >= 1, key, values[key], "at least 1")
    rates = [key for key in values if key.endswith("learning-rate")]
    for key in [*rates, "round-timeout", "dirichlet-alpha", "lora.alpha"]:
        need(0 < values[key] < float("inf"), key, values[key], "a number above 0")
    need(c.max_length >= 4, "max-length", c.max_length, "at least 4 tokens")
    need(0 < c.fraction_train <= 1, "fraction-train", c.fraction_train, "above 0 and at most 1")
    need(0 <= c.holdout < 1, "holdout", c.holdout, "a share of the training rows, at least 0 and below 1")
    need(0 <= c.warmup < 1, "warmup", c.warmup, "a share of the local steps, at least 0 and below 1")
    need(0 <= c.seed < 2**63, "seed", c.seed, "at least 0 and below 2**63")
    need(1 <= c.fedkrso.num_seeds <= 65536, "fedkrso.num-seeds", c.fedkrso.num_seeds, "between 1 and 65536")
    if c.strategy == "fedkrso":
        rule = f"at least 1 and at most local-steps = {c.local_steps}"
        need(1 <= c.fedkrso.interval <= c.local_steps, "fedkrso.interval", c.fedkrso.interval, rule)
    need(0 <= c.fedsrd.alpha < 1, "fedsrd.alpha", c.fedsrd.alpha, "at least 0 and below 1")
    need(
        c.fedsrd.alpha <= c.fedsrd.max_sparsity < 1,
        "fedsrd.max-sparsity",
        c.fedsrd.max_sparsity,
        f"at least fedsrd.alpha = {c.fedsrd.alpha} and below 1",
    )
    need(
        0 <= c.fedsrd.download_sparsity < 1,
        "fedsrd.download-sparsity",
        c.fedsrd.download_sparsity,
        "at least 0 and below 1",
    )
    need(0 <= c.fedsrd.rcond < 1, "fedsrd.rcond", c.fedsrd.rcond, "at least 0 (torch's own) and below 1")
    if "/" in c.run_name or c.run_name in (".", ".."):
        raise ConfigError(f"run-name = {c.run_name!r} is not a folder name; leave out any '/'.")
