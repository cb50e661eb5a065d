"""The clients of a round one by one and in one pass, by steps that are captured and not: time, and the most memory.

    python -m benchmarks.engine [--sizes minilm,base] [--methods fedkrso,fedit,fedfft] [--dtypes float32,bfloat16]
                                [--clients 10] [--alone 2] [--rows 16] [--tokens 128] [--steps 50] [--repeats 1]
                                [--json]

RoBERTa's or MiniLM's shape, random weights and tokens, dropout on, one round of the app's own loop: a client's
session, its batches, optimizers, learning-rate schedule and intervals, and for captured steps the capture too. On the
GPU if there is one; without CUDA no step is captured. A method whose clients share nothing has no pass. Each figure is
the median of ``--repeats`` rounds, after a short one that is not counted; one by one, ``--alone`` clients are measured.

eager       ms per client step by the clock, one by one: what a run does on a CPU, and on a GPU with batch-clients = 1
captured    the same, by captured steps
pass        --clients in one pass
both        the same, by captured steps
×           eager divided by that
busy        ms per client step of one client, captured: the sum of its kernels' own times, by torch's profiler
wait        captured divided by busy: 1 is a GPU that never waits for its host
MiB         the most memory in a pass, captured or not ("both"), and its ratio to weights + N · (what one client adds)
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import models
from fedkrso_app.config import Config
from fedkrso_app.core.stacked import Group, Unstackable
from fedkrso_app.federation.replica import Replica
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs.study import settings
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.base import Method
from fedkrso_app.training import loop, static, together
from fedkrso_app.training.device import device, module_of, peak_bytes, release, reset_peak
from fedkrso_app.training.graphs import Graphs
from fedkrso_app.training.shapes import Shapes
from fedkrso_app.training.static import Recorder

PADDING = {"input_ids": 1}, False
MIB = 2**20


def batches(client: int, rows: int, tokens: int) -> Iterator[dict[str, Tensor]]:
    """Random tokens without end."""
    generator = torch.Generator().manual_seed(client)
    while True:
        ids = torch.randint(5, 50000, (rows, tokens), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def one_by_one(
    replica: Replica, method: Method, config: Config, clients: int, tokens: int, recorder: Recorder | None
) -> None:
    for client in range(clients):
        rng = np.random.default_rng(client)
        with replica.lend() as local, local.session({**method.instructions(1), "partition": client}, rng) as session:
            own = batches(client, config.batch_size, tokens)
            if recorder:
                given = [own], [session], Group(1), [], config, [rng], PADDING, tokens
                static.train(local.module, *given, recorder)
            else:
                loop.train(local.module, own, session, config, rng)
            session.update()


def in_a_pass(
    replica: Replica, method: Method, config: Config, clients: int, tokens: int, recorder: Recorder | None
) -> None:
    group, rngs = Group(clients), [np.random.default_rng(client) for client in range(clients)]
    with replica.lend() as local, local.stacked(group) as (halves, stacks), ExitStack() as contexts:
        sessions = [
            contexts.enter_context(half.session({**method.instructions(1), "partition": client}, rngs[client]))
            for client, half in enumerate(halves)
        ]
        each = [batches(client, config.batch_size, tokens) for client in range(clients)]
        given = local.module, each, sessions, group, stacks, config, rngs, PADDING
        if recorder:
            static.train(*given, tokens, recorder)
        else:
            together.train(*given)
        for session in sessions:
            session.update()


WAYS: dict[str, tuple[Callable[..., None], bool]] = {  # and whether steps are captured
    "eager": (one_by_one, False),
    "captured": (one_by_one, True),
    "pass": (in_a_pass, False),
    "both": (in_a_pass, True),
}


def row(
    size: str, strategy: str, dtype: str, shape: tuple[int, int], counts: tuple[int, int], steps: int, repeats: int,
    recorder: Recorder | None,
) -> dict[str, Any]:  # fmt: skip
    """One method at one dtype, with a model of its own. ``shape``: rows and tokens of a batch; ``counts``: clients one
    by one and in a pass. Without ``recorder``, no steps are captured."""
    changes = {"strategy": strategy, "compute-dtype": dtype, "local-steps": steps, "batch-size": shape[0]}
    config = parse(settings(None, []) | changes | {"fedkrso.interval": min(10, steps)})
    place = device(config.device)
    torch.manual_seed(0)
    module = models.classifier(size).to(place if config.on_device else "cpu")
    method = make(config, Shapes.of(models.loaded(module)))
    found: dict[str, Any] = {"model": size, "method": strategy, "dtype": dtype}
    extra: dict[str, int] = {}  # bytes beyond the weights
    with tempfile.TemporaryDirectory() as folder:
        replica = Replica(method.local(models.loaded(module)), Ledger(Path(folder)), span=1)
        with replica.lend():
            weights = allocated(place)

        def round_of(way: str, steps: int) -> float:
            call, captured = WAYS[way]
            clients, start = counts[call is in_a_pass], time.monotonic()
            given = replica, method, replace(config, local_steps=steps), clients, shape[1]
            call(*given, recorder if captured else None)
            _finish(place)
            return 1000 * (time.monotonic() - start) / (clients * steps)

        for way, (_, captured) in WAYS.items():
            if captured and recorder is None:
                continue
            try:
                round_of(way, min(steps, 3))
            except Unstackable:
                continue
            reset_peak(place)
            found[way] = statistics.median(round_of(way, steps) for _ in range(repeats))
            extra[way] = peak_bytes(place) - weights
            if way != "eager":
                found[f"× {way}"] = found["eager"] / found[way]
            release(place)
        if place.type == "cuda":
            found["busy"] = busy(lambda: round_of("captured", steps)) / (counts[0] * steps)
            found["wait"] = found["captured"] / found["busy"]
            if "both" in found:
                found["MiB"] = (weights + extra["both"]) / MIB
                found["÷"] = (weights + extra["both"]) / (weights + counts[1] * extra["captured"])
        if recorder and recorder.record is None and place.type == "cuda":
            raise RuntimeError(f"{size}, {strategy}, {dtype}: no step was captured; the log says why")
    return found


def busy(call: Callable[[], Any]) -> float:
    """Milliseconds of all kernels of a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e3


