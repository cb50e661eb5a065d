"""A step of example-level DP beside the plain step: CPU seconds of one thread, the best of interleaved repeats.

    python -m benchmarks.per_example [--size base] [--rows 8] [--tokens 64] [--repeats 7] [--json]

RoBERTa shapes, random weights, random tokens, as in benchmarks/step.py. "rows" is the step with every row's gradient
norm and the clipped sum in place of the sum; "noise" is what drawing and adding the noise takes beside it. "÷ plain" is
without the noise, "all ÷ plain" with it.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Peer, batch, best, classifier, show
from fedkrso_app.core.examples import row_gradients
from fedkrso_app.core.noise import NoiseStream, fresh_key
from fedkrso_app.training.per_example import Mechanism, row_losses

PEERS = ("fedkrso", "a-frozen", "lora")


def private_step(peer: Peer, inputs: Mapping[str, Tensor], mechanism: Mechanism) -> None:
    """:meth:`Peer.step` with gradients that were clipped row by row."""
    parameters = peer.trained()
    with peer.keeping(), row_gradients(peer.module, parameters) as found:
        found.start(len(inputs["labels"]))
        with peer.precision:
            losses = row_losses(peer.module, inputs, None)
        losses.sum().backward()
        for parameter, total in zip(parameters, found.clipped(mechanism.clip), strict=True):
            assert total is not None
            parameter.grad = mechanism.released(total)
    for optimizer in peer.optimizers:
        optimizer.step()
        optimizer.zero_grad()


def rows(size: str, rows: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One row per peer."""
    torch.manual_seed(0)
    inputs, found = batch(rows, tokens), []
    for name in PEERS:
        peer = Peer(name, classifier(size))
        quiet, noisy = (Mechanism(rows, rows, 1.0, noise, NoiseStream(fresh_key())) for noise in (0.0, 1.0))
        calls: dict[str, Callable[[], Any]] = {
            "plain": lambda peer=peer: peer.step(inputs),
            "rows": lambda peer=peer, quiet=quiet: private_step(peer, inputs, quiet),
            "noise": lambda peer=peer, noisy=noisy: [noisy.released(torch.zeros_like(p)) for p in peer.trained()],
        }
        seconds = best(calls, repeats)
        plain, private = seconds["plain"], seconds["rows"]
        ratios = {"÷ plain": private / plain, "all ÷ plain": (private + seconds["noise"]) / plain}
        found.append({"peer": name, "trained": sum(p.numel() for p in peer.trained()), **seconds, **ratios})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="base", choices=["tiny", "minilm", "base", "large"])
    parser.add_argument("--rows", type=int, default=8, help="examples in the batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    title = f"A step with gradients by row, RoBERTa-{a.size}, batch {a.rows} × {a.tokens}, one thread"
    show(title, rows(a.size, a.rows, a.tokens, a.repeats), a.json)


if __name__ == "__main__":
    main()
