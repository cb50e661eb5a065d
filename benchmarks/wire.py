"""Bytes per client and round, measured on each method's real records, beside the formula and the paper's Table III.

    python -m benchmarks.wire [--json]     # --dtypes: the other number formats; --time: their encoding and decoding

Builds each method on RoBERTa-base and RoBERTa-large *shapes* (a model from its config on the meta device: no weights),
fills its records with random numbers and counts the bytes that Flower would serialise, headers included. FedKRSO
has two rows: with all K = 10 seeds both ways, as the paper counts it, and with those that ten clients draw on average.
Llama-3.2-3B's records (a language model, without a head) are too large to be filled: headers are measured, and the rest
follows from their schemas.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, RobertaConfig

from benchmarks.models import llama
from fedkrso_app.core import quantize
from fedkrso_app.core.projection import stream
from fedkrso_app.records import wire
from fedkrso_app.records.protocol import Figures, Instructions, Status, trained
from fedkrso_app.records.schema import Schema
from fedkrso_app.runs import plan
from fedkrso_app.runs.compare import settings
from fedkrso_app.strategies import STRATEGIES, make, parse
from fedkrso_app.strategies.base import Method
from fedkrso_app.training.model import LoadedModel, find_targets
from fedkrso_app.training.shapes import Shapes

CLIENTS = 10

# FedKRSO, arXiv:2602.03019, Table III as printed: bytes of one client and round, both ways, "GB".
TABLE_III = {
    "base": {"fedkrso": ".02913", "ffa-lora": ".00688", "fedit": ".00958", "fedfft": ".938"},
    "large": {"fedkrso": ".0738", "ffa-lora": ".0144", "fedit": ".0215", "fedfft": "2.67"},
}
NOTES = {
    "fedit": "the paper's row is MiB/1000, its others are GiB",
    "fedfft": "the paper counts LoRA factors and a second head in",
}


def shapes(size: str) -> Shapes:
    """RoBERTa-base or -large with a head for two labels, or the language model Llama-3.2-3B, without its weights."""
    if size == "Llama-3.2-3B":
        with torch.device("meta"):
            module = llama("3.2-3B")
        return Shapes.of(LoadedModel(module, None, find_targets(module), {}, (), frozenset()))
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    common = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    with torch.device("meta"):
        module = AutoModelForSequenceClassification.from_config(
            RobertaConfig(**common, **(large if size == "large" else {}))
        )
    head = {name: p for name, p in module.named_parameters() if not name.startswith("roberta.")}
    return Shapes.of(LoadedModel(module, None, find_targets(module), head, (), frozenset()))


def fill(schema: Schema, lengths: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Random arrays that fit ``schema``, with its letters' lengths rounded; none that not every message has."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, field in schema.fields.items():
        if field.optional:
            continue
        real = tuple(round(lengths[n]) if isinstance(n, str) else n for n in field.shape)
        if field.dtype.startswith("float") or field.dtype in quantize.FORMATS:
            arrays[name] = rng.standard_normal(real, dtype=np.float32)
        else:
            arrays[name] = rng.integers(np.iinfo(field.dtype).max, size=real, dtype=field.dtype)
    return arrays


def measure(method: Method, up: Mapping[str, float], down: Mapping[str, float]) -> dict[str, int]:
    """Bytes up and down per client and round, for these lengths of a reply and of an entry."""
    instructions = Instructions("0" * 16, 1, "0" * 64, round=1, method=method.instructions(1)).record()

    def mean(schema: Schema, lengths: Mapping[str, float], message: Callable[[ArrayRecord], RecordDict]) -> int:
        """Over the arrays that take turns, if any do."""
        records = [
            wire.pack(wire.encode(fill(kind, lengths), kind, stream(0, "benchmark")))
            for kind in schema.travelling.usual
        ]
        return round(sum(wire.measured_bytes(message(record)) for record in records) / len(records))

    figures, method.replies = Figures(1000, 0.5, 1.0, 2**30), CLIENTS
    return {
        "up": mean(method.reply, up, lambda record: trained(Status(1), record, figures)),
        "down": mean(method.entry, down, lambda record: RecordDict({"entry-1": record, "train": instructions})),
        "formula": method.paper_bytes(),
    }


def counted(method: Method, up: Mapping[str, float], down: Mapping[str, float]) -> dict[str, int]:
    """What :func:`measure` finds, without making the arrays."""
    method.replies = CLIENTS
    reply, entry = method.reply.travelling, method.entry.travelling
    headers = wire.measured_bytes(trained(Status(1), wire.pack({}), Figures(1000, 0.5, 1.0, 2**30)))
    sizes = {"up": headers + plan.usual_bytes(reply, up), "down": headers + plan.usual_bytes(entry, down)}
    return {way: round(size) for way, size in sizes.items()} | {"formula": method.paper_bytes()}


def rows(dtype: str = "float32", models: Sequence[str] = ("base", "large", "Llama-3.2-3B")) -> list[dict[str, Any]]:
    """One row per model size and method, with numbers in the format ``dtype``, at the mean lengths for ten clients.
    Where those are expected values of a draw, a row at the largest lengths too, as the papers count."""
    result = []
    for label in models:
        size, of = shapes(label), counted if label == "Llama-3.2-3B" else measure
        for name in STRATEGIES:
            method = make(
                parse(settings(None, []) | {"local-steps": 100, "wire-dtype": dtype, "strategy": name}),
                size,
                judged=False,
            )
            up, down, figures = method.expected(CLIENTS)
            row = {"model": label if of is counted else f"RoBERTa-{label}", "paper": "", "note": ""}
            known = {} if of is counted else {"paper": TABLE_III[label].get(name, ""), "note": NOTES.get(name, "")}
            if figures:
                result.append({**row, **known, "method": name, **of(method, method.reply.limits, method.entry.limits)})
                expected = ", ".join(f"{value:.2f} {what}" for what, value in figures.items())
                result.append({**row, "method": f"{name}, {expected}", **of(method, up, down)})
            else:
                result.append({**row, **known, "method": name, **of(method, up, down)})
    return [{**row, "both": row["up"] + row["down"]} for row in result]


def times(repeats: int = 15) -> list[dict[str, Any]]:
    """Seconds to encode and decode a FedKRSO reply of RoBERTa-base, and their ratio to a bare copy of it in memory.
    Medians of interleaved repeats; the reply has the mean number of drawn seeds, rounded."""
    size, result = shapes("base"), []
    for dtype in quantize.FORMATS:
        method = make(parse(settings(None, []) | {"local-steps": 100, "wire-dtype": dtype}), size)
        schema = method.reply
        reply = fill(schema, method.expected(CLIENTS)[0])
        seconds: dict[str, list[float]] = {"copy": [], "encode": [], "decode": []}
        for _ in range(repeats):
            start = time.perf_counter()
            copied = {name: value.copy() for name, value in reply.items()}
            seconds["copy"].append(time.perf_counter() - start)
            start = time.perf_counter()
            encoded = wire.encode(copied, schema, stream(0, "reply"))
            seconds["encode"].append(time.perf_counter() - start)
            start = time.perf_counter()
            wire.decode(encoded)
            seconds["decode"].append(time.perf_counter() - start)
        medians = {name: float(np.median(values)) for name, values in seconds.items()}
        both = medians["encode"] + medians["decode"]
        result.append({"wire_dtype": dtype, **medians, "both_to_copy": both / medians["copy"]})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--dtypes", action="store_true", help="each wire-dtype, on RoBERTa-base")
    parser.add_argument("--time", action="store_true", help="seconds to encode and decode a reply")
    chosen = parser.parse_args()
    if chosen.time:
        result = times()
    elif chosen.dtypes:
        result = [
            {"wire_dtype": dtype, **row} for dtype in ("float32", *quantize.FORMATS) for row in rows(dtype, ["base"])
        ]
    else:
        result = rows()
    if chosen.json:
        print(json.dumps(result, indent=2))
        return
    if chosen.time:
        table = Table("wire-dtype", "encode s", "decode s", "both, in bare copies of the reply")
        for row in result:
            both = f"{row['both_to_copy']:.0f}"
            table.add_row(row["wire_dtype"], f"{row['encode']:.4f}", f"{row['decode']:.4f}", both)
        Console(width=120).print(table)
        return
    if chosen.dtypes:
        table = Table("wire-dtype", "method", "up MB", "down MB", "both MB", title="Bytes of one client and round")
        for row in result:
            figures = [f"{row[key] / 1e6:.3f}" for key in ("up", "down", "both")]
            table.add_row(row["wire_dtype"], row["method"], *figures)
        Console(width=120).print(table)
        return
    table = Table(title="Bytes of one client and round (r = 4, K = 10, J = 10, 100 local steps, float32)")
    for column in (
        "model",
        "method",
        "up MB",
        "down MB",
        "both MB",
        "formula MB",
        "both GiB",
        "formula GiB",
        "paper's Table III",
        "note",
    ):
        table.add_column(column, justify="left" if column in ("model", "method", "note") else "right")
    for row in result:
        figures = [f"{row[key] / 1e6:.3f}" for key in ("up", "down", "both", "formula")]
        figures += [f"{row[key] / 2**30:.5f}" for key in ("both", "formula")]
        table.add_row(row["model"], row["method"], *figures, row["paper"], row["note"])
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