def allocated(place: torch.device) -> int:
    _finish(place)
    return torch.cuda.memory_allocated() if place.type == "cuda" else 0


def _finish(place: torch.device) -> None:
    if place.type != "cpu":
        module_of(place).synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="minilm,base", help=",".join(models.SIZES))
    parser.add_argument("--methods", default="fedkrso,fedit,fedfft", help="separated by commas")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="float32,bfloat16")
    parser.add_argument("--clients", type=int, default=10, help="in a pass")
    parser.add_argument("--alone", type=int, default=2, help="clients one by one")
    parser.add_argument("--rows", type=int, default=16, help="examples in a client's batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each")
    parser.add_argument("--steps", type=int, default=50, help="of each client")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    place, shown = device("auto"), []
    for size in a.sizes.split(","):
        for dtype in a.dtypes.split(","):
            for method in a.methods.split(","):
                recorder = Graphs(place) if place.type == "cuda" else None
                shape, counts = (a.rows, a.tokens), (a.alone, a.clients)
                shown.append(row(size, method, dtype, shape, counts, a.steps, a.repeats, recorder))
                print(shown[-1], file=sys.stderr, flush=True)  # the table comes at the end, or never
                gc.collect()
                release(place)
    keys = dict.fromkeys(key for each in shown for key in each)
    name = torch.cuda.get_device_name() if place.type == "cuda" else str(place)
    title = f"{a.clients} clients, batch {a.rows} × {a.tokens}, {a.steps} steps, on {name}"
    models.show(title, [{key: each.get(key, "") for key in keys} for each in shown], a.json)


if __name__ == "__main__":
    main()
