"""What a run will cost before it starts: trained numbers, bytes and a client's memory, from shapes alone.

The model is built from its config.json on torch's meta device, where a tensor has a shape and no memory, and each
method trains it there for two steps, for its memory to be counted. Bytes follow from the schemas of the wire and from
what the sampling of clients and seeds leads to on average.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedkrso_app import data
from fedkrso_app.config import Config, parse
from fedkrso_app.federation.nodes import sampled
from fedkrso_app.federation.round import FedTune, no_figures
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Entry, Ledger
from fedkrso_app.records.wire import Schema
from fedkrso_app.runs.memory import client_memory
from fedkrso_app.strategies import STRATEGIES
from fedkrso_app.strategies.base import Shapes
from fedkrso_app.training import model


def plan(settings: Mapping[str, Any], strategies: Sequence[str], clients: int) -> dict[str, Any]:
    """What ``fedkrso plan`` prints, one row per method: numbers, bytes, and memory by ``activation-memory``.

    A setting whose memory cannot be counted stands in the row's ``refused``, with the reason. ``settings`` is a flat
    run config, ``clients`` the size of the federation. Raises ConfigError where the settings are wrong, or where the
    task's number of labels cannot be known.
    """
    halves: dict[type, Any] = {}  # the client's half -> its memory: two methods may share it
    with model.quiet():
        rows = [_row(parse({**settings, "strategy": name}), clients, halves) for name in strategies]
    config = parse({**settings, "strategy": strategies[0]})
    return {
        "model": config.model,
        "task": config.task,
        "clients": clients,
        "sampled": sampled(config.fraction_train, clients),
        "rounds": config.num_server_rounds,
        "rows": rows,
    }


def _row(config: Config, clients: int, halves: dict[type, Any]) -> dict[str, Any]:
    task = data.resolve(config, look=bool(config.data_dir or config.dataset))
    loaded = model.outline(config.model, task.num_labels)
    shapes = Shapes.of(loaded.module, loaded.targets, loaded.head)
    strategy_class = STRATEGIES[config.strategy]
    strategy_class.check_rank(config, shapes)
    with _server(config, shapes) as strategy:
        costs = traffic(strategy, clients)
        instructions = ConfigRecord(strategy.instructions(1))
    with torch.device("meta"):
        method = strategy_class.local(loaded.module, loaded.targets, loaded.head, config)
        inputs = batch(loaded, task, config)
    if strategy_class.local not in halves:
        halves[strategy_class.local] = client_memory(method, inputs, instructions)
    memories, refused = halves[strategy_class.local]
    # Two steps draw one seed; every other one that a client draws leaves an accumulator beside it.
    more = round(4 * shapes.outputs(config.fedkrso.rank) * (costs["drawn"] - 1)) if "drawn" in costs else 0
    kinds = ("weights", "gradients", "optimizer", "aside", "activations", "peak", "total")
    table = {
        setting: {kind: getattr(memory, kind) + more * (kind in ("optimizer", "total")) for kind in kinds}
        for setting, memory in memories.items()
    }
    trained = next((memory.trained for memory in memories.values()), None)
    return {
        "strategy": config.strategy,
        "parameters": shapes.parameters,
        "trained": trained,
        "moved": sum(tensor.numel() for tensor in method.trained()),
        **costs,
        "memory": table,
        "refused": refused,
    }


def batch(loaded: model.LoadedModel, task: data.Task, config: Config) -> dict[str, Tensor]:
    """A batch of full length on the default device."""
    settings: Any = loaded.module.config
    positions = getattr(settings.get_text_config(), "max_position_embeddings", config.max_length)
    longest = getattr(loaded.tokenizer, "model_max_length", positions)
    rows, tokens = config.batch_size, min(config.max_length, longest)
    names = {"input_ids", "attention_mask", *getattr(loaded.tokenizer, "model_input_names", ())}
    inputs = {name: torch.ones(rows, tokens, dtype=torch.long) for name in names}
    if task.language:
        return inputs | {"labels": torch.zeros(rows, tokens, dtype=torch.long)}
    return inputs | {"labels": torch.zeros(rows, dtype=torch.float32 if task.regression else torch.long)}


@contextmanager
def _server(config: Config, shapes: Shapes) -> Iterator[FedTune]:
    """The method's server half, with an empty ledger entry 0 for a while."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        ledger.append(Entry(0, {}, no_figures()))
        yield STRATEGIES[config.strategy](config, shapes, ledger, "", "0" * 16)


def distinct_seeds(pool: int, draws: int) -> float:
    """Expected number of different seeds among ``draws`` from ``pool`` with replacement: K (1 − (1 − 1/K)^draws)."""
    return pool * (1 - (1 - 1 / pool) ** draws)


def entries_heard(share: float, rounds: int) -> float:
    """Expected number of entries 1, 2, … that one client is sent in a run, when each round asks a ``share`` of them.

    Round t brings a client up to entry t − 1. So it is sent entry v unless no round after round v asks it.
    """
    return sum(1 - (1 - share) ** left for left in range(1, rounds))


