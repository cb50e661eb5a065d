"""Bytes of one client and round, measured on each method's real records, beside the formula and the paper's Table III.

    python -m benchmarks.wire [--json]     # also: --dtypes for the other number formats, --time for what they take

Builds each method on RoBERTa-base and RoBERTa-large *shapes* (a model from its config on the meta device: no weights),
fills its records with random numbers and counts the bytes that Flower would serialise, headers included. FedKRSO stands
twice: with all K = 10 seeds both ways, as the paper counts it, and with the seeds that ten clients really draw.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, RobertaConfig

from fedkrso_app.config import Config
from fedkrso_app.core import quantize, srd
from fedkrso_app.core.projection import stream
from fedkrso_app.federation.round import FedTune, no_figures
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Entry, Ledger
from fedkrso_app.records.wire import Schema
from fedkrso_app.runs.compare import settings
from fedkrso_app.strategies import STRATEGIES, parse
from fedkrso_app.strategies.base import Shapes
from fedkrso_app.training.model import find_targets

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
    """RoBERTa-base or -large with a head for two labels, without its weights."""
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    common = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    with torch.device("meta"):
        module = AutoModelForSequenceClassification.from_config(
            RobertaConfig(**common, **(large if size == "large" else {}))
        )
    head = {name: p for name, p in module.named_parameters() if not name.startswith("roberta.")}
    return Shapes.of(module, find_targets(module), head)


def draws(config: Config) -> tuple[float, float]:
    """Mean numbers of distinct seeds that one client draws and that ten clients use, over 20 rounds."""
    K, intervals = config.fedkrso.num_seeds, config.local_steps // config.fedkrso.interval
    drawn, used = [], []
    for round in range(20):
        sets = [set(stream(round, "draws", client).integers(K, size=intervals)) for client in range(10)]
        drawn += [len(chosen) for chosen in sets]
        used.append(len(set().union(*sets)))
    return float(np.mean(drawn)), float(np.mean(used))


def fill(schema: Schema, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Random arrays that fit ``schema``."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name, (dtype, shape) in schema.arrays.items():
        real = tuple(lengths.get(n, n) if isinstance(n, str) else n for n in shape)
        if dtype.startswith("float") or dtype in quantize.FORMATS:
            arrays[name] = rng.standard_normal(real, dtype=np.float32)
        else:
            arrays[name] = rng.integers(np.iinfo(dtype).max, size=real, dtype=dtype)
    return arrays


def measure(name: str, size: Shapes, config: Config, up: Mapping[str, int], down: Mapping[str, int]) -> dict[str, int]:
    """Bytes up and down of one client, with the free lengths of the two schemas set."""
    strategy_class = STRATEGIES[name]
    schema = strategy_class.reply_schema(config, size)
    reply = wire.encode(fill(schema, up), schema, stream(0, "reply"))
    content = RecordDict(
        {
            "status": ConfigRecord({"version": 1}),
            "update": wire.pack(reply),
            "metrics": MetricRecord({"num-examples": 1, "train-loss": 0.5, "train-seconds": 1.0, "peak-bytes": 1}),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder))
        entry = fill(strategy_class.entry_schema(config, size), down)
        if "mask" in entry:  # FedSRD's values are as many as its mask says
            entry = {"mask": np.array([1, 0], np.uint64), "head": entry["head"]}
            mask = srd.dare_mask((size.outputs(config.lora.rank),), config.fedsrd.download_sparsity, _dare_rng())
            entry["values"] = np.ones(int(mask.sum()), np.float32)
        ledger.append(Entry(0, {}, no_figures()))
        strategy: FedTune = strategy_class(config, size, ledger, "", "0" * 16)
        ledger.put(Entry(1, strategy_class.encode_entry(entry, config, size, 1), no_figures()))
        strategy.round = 1
        downlink = wire.measured_bytes(strategy.message_content(0, "train", {"round": 1, **strategy.instructions(1)}))
    return {"up": wire.measured_bytes(content), "down": downlink, "formula": strategy.paper_bytes()}


def _dare_rng() -> np.random.Generator:
    from fedkrso_app.strategies.fedsrd import dare_rng

    return dare_rng(1)


def rows(dtype: str = "float32", models: Sequence[str] = ("base", "large")) -> list[dict[str, Any]]:
    """One row per model size and method, with numbers in the format ``dtype``."""
    config = parse(settings(None, []) | {"local-steps": 100, "wire-dtype": dtype})
    K = config.fedkrso.num_seeds
    drawn, used = draws(config)
    result = []
    for label in models:
        size = shapes(label)
        L = size.outputs(config.lora.rank) + size.inputs(config.lora.rank)
        sparse = {"v": round(L * (1 - config.fedsrd.max_sparsity))}
        for name in STRATEGIES:
            row = {"model": f"RoBERTa-{label}", "method": name, "paper": TABLE_III[label].get(name, "")}
            lengths = {"s": K} if name == "fedkrso" else sparse
            result.append({**row, **measure(name, size, config, lengths, lengths)})
            if name == "fedkrso":  # bytes are linear in the number of seeds: measure at K and at 0, and interpolate
                full, none = result[-1], measure(name, size, config, {"s": 0}, {"s": 0})
                some = {
                    way: round(none[way] + (full[way] - none[way]) * count / K)
                    for way, count in (("up", drawn), ("down", used))
                }
                Q, h = size.outputs(config.fedkrso.rank), size.head
                formula = round(4 * (drawn * Q + h) + 4 * (used * Q + h))
                result.append(
                    {
                        **row,
                        "method": f"fedkrso, {drawn:.2f} drawn, {used:.2f} used",
                        "paper": "",
                        **some,
                        "formula": formula,
                    }
                )
    for row in result:
        row["both"] = row["up"] + row["down"]
        row["note"] = NOTES.get(row["method"], "")
    return result


def times(repeats: int = 15) -> list[dict[str, Any]]:
    """What a FedKRSO reply of RoBERTa-base takes to encode and decode: seconds, and how many bare copies of it in
    memory. Medians of interleaved repeats; the reply has the mean number of drawn seeds, rounded up."""
    size, result = shapes("base"), []
    for dtype in quantize.FORMATS:
        config = parse(settings(None, []) | {"local-steps": 100, "wire-dtype": dtype})
        schema = STRATEGIES["fedkrso"].reply_schema(config, size)
        reply = fill(schema, {"s": math.ceil(draws(config)[0])})
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
        result = [{"wire_dtype": dtype, **row} for dtype in wire.HEAD for row in rows(dtype, ["base"])]
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
