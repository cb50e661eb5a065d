"""What a run will cost before it starts: trained parameters, bytes and a client's memory, from shapes alone.

The model is built from its config.json on torch's meta device, where a tensor has a shape and no memory, and each
method trains it there for two steps, for its memory to be counted. Bytes follow from the schemas of the wire and from
what the sampling of clients and seeds leads to on average.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import RecordDict
from torch import Tensor

from fedkrso_app import data
from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core.accounting import Releases, can_sample, epsilon
from fedkrso_app.core.stacked import Unstackable
from fedkrso_app.federation import memory
from fedkrso_app.federation.nodes import sampled
from fedkrso_app.records import protocol, wire
from fedkrso_app.records.protocol import EVALUATE, TALLY, TRAIN, Figures, Instructions, Status
from fedkrso_app.records.schema import Schema
from fedkrso_app.runs.sealed import with_masks
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.base import Local, Method
from fedkrso_app.strategies.privacy import Privacy, noise_over_clip
from fedkrso_app.training import metrics, model
from fedkrso_app.training.shapes import Shapes
from fedkrso_app.training.together import at_once

_CLIENTS_ROWS = (200, 500, 1000, 2000, 5000, 10000, 50000)


def plan(settings: Mapping[str, Any], strategies: Sequence[str], clients: int) -> dict[str, Any]:
    """What ``fedkrso plan`` prints, one row per method: numbers, bytes, and memory by ``activation-memory``.

    A setting whose memory cannot be counted is in the row's ``refused``, with the reason; a method that does not go
    with model or settings is in ``left_out``, if others do. ``settings`` is a flat run config, ``clients`` the size of
    the federation. Raises ConfigError where the settings are wrong, or where the task's number of labels is unknown.
    """
    halves: dict[type, Any] = {}  # the client's half -> its memory: two methods may share it
    rows, left_out = [], dict[str, str]()
    with model.quiet():
        for name in strategies:
            try:
                rows.append(_row(parse({**settings, "strategy": name}), clients, halves))
            except ConfigError as error:
                left_out[name] = str(error)
    if not rows:
        raise ConfigError(next(iter(left_out.values())))
    config = parse({**settings, "strategy": rows[0]["strategy"]})
    return {
        "model": config.model,
        "task": config.task,
        "head": config.head,
        "evaluate": config.evaluate,
        "clients": clients,
        "sampled": sampled(config.fraction_train, clients),
        "rounds": config.num_server_rounds,
        "counted_as": "GPU" if config.device == "cuda" else "CPU",
        "rows": rows,
        "left_out": left_out,
        "epsilon": epsilon_by_rows(config),
        "client_epsilon": epsilon_of_clients(config),
    }


def epsilon_of_clients(config: Config) -> float | None:
    """ε of a run that protects each client, for one that is asked in every round; None for other runs, unless they have
    a noise and no unit yet."""
    own = config.of(Privacy)
    if own.unit == "example" or not own.noise:
        return None
    return epsilon([Releases(own.noise, count=config.num_server_rounds)], own.delta)


def epsilon_by_rows(config: Config) -> dict[int, float]:
    """ε of a run that protects each example, by the number of rows of a client that is asked in every round; for the
    numbers that ``privacy.delta`` says something about. Empty for other runs, unless they have a noise and no unit
    yet."""
    own = config.of(Privacy)
    if own.unit == "client" or not own.noise or not can_sample():
        return {}
    batch, steps = config.batch_size * config.gradient_accumulation, config.num_server_rounds * config.local_steps
    return {
        rows: epsilon([Releases(own.noise, min(1.0, batch / rows), steps)], own.delta)
        for rows in _CLIENTS_ROWS
        if own.delta * rows < 1
    }


def _row(config: Config, clients: int, halves: dict[type, Any]) -> dict[str, Any]:
    task = data.resolve(config, look=bool(config.data_dir or config.dataset))
    loaded = model.outline(config.model, task.num_labels, config.head)
    shapes = Shapes.of(loaded)
    if make(config, shapes, judged=False).reply.named("personal") and config.evaluate == "server":
        config = replace(config, evaluate="clients")  # as it must be
    method = make(config, shapes)
    costs, lengths = traffic(method, clients, metrics.tally_size(task.metric, task.num_labels))
    local, inputs = memory.prepared(method, loaded, task)
    if method.half not in halves:
        halves[method.half] = memory.client_memory(method, local, inputs, config.device == "cuda")
    memories, refused = halves[method.half]
    later = method.client_bytes(lengths)
    memories = {setting: replace(found, later=later) for setting, found in memories.items()}
    kinds = ("weights", "gradients", "optimizer", "aside", "activations", "peak", "total")
    table = {
        setting: {kind: getattr(found, kind) for kind in kinds} | {"optimizer": found.optimizer + later}
        for setting, found in memories.items()
    }
    if config.of(Privacy).unit == "client":
        size = sum(math.prod(shape) for shape in method.layout(1, method.turns()[0]).values())
        costs["noise_over_clip"] = noise_over_clip(
            config.of(Privacy).noise, size, sampled(config.fraction_train, clients)
        )
    trained = next((found.trained for found in memories.values()), None)
    return {
        "strategy": config.strategy,
        "evaluate": config.evaluate,
        "parameters": shapes.parameters,
        "trained": trained,
        "moved": sum(tensor.numel() for tensor in local.shared()),
        **costs,
        "memory": table,
        "refused": refused,
        "pass": together(method, local, inputs),
    }


def together(method: Method, local: Local, inputs: Mapping[str, Tensor]) -> dict[str, int] | None:
    """The most memory of a node's clients that train in one pass; None where they take turns."""
    config = local.config
    clients = min(config.clients_per_node, at_once(config, "cuda" if config.device == "cuda" else "cpu"))
    if clients == 1 or config.few_bits:
        return None
    try:
        total, _ = memory.pass_memory(method, local, inputs, clients, config.device == "cuda")
    except Unstackable:
        return None
    return {"clients": clients, "total": total}


