"""Memory of one local step, by peer and setting: exact counts of bytes, on the meta device.

    python -m benchmarks.memory [--rows 16] [--tokens 128] [--json]

RoBERTa-base and -large, float32, dropout 0.1, eager attention. Besides weights, gradients and optimizer, in MiB:

hooks        unique storages that autograd keeps (torch.autograd.graph.saved_tensors_hooks), parameters excluded
activations  everything left after the forward pass; the hooks do not see what a checkpoint keeps
peak         maximum during forward and backward, gradients and temporaries included
copy         W^t as kept aside to restore the model after training
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import PEERS, Peer, batch, classifier, show
from fedkrso_app.runs.memory import SETTINGS, distinct, measured, total

MIB = 2**20


def rows(size: str, rows: int, tokens: int) -> list[dict[str, Any]]:
    """One row per peer, and one more for each saving setting of FedKRSO."""
    cases = [(name, "keep") for name in PEERS] + [("fedkrso", setting) for setting in SETTINGS[1:]]
    result = []
    for name, setting in cases:
        with torch.device("meta"):
            peer, inputs = Peer(name, classifier(size, "eager"), setting), batch(rows, tokens)
        label = name if setting == "keep" else f"{name}, {setting}"
        result.append({"model": f"RoBERTa-{size}", "peer": label, **measure(peer, inputs)})
    return result


def measure(peer: Peer, inputs: dict[str, Tensor]) -> dict[str, float]:
    """MiB of one step of ``peer``."""
    hooks = kept_by_autograd(peer, inputs)
    with measured(peer.module) as memory:
        peer.step(inputs)
    changed = peer.trained()
    if peer.rso:
        layers = peer.rso.layers.values()
        changed = [layer.W for layer in layers] + changed[len(layers) :]  # B stays zero: it only carries a gradient
    bytes = {"weights": memory.weights, "hooks": hooks, "activations": memory.activations, "peak": memory.peak}
    bytes |= {"gradients": memory.gradients, "optimizer": memory.optimizer, "copy": total(changed)}
    return {name: value / MIB for name, value in bytes.items()}


def kept_by_autograd(peer: Peer, inputs: dict[str, Tensor]) -> int:
    """Bytes that the hooks of a forward pass see."""
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.update(distinct([tensor]))
        return tensor

    with peer.keeping(), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        peer.module(**inputs)
    weights = [*peer.module.parameters(), *(part.W for part in peer.module.modules() if hasattr(part, "W"))]
    own = distinct(weights)
    return sum(held.nbytes() for key, held in kept.items() if key not in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16, help="examples in the batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    result = [row for size in ("base", "large") for row in rows(size, a.rows, a.tokens)]
    show(f"Memory of one local step, batch {a.rows} × {a.tokens}, float32, MiB", result, a.json)


if __name__ == "__main__":
    main()
