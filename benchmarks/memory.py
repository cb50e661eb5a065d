"""Memory of one local step, by peer and setting: exact counts of bytes, nothing is timed and nothing is computed.

    python -m benchmarks.memory [--rows 16] [--tokens 128] [--json]

RoBERTa-base and -large on torch's meta device, float32, dropout 0.1, attention written out ("eager"). In MiB:

hooks        unique storages that autograd keeps (torch.autograd.graph.saved_tensors_hooks), parameters excluded
activations  all that is still there after the forward pass: with a checkpoint, what it keeps is invisible to the hooks
peak         most at any moment of forward and backward, gradients and passing results included
weights, gradients, optimizer; "copy" is W^t as kept aside to give the model back unchanged after training
"""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import PEERS, Peer, Storage, batch, classifier, show
from fedkrso_app.train import activation_memory

SETTINGS = ("keep", "recompute", "checkpoint")
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
    # W of a target is no parameter of the module while a SubspaceLinear stands in its place.
    weights = [*peer.module.parameters(), *(part.W for part in peer.module.modules() if hasattr(part, "W"))]
    bytes = {"weights": total(weights)}
    own = set(distinct(weights))
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.update(distinct([tensor]))
        return tensor

    with Storage() as storage, activation_memory(peer.module, peer.memory):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = peer.module(**inputs).loss
        bytes["hooks"] = sum(held.nbytes() for key, held in kept.items() if key not in own)
        kept.clear()
        bytes["activations"] = storage.live
        loss.backward()
        bytes["peak"] = storage.peak
    bytes["gradients"] = total(p.grad for p in peer.trained() if p.grad is not None)
    for optimizer in peer.optimizers:
        optimizer.step()
    state = [value for optimizer in peer.optimizers for entry in optimizer.state.values() for value in entry.values()]
    changed = peer.trained()
    if peer.rso:
        state += [peer.rso.M, peer.rso.V, *peer.rso.accumulators.values()]
        layers = peer.rso.layers.values()
        state += [layer.P for layer in layers]
        changed = [layer.W for layer in layers] + changed[len(layers) :]  # B stays zero: it only carries a gradient
    bytes["optimizer"] = total(state)
    bytes["copy"] = total(changed)
    return {name: value / MIB for name, value in bytes.items()}


def distinct(tensors: Iterable[Tensor]) -> dict[int, Any]:
    """The storages of ``tensors``, each once."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}


def total(tensors: Iterable[Tensor]) -> int:
    return sum(storage.nbytes() for storage in distinct(tensors).values())


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
