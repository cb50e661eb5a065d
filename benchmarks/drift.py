"""How far 100 rounds lead W in bfloat16, and W by quantised entries, from W in float32, given the same entries.

    python -m benchmarks.drift RUN

The entries are those of a FedKRSO run, over and over, each time along other projections.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkrso_app import data
from fedkrso_app.config import resolved_path
from fedkrso_app.core import quantize
from fedkrso_app.core.projection import projections
from fedkrso_app.core.rounding import moving
from fedkrso_app.core.subspace import fold, matrix
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs.folder import Run
from fedkrso_app.training import model

ROUNDS = 100


def drift(W: Tensor, entries: list[tuple[list[int], Tensor]], name: str, kind: str) -> dict[str, Tensor]:
    """What ``entries`` (seeds, and accumulators K × m × r) add to W (m × n) in :data:`ROUNDS` rounds, by form."""
    forms = ("float32", "bfloat16", "int8", "int4")
    moved = {form: W.bfloat16() if form == "bfloat16" else W.clone() for form in forms}
    start, rng = {form: w.float().clone() for form, w in moved.items()}, np.random.default_rng(0)
    for version, (seeds, B) in zip(range(ROUNDS), itertools.cycle(entries), strict=False):
        P = torch.from_numpy(projections([seed + version for seed in seeds], name, B.shape[2], W.shape[1], kind))
        for form in forms:
            sent = B
            if form in quantize.FORMATS:
                flat = B.reshape(len(B), -1).numpy()
                sent = torch.from_numpy(quantize.decode(*quantize.encode(flat, form, rng))[:, : flat.shape[1]])
            with moving(moved[form], 0, version, name) as exact:
                fold(exact, sent.reshape(B.shape), P)
    return {form: moved[form].float() - start[form] for form in forms}


def rows(run: Run) -> list[dict[str, float | str]]:
    """Root mean square of the difference to float32, as a share of what float32 moved, over all target layers."""
    config, ledger = run.config, Ledger(run.ledger)
    loaded = model.of_run(config, data.resolve(config))
    rank, kind = config.to_dict()["fedkrso.rank"], config.to_dict()["fedkrso.projection"]
    arrays = [wire.decode(ledger.read(version).arrays) for version in ledger.versions() if version]
    squares, whole, start = dict.fromkeys(("bfloat16", "int8", "int4"), 0.0), 0.0, 0
    for name, layer in loaded.targets.items():
        W = matrix(layer).detach()
        end = start + len(W) * rank
        cut = [np.ascontiguousarray(own["accumulators"][:, start:end]) for own in arrays]
        entries = [
            (own["seeds"].tolist(), torch.from_numpy(B).reshape(-1, len(W), rank))
            for own, B in zip(arrays, cut, strict=True)
        ]
        start, moved = end, drift(W, entries, name, kind)
        whole += float(moved["float32"].square().sum())
        for form in squares:
            squares[form] += float((moved[form] - moved["float32"]).square().sum())
    return [{"form": form, "drift": (square / whole) ** 0.5} for form, square in squares.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a FedKRSO run")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    found = rows(Run(Path(resolved_path(chosen.run))))
    print(json.dumps(found) if chosen.json else "\n".join(f"{row['form']:10}{row['drift']:.4f}" for row in found))


if __name__ == "__main__":
    main()
