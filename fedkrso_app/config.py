"""The run config as frozen dataclasses: cast, checked and explained once, at the door.

The defaults live in ``[tool.flwr.app.config]`` of pyproject.toml and nowhere else; this file knows the keys, their
types and what values make sense together. The settings of a method are declared beside it, in ``strategies/``.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar


class ConfigError(ValueError):
    """A setting or an input that the user can fix; the message names it and says how."""


class Settings:
    """Base of the settings of a method: a frozen dataclass whose ``table`` names their table in pyproject.toml.

    ``__post_init__`` raises :class:`ConfigError` for values that make no sense by themselves.
    """

    table: ClassVar[str]


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Config:
    """One run's settings. Field ``dirichlet_alpha`` is key ``dirichlet-alpha``; ``tables`` are those of the methods."""

    strategy: str
    model: str
    model_revision: str
    task: str
    data_dir: str
    dataset: str
    dataset_revision: str
    rows: int
    text_columns: str
    label_column: str
    labels: str
    metric: str
    bad_rows: str
    partition: str
    partition_column: str
    partition_seed: int
    dirichlet_alpha: float
    num_server_rounds: int
    fraction_train: float
    min_replies: int
    round_timeout: float
    local_steps: int
    batch_size: int
    max_length: int
    warmup: float
    schedule: str
    gradient_accumulation: int
    max_grad_norm: float
    activation_memory: str
    head: str
    device: str
    compute_dtype: str
    state_dtype: str
    compute_weights: str
    weights_at_rest: bool
    torch_threads: int
    clients_per_node: int
    batch_clients: str
    captured_steps: str
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
    secure_aggregation: bool
    tables: tuple[Settings, ...]

    def of(self, kind: type[S]) -> S:
        """The settings of a method."""
        return next(table for table in self.tables if isinstance(table, kind))

    @property
    def draw(self) -> int:
        """What draws the partition: ``partition-seed``, or ``seed`` where that is -1."""
        return self.seed if self.partition_seed == -1 else self.partition_seed

    @property
    def few_bits(self) -> bool:
        """Whether clients compute with weights of few bits, made anew from W^t."""
        return self.compute_weights != "float"

    @property
    def on_device(self) -> bool:
        """Whether W^t itself may lie on the device; else it stays in the host's memory, and a copy computes."""
        return self.compute_dtype == self.state_dtype and not self.few_bits

    @property
    def at_rest(self) -> bool:
        """Whether training leaves the layers' weights alone and takes its steps beside them."""
        return self.compute_dtype == "bfloat16" or self.few_bits or self.weights_at_rest

    @property
    def weights_device(self) -> str:
        """Where W^t lies: a ``device``."""
        return self.device if self.on_device else "cpu"

    @property
    def of_server(self) -> "Config":
        """The same for the server, which judges W^t itself, whatever clients compute with."""
        return dataclasses.replace(self, compute_weights="float")

    def to_dict(self) -> dict[str, Any]:
        """The flat mapping with the user's keys (``fedkrso.num-seeds``) that :func:`parse` takes."""
        common = {_key(f.name): getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "tables"}
        return common | {
            f"{table.table}.{_key(name)}": value for table in self.tables for name, value in vars(table).items()
        }


def parse(run_config: Mapping[str, Any], tables: Sequence[type[Settings]]) -> Config:
    """Check a flat run config (``{"fedkrso.rank": 4, ...}``, as Flower hands it over) and give it types.

    ``tables`` are the settings of all methods. Raises :class:`ConfigError` with one sentence that names the key and
    the fix.
    """
    known = _keys(Config) + [key for table in tables for key in _keys(table, table.table + ".")]
    for key in run_config:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}."
            raise ConfigError(f"unknown key {key!r} in the run config; {hint}")
    built = tuple(_build(table, table.table + ".", run_config) for table in tables)
    config = _build(Config, "", run_config, tables=built)
    _check(config)
    return _revised(config)


def _revised(c: Config) -> Config:
    """``c`` with the revisions in the names, ``org/name@revision``."""
    changes: dict[str, Any] = {}
    for key, name, revision in (
        ("model", c.model, c.model_revision),
        ("dataset", c.dataset, c.dataset_revision),
    ):
        if not revision or (key == "dataset" and c.task.startswith("glue/") and not c.data_dir):
            continue
        if not name or name == "embedded" or is_local(name.partition(":")[0]):
            raise ConfigError(f"{key}-revision = {revision!r} needs {key} to be a name of the hub; leave it empty.")
        if (before := name.partition("@")[2].partition(":")[0]) not in ("", revision):
            raise ConfigError(f"{key} = {name!r} and {key}-revision = {revision!r} differ; leave {key}-revision empty.")
        changes[key] = name if before else f"{name}@{revision}"
    return dataclasses.replace(c, **changes)


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as Flower hands them over: ``{"fedkrso": {"rank": 4}}`` -> ``{"fedkrso.rank": 4}``."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def resolved_path(path: str) -> Path:
    """``path`` as an absolute one, a leading ``~`` expanded."""
    return Path(path).expanduser().resolve()


def cache() -> Path:
    """The folder of this machine's files: what its nodes hold of a run, the embedded model."""
    return Path(os.environ.get("FEDKRSO_CACHE") or "~/.cache/fedkrso").expanduser()


