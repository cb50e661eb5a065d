"""The clients of a round one by one and in one pass, by steps that are captured and not: time, and the most memory.

    python -m benchmarks.engine [--sizes minilm,base] [--alone large] [--methods fedkrso,fedit,fedfft]
                                [--dtypes bfloat16,float32] [--clients 10] [--rows 16] [--tokens 128] [--steps 50]
                                [--minutes 9] [--output engine.jsonl] [--json]

RoBERTa's or MiniLM's shape, random weights and tokens, dropout on, one round of the app's own loop: a client's
session, its batches, optimizers, learning-rate schedule and intervals, and for captured steps the capture too. On the
GPU if there is one; without CUDA no step is captured. A method whose clients share nothing has no pass. One by one,
two clients are measured; of the sizes of ``--alone``, FedKRSO's alone.

eager       ms per client step by the clock, one by one: what a run does on a CPU, and on a GPU with batch-clients = 1
captured    the same, by captured steps
pass        --clients in one pass
both        the same, by captured steps
×           eager divided by that
busy        ms per client step of one client, captured: the sum of its kernels' own times, by torch's profiler
wait        captured divided by busy: 1 is a GPU that never waits for its host
MiB         the most memory in a pass, captured or not ("both"), and its ratio to weights + N · (what one client adds)
failed      what could not be measured, and why

Each row is measured in a process of its own, after a short round that does not count, and written to ``--output`` as
soon as it is known; rows that are there already, and whole, are not measured again. No row begins after ``--minutes``.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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
SETTING = ("device", "clients", "batch", "steps")  # of a line; the table has them in its title


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


ALONE = 2  # clients that are measured one by one


def row(
    size: str, strategy: str, dtype: str, ways: Sequence[str], shape: tuple[int, int], clients: int, steps: int,
    recorder: Recorder | None,
) -> dict[str, Any]:  # fmt: skip
    """One method at one dtype, with a model of its own. ``shape``: rows and tokens of a batch; ``clients`` in a pass.
    Without ``recorder``, no steps are captured."""
    changes = {"strategy": strategy, "compute-dtype": dtype, "local-steps": steps, "batch-size": shape[0]}
    config = parse(settings(None, []) | changes | {"fedkrso.interval": min(10, steps)})
    place = device(config.device)
    torch.manual_seed(0)
    module = models.classifier(size).to(place if config.on_device else "cpu")
    method = make(config, Shapes.of(models.loaded(module)))
    found: dict[str, Any] = {"model": size, "method": strategy, "dtype": dtype}
    failed: list[str] = []
    extra: dict[str, int] = {}  # bytes beyond the weights
    with tempfile.TemporaryDirectory() as folder:
        replica = Replica(method.local(models.loaded(module)), Ledger(Path(folder)), span=1)
        with replica.lend():
            weights = allocated(place)

        def round_of(way: str, steps: int) -> float:
            call, captured = WAYS[way]
            count, start = clients if call is in_a_pass else ALONE, time.monotonic()
            given = replica, method, replace(config, local_steps=steps), count, shape[1]
            call(*given, recorder if captured else None)
            _finish(place)
            return 1000 * (time.monotonic() - start) / (count * steps)

        for way in ways:
            if WAYS[way][1] and recorder is None:
                continue
            try:
                round_of(way, min(steps, 3))
                reset_peak(place)
                found[way] = round_of(way, steps)
                extra[way] = peak_bytes(place) - weights
                if WAYS[way][1] and recorder and recorder.record is None:
                    raise RuntimeError("no step was captured; the log says why")
            except Unstackable:
                continue
            except Exception as error:  # the other ways may work
                failed.append(f"{way}: {type(error).__name__}: {error}".splitlines()[0])
                continue
            finally:
                release(place)
            if way != "eager" and "eager" in found:
                found[f"× {way}"] = found["eager"] / found[way]
            print(f"{size}, {strategy}, {dtype}, {way}: {found[way]:.3g} ms", file=sys.stderr, flush=True)
        if place.type == "cuda" and "captured" in found:
            try:
                found["busy"] = busy(lambda: round_of("captured", steps)) / (ALONE * steps)
                found["wait"] = found["captured"] / found["busy"]
            except Exception as error:
                failed.append(f"busy: {type(error).__name__}: {error}".splitlines()[0])
        if place.type == "cuda" and {"captured", "both"} <= extra.keys():
            found["MiB"] = (weights + extra["both"]) / MIB
            found["÷"] = (weights + extra["both"]) / (weights + clients * extra["captured"])
    return found | ({"failed": "; ".join(failed)} if failed else {})


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


Case = tuple[str, str, str]  # size, method, dtype


def cases(sizes: Sequence[str], alone: Sequence[str], methods: Sequence[str], dtypes: Sequence[str]) -> dict[Case, Any]:
    """Each row with what is measured of it, the slowest hosts first."""
    every = {(size, method, dtype): tuple(WAYS) for dtype in dtypes for method in methods for size in sizes}
    return every | {(size, "fedkrso", dtype): ("eager", "captured") for dtype in dtypes for size in alone}


def measured(case: Case, ways: Sequence[str], shape: tuple[int, int], clients: int, steps: int, file: Path) -> None:
    """A row's process: append it to ``file``."""
    place = device("auto")
    name = torch.cuda.get_device_name() if place.type == "cuda" else str(place)
    setting = {"device": name, "clients": clients, "batch": f"{shape[0]} × {shape[1]}", "steps": steps}
    found = row(*case, ways, shape, clients, steps, Graphs(place) if place.type == "cuda" else None)
    write(file, setting | found)


