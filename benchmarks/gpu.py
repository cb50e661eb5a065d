"""One local step on a GPU, by peer: milliseconds, and memory as the allocator counts it. Needs CUDA.

    python -m benchmarks.gpu [--repeats 10] [--json]

RoBERTa-large (a classifier, batch 16 × 128, dropout on) in float32 and in bfloat16, and Llama-3.2-3B's shape (a
language model, batch 4 × 768) in bfloat16, with random weights; r = 4. In bfloat16 FedKRSO leaves W alone and adds its
accumulators beside it; it is measured after ten intervals of different seeds, the worst case. In bfloat16 every peer
runs under autocast; peft's factors are bfloat16 too, the leanest form of LoRA, and "full" is AdamW in bfloat16. FedKRSO
has one row per setting of ``activation-memory``.

ms            forward, backward and optimizer, median of CUDA events; with small kernels this includes waits for the host
busy ms       the sum of the times of the kernels in one step, by torch's profiler
interval ms   FedKRSO: drawing the projections of one seed and copying them, once in J steps and not in "ms"
weights       MiB allocated before the step, without gradients and the optimizer's state
blocks        MiB beyond that after the forward pass of the blocks alone: what they keep for backward
kept          MiB after the whole forward pass; includes a language model's logits (tokens × vocabulary)
peak          MiB at any moment of a step, gradients and optimizer included
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.models import PEERS, Peer, batch, classifier, show

SEEDS = 10
MIB = 2**20


def llama() -> Any:
    """The shape of Llama-3.2-3B, random weights, frozen, in training mode."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train().requires_grad_(False)


CASES: dict[str, tuple[Callable[[], Any], torch.dtype, tuple[int, int]]] = {
    "RoBERTa-large, float32": (lambda: classifier("large"), torch.float32, (16, 128)),
    "RoBERTa-large, bfloat16": (lambda: classifier("large"), torch.bfloat16, (16, 128)),
    "Llama-3.2-3B, bfloat16": (llama, torch.bfloat16, (4, 768)),
}


def rows(case: str, repeats: int) -> list[dict[str, Any]]:
    """One row per peer, each with a model of its own that is gone before the next is made."""
    make, dtype, shape = CASES[case]
    result = []
    for name, setting in [*((name, "keep") for name in PEERS), ("fedkrso", "recompute"), ("fedkrso", "checkpoint")]:
        torch.manual_seed(0)
        with torch.device("cuda"):
            torch.set_default_dtype(dtype)
            try:
                peer, inputs = Peer(name, make(), setting), batch(*shape)
            finally:
                torch.set_default_dtype(torch.float32)
            if "roberta" not in type(peer.module).__name__.lower():
                inputs["labels"] = inputs["input_ids"]
            label = name if setting == "keep" else f"{name}, {setting}"
            result.append({"model": case, "peer": label, **measure(peer, inputs, repeats)})
        del peer, inputs
        gc.collect()
        torch.cuda.empty_cache()
    lora = next(row for row in result if row["peer"] == "lora")
    compared = ("ms", "busy ms", "blocks")
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
    }


def allocated() -> float:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    result = [row for case in CASES for row in rows(case, a.repeats)]
    show(f"One local step on {torch.cuda.get_device_name()}", result, a.json)


if __name__ == "__main__":
    main()