def entries_received(share: float, rounds: int) -> float:
    """Expected number of entries 1, 2, … that one client is sent in a run, when each round asks a ``share`` of them.

    Round t brings a client up to entry t − 1. So it is sent entry v unless no round after round v asks it.
    """
    return sum(1 - (1 - share) ** left for left in range(1, rounds))


def traffic(method: Method, clients: int, tally: int) -> tuple[dict[str, float], Mapping[str, float]]:
    """Bytes ``up`` and ``down`` per asked client and round, in the mean over a run, and those of the whole ``run``.

    Headers are included, as are the entries that a client has missed while others were asked (so many that the weights
    would be smaller are overrated); the join is not. With ``evaluate = "clients"`` each client also sends ``tally``
    float64 and gets the round's entry to judge it. The method adds what it expects, for instance numbers of seeds. Also
    returns the lengths expected in a reply.
    """
    config, rounds = method.config, method.config.num_server_rounds
    asked = sampled(config.fraction_train, clients)
    share = asked / clients
    up, down, costs = method.expected(asked)

    answer = protocol.trained(Status(1), wire.pack({}), Figures(1000, 0.5, 1.0, 2**30))  # numbers of the usual size
    answer.pop(protocol.UPDATE)
    reply = wire.measured_bytes(answer) + usual_bytes(method.reply.travelling, up)
    costs = {**costs, "up": reply}

    instructions = Instructions("0" * 16, 0, "0" * 64, round=1, method=method.instructions(1))
    question = wire.measured_bytes(RecordDict({TRAIN: instructions.record()}))
    entry = method.entry.travelling
    first, newest = entry.start, usual_bytes(entry, down)
    if config.evaluate != "server":
        first = first.only([])  # a server without a model leaves the start to the seed
    judged = config.evaluate == "clients"
    if judged:
        answer = RecordDict({"status": Status(1).record(), TALLY: wire.pack({"tally": np.zeros(tally)})})
        costs["up"] += wire.measured_bytes(answer)
        question += wire.measured_bytes(RecordDict({EVALUATE: replace(instructions, round=0, method={}).record()}))
    # Whoever has judged a round has its entry when it trains next.
    later = newest * (1 - share) if judged else newest
    entries = share * (record_bytes(first, down) + (rounds - 1) * later + rounds * judged * newest)
    for missed in range(1, entry.span or 1):
        # Who was not asked in the rounds before lacks what the newest entry does not replace.
        alone = [record_bytes(entry.only([name]), down) for name in entry.in_turn]
        entries += share * (rounds - 1) * (1 - share) ** (missed + judged) * sum(alone) / len(alone)
    if entry.span is None:
        # Of several entries only the newest has its states.
        (steady,) = entry.usual
        older, oldest = steady.only(entry.named("update", "key")), first.only(set(first.fields) - set(steady.fields))
        updates, latest = entries_received(share, rounds + judged), share * (rounds + judged - 1)
        late = (1 - share) * (1 - (1 - share) ** (rounds - 1))  # first asked after round 1
        entries = share * record_bytes(first, down) + latest * newest
        entries += (updates - latest) * record_bytes(older, down) + late * record_bytes(oldest, down)
    costs["down"] = question + entries / (share * rounds)
    if config.secure_aggregation:
        return with_masks(costs, method, clients, tally if judged else 0), up
    return {**costs, "run": rounds * asked * (costs["up"] + costs["down"])}, up


def usual_bytes(schema: Schema, lengths: Mapping[str, float]) -> float:
    """:func:`record_bytes` of an entry after the first, or of a reply; of arrays that take turns, the mean."""
    kinds = schema.usual
    return sum(record_bytes(kind, lengths) for kind in kinds) / len(kinds)


def record_bytes(schema: Schema, lengths: Mapping[str, float]) -> float:
    """Bytes that the arrays of ``schema`` add to a message, headers included, where letter x has length ``lengths[x]``.

    The headers are measured on arrays that are as small as can be without two being the same, which would go once.
    """

    def length(n: int | str) -> float:
        letter, _, parts = str(n).partition("/")
        value = n if isinstance(n, int) else lengths[letter]
        return math.ceil(value / int(parts)) if parts else value

    fields = schema.encoded().fields
    small = {
        name: np.zeros((1,) * (len(f.shape) - 1) + (i + 1,), f.dtype) for i, (name, f) in enumerate(fields.items())
    }
    headers = wire.measured_bytes(RecordDict({"entry-1": wire.pack(small)})) - wire.measured_bytes(RecordDict())
    headers -= sum(value.nbytes for value in small.values())
    return headers + sum(np.dtype(f.dtype).itemsize * math.prod(map(length, f.shape)) for f in fields.values())
