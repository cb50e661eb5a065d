"""Memory of one local step, by peer and setting: exact counts of bytes, on the meta device.

    python -m benchmarks.memory [--rows 16] [--tokens 128] [--json]
    python -m benchmarks.memory --gpu [CASE] [--logits] [--json]

RoBERTa-base and -large, float32, dropout 0.1, eager attention. Besides weights, gradients and optimizer, in MiB:

hooks        unique storages that autograd keeps (torch.autograd.graph.saved_tensors_hooks), parameters excluded
activations  everything left after the forward pass; the hooks do not see what a checkpoint keeps
peak         maximum during forward and backward, gradients and temporaries included
copy         W^t as kept aside to restore the model after training

With --gpu, the steps that benchmarks.gpu measures (or those whose names contain CASE), counted as on a GPU by
fedkrso_app.training.counting, without one. FedKRSO is counted after ten intervals of different seeds; it makes a
language model's loss from a few tokens' logits at a time, as the app does for every method, or with --logits from all
of them.

weights      before the step, FedKRSO's accumulators, moments and projections included
blocks       what the blocks keep for backward
kept         everything left after the forward pass, a language model's logits included
peak         maximum beyond the weights at any moment of a step, gradients and optimizer included
all          weights and peak
TFLOP        operations of the matrix products and attention in one step; no time
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import ON_GPU, PEERS, Peer, batch, classifier, on_gpu, show
from fedkrso_app.federation.memory import SETTINGS, measured
from fedkrso_app.training.counting import counting, distinct, total

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


def label(name: str, setting: str, logits: bool) -> str:
    """The name of a row."""
    parts = [name, *([setting] if setting != "keep" else []), *(["no logits"] if name == "lora" and not logits else [])]
    return ", ".join(parts)


def gpu_rows(case: str, logits: bool) -> list[dict[str, Any]]:
    """One row per peer of a case of :data:`ON_GPU`; ``logits`` are FedKRSO's."""
    cases = [("floor", "keep", True), *(("fedkrso", setting, logits) for setting in SETTINGS), ("lora", "keep", True)]
    cases += [("lora", "keep", False)] if case.startswith("Llama") else []
    result = [{"model": case, "peer": label(*each), **count(*on_gpu(case, "meta", *each))} for each in cases]
    lora = next(row for row in result if row["peer"] == "lora")
    return [{**row, "all ÷ lora": row["all"] / lora["all"]} for row in result]


def count(peer: Peer, inputs: dict[str, Tensor], seeds: int = 10) -> dict[str, float]:
    """MiB and operations of one step of ``peer`` on a GPU; it is on the meta device."""
    with counting(cuda=True) as counter:
        held: list[Tensor] = []
        if peer.rso:
            for seed in range(1, seeds):
                peer.rso.start_interval(seed + 1)
            held = [*peer.rso.held(), *(layer.W for layer in peer.rso.layers.values())]
        weights, before = total([*peer.module.parameters(), *held]), counter.live
        with peer.precision, peer.keeping():
            hidden = peer.module.base_model(input_ids=inputs["input_ids"]).last_hidden_state
        blocks = counter.live - before
        del hidden
        with peer.precision, peer.keeping():
            loss = peer.module(**inputs).loss
        kept = counter.live - before
        del loss
        counter.peak, counter.operations = counter.live, 0
        for _ in range(2):
            peer.step(inputs)
        peak = counter.peak - before
    bytes = {"weights": weights, "blocks": blocks, "kept": kept, "peak": peak, "all": weights + peak}
    return {name: value / MIB for name, value in bytes.items()} | {"TFLOP": counter.operations / 2 / 1e12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16, help="examples in the batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--gpu", nargs="?", const="", metavar="CASE", help="count the steps of benchmarks.gpu")
    parser.add_argument("--logits", action="store_true", help="FedKRSO's loss from all logits at once")
    a = parser.parse_args()
    if a.gpu is not None:
        counted = [row for case in ON_GPU if a.gpu in case for row in gpu_rows(case, a.logits)]
        return show("Memory of one local step, counted as on a GPU, MiB", counted, a.json)
    result = [row for size in ("base", "large") for row in rows(size, a.rows, a.tokens)]
    show(f"Memory of one local step, batch {a.rows} × {a.tokens}, float32, MiB", result, a.json)


if __name__ == "__main__":
    main()
