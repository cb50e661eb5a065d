"""One local step on a GPU, by peer: milliseconds, and memory as the allocator counts it. Needs CUDA.

    python -m benchmarks.gpu [--cases Llama] [--repeats 10] [--json]

RoBERTa-large (a classifier, batch 16 × 128, dropout on) in float32 and in bfloat16, and the shapes of Llama-3.2-3B and
-3.1-8B (language models, batch 4 × 768 and 1 × 1024) in bfloat16, with random weights; r = 4. In bfloat16 FedKRSO
leaves W alone and adds its accumulators beside it; it is measured after ten intervals of different seeds, the worst
case. In bfloat16 every peer runs under autocast; peft's factors are bfloat16 too, the leanest form of LoRA, and "full"
is AdamW in bfloat16. FedKRSO has one row per setting of ``activation-memory``, and makes a language model's loss from a
few tokens' logits at a time, as the app does for every method; "lora, no logits" does that too.

ms            forward, backward and optimizer, median of CUDA events; with small kernels this includes waits for the CPU
busy ms       the sum of the times of the kernels in one step, by torch's profiler
interval ms   FedKRSO: drawing the projections of one seed and copying them, once in J steps and not in "ms"
weights       MiB allocated before the step, without gradients and the optimizer's state
blocks        MiB beyond that after the forward pass of the blocks alone: what they keep for backward
kept          MiB after the whole forward pass; includes a language model's logits (tokens × vocabulary)
peak          MiB beyond the weights at any moment of a step, gradients and optimizer included
all           MiB at any moment
÷ counted     peak divided by what benchmarks.memory counts for the same step without a GPU
"""

import argparse
import gc
import statistics
import time
from typing import Any

import torch

from benchmarks.memory import count, label
from benchmarks.models import ON_GPU, PEERS, Peer, on_gpu, show

SEEDS = 10
MIB = 2**20


def rows(case: str, repeats: int) -> list[dict[str, Any]]:
    """One row per peer, each with a model of its own that is gone before the next is made."""
    result = []
    cases = [(name, "keep", name != "fedkrso") for name in PEERS]
    cases += [("lora", "keep", False)] if case.startswith("Llama") else []
    cases += [("fedkrso", "recompute", False), ("fedkrso", "checkpoint", False)]
    for name, setting, logits in cases:
        torch.manual_seed(0)
        peer, inputs = on_gpu(case, "cuda", name, setting, logits)
        row = {"model": case, "peer": label(name, setting, logits), **measure(peer, inputs, repeats)}
        expected = count(*on_gpu(case, "meta", name, setting, logits))["peak"]
        result.append({**row, "÷ counted": row["peak"] / expected})
        del peer, inputs
        gc.collect()
        torch.cuda.empty_cache()
    lora = next(row for row in result if row["peer"] == "lora")
    compared = ("ms", "busy ms", "blocks", "all")
    return [{**row, **{f"{name} ÷ lora": row[name] / lora[name] for name in compared}} for row in result]


def measure(peer: Peer, inputs: dict[str, Any], repeats: int) -> dict[str, float]:
    """Milliseconds and MiB of one step of ``peer``."""
    opening = 0.0
    for seed in range(1, SEEDS if peer.rso else 0):
        started = time.perf_counter()
        peer.rso.start_interval(seed + 1)
        torch.cuda.synchronize()
        opening = time.perf_counter() - started
    before = allocated()
    with peer.precision, peer.keeping():
        hidden = peer.module.base_model(input_ids=inputs["input_ids"]).last_hidden_state
    blocks = allocated() - before
    del hidden
    with peer.precision, peer.keeping():
        loss = peer.module(**inputs).loss
    kept = allocated() - before
    del loss
    torch.cuda.reset_peak_memory_stats()
    milliseconds = []
    for repeat in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        peer.step(inputs)
        end.record()
        end.synchronize()
        if repeat >= 3:
            milliseconds.append(start.elapsed_time(end))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        peer.step(inputs)
        torch.cuda.synchronize()
    return {
        "ms": statistics.median(milliseconds),
        "busy ms": sum(event.self_device_time_total for event in profile.key_averages()) / 1e3,
        "interval ms": opening * 1e3,
        "weights": before,
        "blocks": blocks,
        "kept": kept,
        "peak": torch.cuda.max_memory_allocated() / MIB - before,
        "all": torch.cuda.max_memory_allocated() / MIB,
    }


def allocated() -> float:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--cases", default="", help="those whose names contain this")
    a = parser.parse_args()
    result = [row for case in ON_GPU if a.cases in case for row in rows(case, a.repeats)]
    show(f"One local step on {torch.cuda.get_device_name()}", result, a.json)


if __name__ == "__main__":
    main()