def traffic(strategy: FedTune, clients: int) -> dict[str, float]:
    """Bytes ``up`` and ``down`` of one asked client and round, in the mean over a run, and those of the whole ``run``.

    Headers are in, as are the entries that a client has missed while others were asked (so many that the weights would
    be smaller are overrated); the join and ``evaluate = "clients"`` are not. Of FedKRSO: the expected numbers of seeds
    ``drawn`` by a client, and ``used`` by at least one. FedSRD's uplink is that of max-sparsity.
    """
    config, shapes, rounds = strategy.config, strategy.shapes, strategy.config.num_server_rounds
    asked = sampled(config.fraction_train, clients)
    share = asked / clients
    reply, entry = strategy.reply_schema(config, shapes), strategy.entry_schema(config, shapes)
    if "head" not in reply.arrays:  # FedSRD's, where it is sparse: then the entries have none either
        entry = _only(entry, lambda name: name != "head")
    costs: dict[str, float] = {}
    if "s" in reply.limits:
        intervals = -(-config.local_steps // config.fedkrso.interval)
        costs["drawn"] = distinct_seeds(config.fedkrso.num_seeds, intervals)
        costs["used"] = distinct_seeds(config.fedkrso.num_seeds, intervals * asked)
    factor = (shapes.outputs(config.lora.rank) + shapes.inputs(config.lora.rank)) / 2  # B and A take turns
    moved = factor + (shapes.head if config.fedsrd.sparsify_head else 0)
    up = {"s": costs.get("drawn", 0), "v": _survivors(config, shapes)}
    down = {"s": costs.get("used", 0), "v": moved * (1 - config.fedsrd.download_sparsity)}

    figures = MetricRecord({"num-examples": 1, "train-loss": 0.5, "train-seconds": 1.0, "peak-bytes": 1})
    answer = RecordDict({"status": ConfigRecord({"version": 1}), "metrics": figures})
    costs["up"] = wire.measured_bytes(answer) + record_bytes(reply, up)

    question = wire.measured_bytes(strategy.message_content(0, "train", {"round": 1, **strategy.instructions(1)}))
    newest = record_bytes(entry, down)
    costs["down"] = question + newest
    if strategy.incremental:
        # Of several entries only the newest has a head. Entry 0 moves nothing; FedSRD's has no more than a head.
        headless = _only(entry, lambda name: name != "head")
        first = _only(strategy.entry_schema(config, shapes), lambda name: name == "head" or "s" in reply.limits)
        updates, latest = entries_heard(share, rounds), share * (rounds - 1)
        late = (1 - share) * (1 - (1 - share) ** (rounds - 1))  # first asked after round 1
        entries = share * record_bytes(first, {"s": 0}) + latest * newest
        entries += (updates - latest) * record_bytes(headless, down)
        entries += late * record_bytes(_only(first, lambda name: name != "head"), {"s": 0})
        costs["down"] = question + entries / (share * rounds)
    return {**costs, "run": rounds * asked * (costs["up"] + costs["down"])}


def record_bytes(schema: Schema, lengths: Mapping[str, float]) -> float:
    """Bytes that the arrays of ``schema`` add to a message, headers included, where letter x has length ``lengths[x]``.

    The headers are measured on arrays that are as small as can be without two being the same, which would go once.
    """

    def length(n: int | str) -> float:
        letter, _, parts = str(n).partition("/")
        value = n if isinstance(n, int) else lengths[letter]
        return math.ceil(value / int(parts)) if parts else value

    arrays = schema.encoded().arrays
    small = {
        name: np.zeros((1,) * (len(shape) - 1) + (i + 1,), dtype)
        for i, (name, (dtype, shape)) in enumerate(arrays.items())
    }
    headers = wire.measured_bytes(RecordDict({"entry-1": wire.pack(small)})) - wire.measured_bytes(RecordDict())
    headers -= sum(value.nbytes for value in small.values())
    return headers + sum(np.dtype(dtype).itemsize * math.prod(map(length, shape)) for dtype, shape in arrays.values())


def _only(schema: Schema, wanted: Callable[[str], bool]) -> Schema:
    return replace(schema, arrays={name: form for name, form in schema.arrays.items() if wanted(name)})


def _survivors(config: Config, shapes: Shapes) -> int:
    """Values that FedSRD's pruning leaves of an update at max-sparsity: those at or above the quantile of each matrix.
    Real updates come to max-sparsity: their scores are further from even than it takes."""
    r, rho = config.lora.rank, config.fedsrd.max_sparsity
    sizes = [side * r for shape in shapes.targets.values() for side in shape]
    sizes += [shapes.head] if config.fedsrd.sparsify_head and shapes.head else []
    return sum(size - math.ceil(rho * (size - 1)) for size in sizes)
