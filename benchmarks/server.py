"""The server's average of N replies: time and memory as N grows, beside a bare numpy sum of the same arrays.

    python -m benchmarks.server [--size base] [--clients 10 100 1000] [--json]

FedKRSO on RoBERTa shapes, K = 10 seeds in every reply, r = 4. A generator makes the replies one at a time, outside
the clock. CPU milliseconds of one thread per reply, every reply handled in all these ways:

aggregate    Round.aggregate_train: counting bytes, checking, decoding, adding, and at the end one ledger entry
add          FixedPointMeans.add alone: the sum whose bits do not depend on the order
sum64        total += x with a float64 total: as wide as the exact sum, but its bits depend on the order
sum32        total += x with a float32 total

"peak MiB" is the maximum that Python and numpy held, the current reply included, in a second pass
(tracemalloc is slow).
"""

import argparse
import logging
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.models import classifier, loaded, show
from fedkrso_app.core.fixed_point import FixedPointMeans
from fedkrso_app.federation.exchange import no_figures
from fedkrso_app.federation.nodes import Nodes
from fedkrso_app.federation.published import Published
from fedkrso_app.federation.round import Round
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Entry, Ledger
from fedkrso_app.records.protocol import Figures, Status, trained
from fedkrso_app.runs.compare import settings
from fedkrso_app.strategies import parse
from fedkrso_app.strategies.fedkrso import FedKRSO
from fedkrso_app.training.shapes import Shapes

Arrays = dict[str, np.ndarray]
_POOL = 4  # different replies; each is packed anew whenever it is its turn


def rows(size: str, clients: list[int]) -> list[dict[str, Any]]:
    """One row per number of clients."""
    with torch.device("meta"):
        module = classifier(size)
    shapes = Shapes.of(loaded(module))
    config = parse(settings(None, []) | {"local-steps": 100, "fedkrso.interval": 10})
    method = FedKRSO(config, shapes)
    seeds, rng = method.pool(1), np.random.default_rng(0)
    shape = (len(seeds), shapes.outputs(method.own.rank))
    pool = [
        {
            "seeds": seeds,
            "accumulators": rng.standard_normal(shape, dtype=np.float32) * np.float32(1e-2),
            "head": rng.standard_normal(shapes.head, dtype=np.float32) * np.float32(1e-2),
        }
        for _ in range(_POOL)
    ]
    return [{"clients": count, **_time(method, pool, count)} for count in clients]


def _time(method: FedKRSO, pool: list[Arrays], clients: int) -> dict[str, float]:
    """Milliseconds per reply, the ratios, and the peak."""
    others = _others(pool[0])
    seconds = dict.fromkeys(("aggregate", *others), 0.0)

    def beside(arrays: Arrays) -> None:
        for name, call in others.items():
            start = time.process_time()
            call(arrays)
            seconds[name] += time.process_time() - start

    seconds["aggregate"] = _aggregate(method, pool, clients, beside)
    tracemalloc.start()
    _aggregate(method, pool, clients, lambda arrays: None)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return {
        **{f"{name} ms": value / clients * 1e3 for name, value in seconds.items()},
        "sum64 ÷ add": seconds["sum64"] / seconds["add"],
        "sum32 ÷ add": seconds["sum32"] / seconds["add"],
        "peak MiB": peak,
    }


def _others(some: Arrays) -> dict[str, Callable[[Arrays], None]]:
    """The three sums by name. Their totals exist, and are in memory, before the clock runs."""
    means = FixedPointMeans()

    def add(arrays: Arrays) -> None:
        means.add({**dict(enumerate(arrays["accumulators"])), "head": arrays["head"]}, 1)

    def bare(dtype: type) -> Callable[[Arrays], None]:
        totals = {name: np.ones(some[name].shape, dtype) for name in ("accumulators", "head")}

        def sum_up(arrays: Arrays) -> None:
            for name, total in totals.items():
                total += arrays[name]

        return sum_up

    add(some)
    return {"add": add, "sum64": bare(np.float64), "sum32": bare(np.float32)}


def _aggregate(method: FedKRSO, pool: list[Arrays], clients: int, beside: Callable[[Arrays], None]) -> float:
    """CPU seconds of ``aggregate_train`` over ``clients`` replies, without making them and without ``beside``."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # Flower sets them inside a run
    elsewhere = 0.0

    def replies(asked: list[Message]) -> Iterator[Message]:
        nonlocal elsewhere
        for number, message in enumerate(asked):
            start = time.process_time()
            arrays = pool[number % len(pool)]
            beside(arrays)
            content = trained(Status(0), wire.pack(arrays), Figures(1, 0.5, 1.0, 1))
            reply = Message(content, reply_to=message)
            del content
            elsewhere += time.process_time() - start
            yield reply
            del reply

    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        ledger.append(Entry(0, {}, no_figures()))
        nodes = Nodes("", "0" * 16, 60.0, ledger)
        published = Published(method, [], ledger, Ledger(Path(folder) / "server"), lambda: None)
        strategy = Round(published, nodes, host=None)  # type: ignore[arg-type]
        asked = []
        for node in range(clients):
            message = Message(RecordDict(), node, "train")
            message.metadata.__dict__["_message_id"] = str(node)  # as Flower's grid does when it sends
            asked.append(message)
        # What configure_train leaves behind once the messages are out.
        strategy.round, strategy._started = 1, time.monotonic()
        exchange = strategy._exchange
        exchange._asked, exchange._training = [(message, (node, [node])) for node, message in enumerate(asked)], True
        strategy.nodes.partitions = {node: (node,) for node in range(clients)}
        strategy.begin({node: [node] for node in range(clients)})
        strategy._grid = None
        start = time.process_time()
        strategy.aggregate_train(1, replies(asked))
        total = time.process_time() - start
        if ledger.version != 1 or ledger.read(1).record["clients"] != clients:
            raise RuntimeError("not every reply was counted")
    return total - elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="base", choices=["tiny", "base", "large"])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    show(f"Averaging replies of RoBERTa-{a.size}, K = 10, one thread", rows(a.size, a.clients), a.json)


if __name__ == "__main__":
    main()
