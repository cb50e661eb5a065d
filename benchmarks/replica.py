"""What it costs to rebuild W^t after a missed round, beside the memory traffic that no rebuild avoids.

    python -m benchmarks.replica [--size base] [--missed 3] [--repeats 5] [--json]

FedKRSO on RoBERTa shapes, all K = 10 seeds used, r = 4. CPU seconds of one thread per missed round:

bandwidth    read and write every target weight once (W ← c·W, in place): the limit of any rebuild
advance      Replica.advance over the ledger's entries: reading and checking an entry, drawing, folding
apply        the same without the ledger: drawing and folding
draw         the projections alone: numpy's Philox and Box–Muller, K for every layer
fold         W ← W + Σ_k B_k P_k alone, with the projections given
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import classifier, head_of, loaded, medians, show
from fedkrso_app.core.projection import projections
from fedkrso_app.core.subspace import fold, matrix
from fedkrso_app.federation.replica import Replica
from fedkrso_app.records.ledger import Entry, Ledger
from fedkrso_app.runs.compare import settings
from fedkrso_app.strategies import parse
from fedkrso_app.strategies.fedkrso import FedKRSOLocal, FedKRSOSettings, draw_seeds


class _Products(TorchDispatchMode):
    """Counts matrix products that add in place."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def rows(size: str, missed: int, repeats: int) -> list[dict[str, Any]]:
    """One row per part: CPU seconds per round, the ratio to the bandwidth limit, and matrix products per round."""
    config = parse(settings(None, []))
    own = config.of(FedKRSOSettings)
    K, r, kind = own.num_seeds, own.rank, own.projection
    module = classifier(size)
    head = head_of(module)
    local = FedKRSOLocal(loaded(module), config)
    weights = {name: matrix(layer) for name, layer in local.targets.items()}
    rng = np.random.default_rng(0)
    Q = r * sum(W.shape[0] for W in weights.values())

    def update(version: int) -> dict[str, np.ndarray]:
        B = rng.standard_normal((K, Q), dtype=np.float32) * np.float32(1e-6)
        h = sum(p.numel() for p in head.values())
        return {"seeds": draw_seeds(0, version, K), "accumulators": B, "head": np.zeros(h, np.float32)}

    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        for version in range(missed + 1):
            ledger.append(Entry(version, update(version) if version else local.state()))
        replica = Replica(local, ledger, span=None)
        entry = update(1)
        seeds = entry["seeds"].tolist()

        def draw() -> dict[str, np.ndarray]:
            return {name: projections(seeds, name, r, W.shape[1], kind) for name, W in weights.items()}

        Ps = {name: torch.from_numpy(P) for name, P in draw().items()}
        Bs = {name: torch.randn(K, W.shape[0], r) * 1e-6 for name, W in weights.items()}

        def advance() -> None:
            replica.version = 0
            replica.advance(missed)

        def bandwidth() -> None:
            for W in weights.values():
                W.mul_(0.999999)

        def fold_all() -> None:
            for name, W in weights.items():
                fold(W, Bs[name], Ps[name])

        calls = {
            "bandwidth": bandwidth,
            "advance": advance,
            "apply": lambda: local.apply(entry),
            "draw": draw,
            "fold": fold_all,
        }
        seconds = medians(calls, repeats)
        seconds["advance"] /= missed
        products = {}
        for name, call in calls.items():
            with _Products() as counter:
                call()
            products[name] = counter.count["aten.addmm_.default"] // (missed if name == "advance" else 1)
    return [
        {"part": name, "seconds": value, "÷ bandwidth": value / seconds["bandwidth"], "products": products[name]}
        for name, value in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="base", choices=["tiny", "base", "large"])
    parser.add_argument("--missed", type=int, default=3, help="rounds that the replica lacks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    title = f"Rebuilding W^t of RoBERTa-{a.size}, one missed round, one thread"
    show(title, rows(a.size, a.missed, a.repeats), a.json)


if __name__ == "__main__":
    main()
