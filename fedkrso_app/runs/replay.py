"""A run read again from its ledger: the model of any version, what each entry did, how far it moved each layer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from fedkrso_app import data
from fedkrso_app.config import Config, ConfigError
from fedkrso_app.federation.replica import NeedSync, Replica, first_needed
from fedkrso_app.federation.store import NodeStore
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger, LedgerError
from fedkrso_app.records.schema import Schema
from fedkrso_app.runs.folder import Run
from fedkrso_app.strategies import make
from fedkrso_app.strategies.base import Arrays, Local, Method
from fedkrso_app.training import model, threads
from fedkrso_app.training.shapes import Shapes


def opened(folder: Path) -> tuple[Run, Ledger]:
    """A run and its ledger. Raises ConfigError where the folder is no run, LedgerError where it has no entries."""
    run = Run(folder)
    _ = run.config  # says so where the folder is no run
    if not (entries := Ledger(run.ledger)).versions():
        raise LedgerError(f"{folder} has no ledger, or an empty one.")
    return run, entries


def exportable(run: Run, entries: Ledger) -> dict[int, int]:
    """Round -> version, of all versions that the entries on disk lead to."""
    span, versions = method_of(run.config).entry.span, entries.versions()
    versions = [v for v in versions if {*range(first_needed(-1, v, span), v + 1)} <= {*versions}]
    at = {line["round"]: line["version"] for line in run.metrics() if line["version"] in versions}
    if versions:
        at[entries.read(versions[-1]).record["round"]] = versions[-1]  # its line may not have been written
    return at


def personal(run: Run, round: int, partition: int | None) -> Arrays:
    """What ``partition`` kept to itself of the model of ``run``, after its newest round up to ``round``."""
    needed = method_of(run.config).reply.named("personal")
    if not needed and partition is None:
        return {}
    if not needed:
        raise ConfigError(f"--partition: clients of {run.config.strategy} keep nothing of the model to themselves.")
    if partition is None:
        raise ConfigError(f"clients of {run.config.strategy} keep {', '.join(needed)} to themselves: give --partition.")
    store = NodeStore(run.info["id"])
    own = store.released_personal(partition, before=round + 1)
    if not own:
        raise ConfigError(f"partition {partition} has left nothing in {store.released}: export on the node's machine.")
    return own


def replayed(
    run: Run, entries: Ledger, to: int, own: Arrays | None = None
) -> tuple[model.LoadedModel, Mapping[str, Any]]:
    """The loaded model, and its plain state at version ``to`` with the personal arrays ``own``."""
    loaded, steps = walked(run, entries, range(first_needed(-1, to, method_of(run.config).entry.span), to + 1))
    *_, (_, local) = steps
    local.adopt(own or {})
    return loaded, local.plain_state()


@lru_cache(maxsize=1)  # an export asks three times, and a large model takes a while to outline
def method_of(config: Config) -> Method:
    """The method of a run, from its settings and the model's shapes."""
    return make(config, Shapes.of(model.outline(config.model, data.resolve(config).num_labels, config.head)))


def walked(run: Run, entries: Ledger, versions: Sequence[int]) -> tuple[model.LoadedModel, Iterator[tuple[int, Local]]]:
    """The loaded model, and each of ``versions`` with the half that has brought the model there."""
    config = run.config
    threads.hold(config.torch_threads)
    task = data.resolve(config)
    loaded = model.of_run(config, task)
    if run.info["model_digest"] not in ("", loaded.digest()):
        raise ConfigError(f"model = {config.model!r} has other weights than when {run.path} was made.")
    method = make(config, Shapes.of(loaded))
    local = method.local(loaded)
    replica = Replica(local, entries, method.entry.span)

    def steps() -> Iterator[tuple[int, Any]]:
        try:
            for version in track(versions, "Replaying", console=Console(stderr=True), transient=True):
                replica.advance(version)
                yield version, local
        except NeedSync as error:
            raise LedgerError(str(error)) from None

    return loaded, steps()


def reached(run: Run, entries: Ledger) -> list[int]:
    """The versions on disk that the entries on disk lead to."""
    span, versions = method_of(run.config).entry.span, entries.versions()
    if span:  # the oldest on disk may need others that the ledger has dropped
        versions = [v for v in versions if first_needed(-1, v, span) >= versions[0]]
    return versions


def moved(run: Run, entries: Ledger) -> dict[int, dict[str, float]]:
    """Of every entry whose predecessor is there: target layer, or ``head`` -> Frobenius norm of what it moved."""
    loaded, steps = walked(run, entries, reached(run, entries))
    parts = {name: [f"{name}.weight"] for name in loaded.targets} | ({"head": list(loaded.head)} if loaded.head else {})
    lengths: dict[int, dict[str, float]] = {}
    last, before = -1, dict[str, Any]()
    for version, local in steps:
        state = local.plain_state()
        now = {key: state[key].clone() for keys in parts.values() for key in keys}  # the state moves on in place
        if before and last == version - 1:
            squares = {key: float((now[key].double() - before[key].double()).square().sum()) for key in now}
            lengths[version] = {name: math.sqrt(sum(squares[key] for key in keys)) for name, keys in parts.items()}
        last, before = version, now
    return lengths


def described(run: Run, entries: Ledger) -> Iterator[dict[str, Any]]:
    """What every entry on disk says, as JSON would have it."""
    schema, states, last = method_of(run.config).entry, dict[str, np.ndarray](), -1
    for version in entries.versions():
        entry = entries.read(version)
        entry = replace(entry, arrays=wire.decode(entry.arrays))
        if version != last + 1:
            states = {}
        yield {
            "version": version,
            **{key: value for key, value in entry.record.items() if key != "version"},
            "arrays": {name: list(value.shape) for name, value in entry.arrays.items()},
            "disk_bytes": (entries.folder / f"{version:06d}.safetensors").stat().st_size,
            "norms": _norms(entry.arrays, states, schema),
        }
        states |= {name: entry.arrays[name] for name in schema.named("state") if name in entry.arrays}
        last = version


def _norms(arrays: Arrays, before: Arrays, schema: Schema) -> dict[str, float]:
    """L2 norms of an entry's updates, and of the changes of its states since those ``before``."""
    norms = {}
    for name, value in arrays.items():
        if schema.fields[name].role == "update":
            norms[name] = float(np.linalg.norm(value.astype(np.float64)))
        elif schema.fields[name].role == "state" and name in before:
            norms[name] = float(np.linalg.norm(value.astype(np.float64) - before[name]))
    return norms