def is_local(name: str) -> bool:
    """Whether a model or dataset of this ``name`` is a folder of this machine."""
    return name.startswith(("~", "/", ".")) or resolved_path(name).is_dir()


def names(text: str) -> list[str]:
    """The names in a text that separates them by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _key(field: str) -> str:
    return field.replace("_", "-")


def _keys(cls: Any, prefix: str = "") -> list[str]:
    return [prefix + _key(field.name) for field in dataclasses.fields(cls) if field.name != "tables"]


def _build(cls: Any, prefix: str, values: Mapping[str, Any], **more: Any) -> Any:
    fields = {}
    for field in dataclasses.fields(cls):
        key = prefix + _key(field.name)
        if field.name in more:
            fields[field.name] = more[field.name]
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


def choice(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        close = difflib.get_close_matches(value, allowed, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{key} = {value!r} is not one of {', '.join(allowed)}.{hint}")


def need(holds: bool, key: str, value: Any, rule: str) -> None:
    """Raise :class:`ConfigError` unless the ``rule`` holds."""
    if not holds:  # NaN fails every comparison and so ends up here too
        raise ConfigError(f"{key} = {value} is impossible: it must be {rule}.")


def need_positive(key: str, value: float) -> None:
    need(0 < value < float("inf"), key, value, "a number above 0")


def _check(c: Config) -> None:
    choice("partition", c.partition, ["iid", "dirichlet", "dirichlet-equal", "natural"])
    if c.partition == "natural" and not c.partition_column:
        raise ConfigError("partition = 'natural' needs partition-column, the column whose values are the clients.")
    if c.data_dir and c.dataset:
        raise ConfigError(
            f"data-dir = {c.data_dir!r} and dataset = {c.dataset!r} are both set; leave one of them empty."
        )
    choice("bad-rows", c.bad_rows, ["stop", "skip"])
    choice("weighting", c.weighting, ["uniform", "examples"])
    choice("aggregation", c.aggregation, ["mean", "median", "trimmed-mean"])
    if c.aggregation != "mean" and c.weighting != "uniform":
        raise ConfigError(f"aggregation = {c.aggregation!r} knows no weights: take weighting = 'uniform'.")
    need(0 <= c.max_update_norm < float("inf"), "max-update-norm", c.max_update_norm, "0 (no bound) or above")
    choice("wire-dtype", c.wire_dtype, ["float32", "float16", "int8", "int4"])
    choice("head", c.head, ["dense", "linear", "frozen"])
    choice("schedule", c.schedule, ["cosine", "constant"])
    choice("activation-memory", c.activation_memory, ["auto", "keep", "recompute", "checkpoint"])
    choice("device", c.device, ["auto", "cpu", "cuda", "mps", "xpu"])
    choice("compute-dtype", c.compute_dtype, ["float32", "bfloat16"])
    choice("state-dtype", c.state_dtype, ["float32", "bfloat16"])
    if c.state_dtype == "bfloat16" and c.compute_dtype != "bfloat16":
        raise ConfigError(
            "state-dtype = 'bfloat16' needs compute-dtype = 'bfloat16': in float32 a second W would do the work."
        )
    choice("compute-weights", c.compute_weights, ["float", "int8", "nf4"])
    if c.few_bits and c.captured_steps == "on":
        raise ConfigError(
            f"captured-steps = 'on' does not go with compute-weights = {c.compute_weights!r}, whose kernels have "
            "not been captured yet: set it to 'off'."
        )
    need(0 <= c.max_grad_norm < float("inf"), "max-grad-norm", c.max_grad_norm, "0 (no bound) or above")
    choice("evaluate", c.evaluate, ["server", "clients", "off"])
    values = c.to_dict()
    counts = ("num-server-rounds", "min-replies", "local-steps", "batch-size", "gradient-accumulation")
    for key in (*counts, "clients-per-node"):
        need(values[key] >= 1, key, values[key], "at least 1")
    for key in ("round-timeout", "dirichlet-alpha"):
        need_positive(key, values[key])
    if c.batch_clients != "auto" and not re.fullmatch("[1-9][0-9]*", c.batch_clients):
        raise ConfigError(f"batch-clients = {c.batch_clients!r} is neither 'auto' nor a number of clients in quotes.")
    choice("captured-steps", c.captured_steps, ["auto", "on", "off"])
    need(c.rows >= 0, "rows", c.rows, "0 (all) or above")
    need(c.max_length >= 4, "max-length", c.max_length, "at least 4 tokens")
    need(1 <= c.torch_threads <= 1024, "torch-threads", c.torch_threads, "between 1 and 1024")
    need(0 < c.fraction_train <= 1, "fraction-train", c.fraction_train, "above 0 and at most 1")
    need(0 <= c.holdout < 1, "holdout", c.holdout, "a share of the training rows, at least 0 and below 1")
    need(0 <= c.warmup < 1, "warmup", c.warmup, "a share of the local steps, at least 0 and below 1")
    need(0 <= c.seed < 2**63, "seed", c.seed, "at least 0 and below 2**63")
    need(-1 <= c.partition_seed < 2**63, "partition-seed", c.partition_seed, "-1 (as seed) or above, and below 2**63")
    if "/" in c.run_name or c.run_name in (".", ".."):
        raise ConfigError(f"run-name = {c.run_name!r} is not a folder name; leave out any '/'.")
