"""The clients of a round one after another beside all of them in one pass: time of a client's step, and peak memory.

    python -m benchmarks.clients [--size minilm] [--methods fedkrso,fedit] [--dtypes float32,bfloat16] [--clients 10]
                                 [--rows 16] [--tokens 96] [--steps 20] [--repeats 3] [--json]

RoBERTa's or MiniLM's shape, random weights and tokens, dropout on, one round of the app's own loop (a client's session,
optimizers and learning-rate schedule included), on the GPU if there is one. Both ways are measured in turn; the figure
is the median of ``--repeats`` rounds after one that is not counted.

ms one by one, ms in a pass   by the clock, of one client's step
×                             their ratio
MiB, ÷                        the most memory that tensors took in a pass, and its ratio to one client's (CUDA alone)
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import models
from fedkrso_app.config import Config
from fedkrso_app.core.stacked import Group
from fedkrso_app.federation.replica import Replica
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs.study import settings
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.base import Method, Shapes
from fedkrso_app.training import loop, together
from fedkrso_app.training.device import device, peak_bytes, reset_peak

PADDING = {"input_ids": 1}, False


def batches(client: int, rows: int, tokens: int) -> Iterator[dict[str, Tensor]]:
    """Random tokens without end."""
    generator = torch.Generator().manual_seed(client)
    while True:
        ids = torch.randint(5, 50000, (rows, tokens), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def one_by_one(replica: Replica, method: Method, config: Config, clients: int, rows: int, tokens: int) -> None:
    for client in range(clients):
        rng = np.random.default_rng(client)
        with replica.lend() as local, local.session({**method.instructions(1), "partition": client}, rng) as session:
            loop.train(local.module, batches(client, rows, tokens), session, config, rng)
            session.update()


def in_a_pass(replica: Replica, method: Method, config: Config, clients: int, rows: int, tokens: int) -> None:
    group, rngs = Group(clients), [np.random.default_rng(client) for client in range(clients)]
    with replica.lend() as local, local.stacked(group) as (halves, stacks), ExitStack() as contexts:
        sessions = [
            contexts.enter_context(half.session({**method.instructions(1), "partition": client}, rngs[client]))
            for client, half in enumerate(halves)
        ]
        each = [batches(client, rows, tokens) for client in range(clients)]
        together.train(local.module, each, sessions, group, stacks, config, rngs, PADDING)
        for session in sessions:
            session.update()


def row(size: str, strategy: str, dtype: str, clients: int, rows: int, tokens: int, steps: int, repeats: int) -> dict:
    """One method at one dtype, with a model of its own."""
    changes = {"strategy": strategy, "compute-dtype": dtype, "local-steps": steps, "fedkrso.interval": min(10, steps)}
    config = parse(settings(None, []) | changes)
    place = device(config.device)
    torch.manual_seed(0)
    module = models.classifier(size).to(place if config.on_device else "cpu")
    method = make(config, Shapes.of(models.loaded(module)))
    with tempfile.TemporaryDirectory() as folder:
        replica = Replica(method.local(models.loaded(module)), Ledger(Path(folder)), span=1)
        ways = {"one by one": one_by_one, "in a pass": in_a_pass}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        peaks: dict[str, int] = {}
        for repeat in range(repeats + 1):
            for way, call in ways.items():
                reset_peak(place)
                start = time.monotonic()
                call(replica, method, replace(config, local_steps=steps if repeat else 2), clients, rows, tokens)
                if place.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:
                    seconds[way].append(time.monotonic() - start)
                    peaks[way] = peak_bytes(place)
    ms = {way: 1000 * statistics.median(values) / (clients * steps) for way, values in seconds.items()}
    found: dict[str, Any] = {"method": strategy, "dtype": dtype, **{f"ms {way}": value for way, value in ms.items()}}
    found["×"] = ms["one by one"] / ms["in a pass"]
    if place.type == "cuda":
        found |= {"MiB": peaks["in a pass"] / 2**20, "÷": peaks["in a pass"] / peaks["one by one"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="minilm", choices=list(models.SIZES))
    parser.add_argument("--methods", default="fedkrso,fedit", help="that can share a pass, separated by commas")
    parser.add_argument("--dtypes", default="float32", help="float32,bfloat16")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rows", type=int, default=16, help="examples in a client's batch")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each")
    parser.add_argument("--steps", type=int, default=20, help="of each client")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    found = [
        row(a.size, method, dtype, a.clients, a.rows, a.tokens, a.steps, a.repeats)
        for dtype in a.dtypes.split(",")
        for method in a.methods.split(",")
    ]
    title = f"{a.clients} clients, {a.size}, batch {a.rows} × {a.tokens}, {a.steps} steps, on {device('auto')}"
    models.show(title, found, a.json)


if __name__ == "__main__":
    main()
