"""One local step of FedKRSO beside its peers: CPU time of one thread, interleaved medians, as a ratio to the floor.

    python -m benchmarks.step [--size base] [--rows 8] [--tokens 64] [--repeats 5] [--json]

RoBERTa shapes, random weights, random tokens; the peers are those of benchmarks/models.py. FedKRSO has one
row per setting of ``activation-memory``; each includes a tenth of what starts an interval (J = 10): drawing the
projections.
"""

import argparse
import functools
from typing import Any

import torch

from benchmarks.models import PEERS, Peer, batch, classifier, medians, show
from fedkrso_app.federation.memory import SETTINGS

INTERVAL = 10


def rows(size: str, rows: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One row per peer and setting: CPU seconds of a step, and the ratios to the floor, to peft and to full."""
    torch.manual_seed(0)
    inputs = batch(rows, tokens)
    peers = {name: Peer(name, classifier(size)) for name in PEERS}
    fedkrso = peers["fedkrso"]
    calls = {name: functools.partial(peer.step, inputs) for name, peer in peers.items()}
    for setting in SETTINGS[1:]:
        calls[f"fedkrso, {setting}"] = functools.partial(_step, fedkrso, setting, inputs)
    calls["fedkrso"] = functools.partial(_step, fedkrso, "keep", inputs)
    calls["interval"] = functools.partial(fedkrso.rso.start_interval, 1)  # type: ignore[union-attr]
    seconds = medians(calls, repeats)
    opening = seconds.pop("interval") / INTERVAL
    return [
        {
            "peer": name,
            "seconds": value + opening * name.startswith("fedkrso"),
            **{
                f"÷ {other}": (value + opening * name.startswith("fedkrso")) / seconds[other]
                for other in ("floor", "a-frozen", "lora", "full")
            },
        }
        for name, value in seconds.items()
    ]


def _step(peer: Peer, setting: str, inputs: Any) -> None:
    peer.memory = setting
    peer.step(inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="base", choices=["tiny", "base", "large"])
    parser.add_argument("--rows", type=int, default=8, help="examples in the batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    title = f"One local step, RoBERTa-{a.size}, batch {a.rows} × {a.tokens}, one thread"
    show(title, rows(a.size, a.rows, a.tokens, a.repeats), a.json)


if __name__ == "__main__":
    main()