def write(file: Path, found: dict[str, Any]) -> None:
    with open(file, "a") as lines:
        lines.write(json.dumps(found, ensure_ascii=False) + "\n")


def read(file: Path) -> dict[Case, dict[str, Any]]:
    """The rows of a file; of those that were measured twice, the last."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {(line["model"], line["method"], line["dtype"]): line for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="minilm,base", help=",".join(models.SIZES))
    parser.add_argument("--alone", default="large", help="sizes that are measured one client at a time; '' for none")
    parser.add_argument("--methods", default="fedkrso,fedit,fedfft", help="separated by commas")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="bfloat16,float32")
    parser.add_argument("--clients", type=int, default=10, help="in a pass")
    parser.add_argument("--rows", type=int, default=16, help="examples in a client's batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each")
    parser.add_argument("--steps", type=int, default=50, help="of each client")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which no row begins")
    parser.add_argument("--output", type=Path, default=Path("engine.jsonl"), help="a row a line, as they come")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    end = time.monotonic() + 60 * a.minutes
    sizes, alone, methods, dtypes = (
        [part for part in x.split(",") if part] for x in (a.sizes, a.alone, a.methods, a.dtypes)
    )
    wanted = cases(sizes, alone, methods, dtypes)
    processes = multiprocessing.get_context("forkserver")  # imports are made once, and no process begins with CUDA
    processes.set_forkserver_preload(["benchmarks.models", "fedkrso_app.runs.study", "fedkrso_app.training.static"])
    for number, (case, ways) in enumerate(wanted.items(), 1):
        if "failed" not in read(a.output).get(case, {"failed": ""}) or time.monotonic() > end:
            continue
        print(f"{number}/{len(wanted)}: {', '.join(case)}", file=sys.stderr, flush=True)
        process = processes.Process(
            target=measured, args=(case, ways, (a.rows, a.tokens), a.clients, a.steps, a.output)
        )
        process.start()
        process.join(max(60.0, end - time.monotonic()))
        process.kill()
        process.join()
        if process.exitcode:
            reason = f"the process ended with {process.exitcode}"
            write(a.output, dict(zip(("model", "method", "dtype"), case, strict=True)) | {"failed": reason})
    found = read(a.output)
    shown = [{k: v for k, v in found[case].items() if k not in SETTING} for case in wanted if case in found]
    keys = dict.fromkeys(key for each in shown for key in each)
    names = " / ".join(dict.fromkeys(found[case].get("device", "?") for case in wanted if case in found))
    title = f"{a.clients} clients, batch {a.rows} × {a.tokens}, {a.steps} steps, on {names}"
    if left := [", ".join(case) for case in wanted if case not in found]:
        print(f"not measured, for lack of time: {'; '.join(left)}", file=sys.stderr)
    models.show(title, [{key: each.get(key, "") for key in keys} for each in shown], a.json)


if __name__ == "__main__":
    main()
