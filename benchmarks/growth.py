"""How cost grows: measured points beside the formula that predicts them.

    python -m benchmarks.growth [--size base] [--repeats 3] [--output growth.png] [--json]

FedKRSO on RoBERTa shapes; r = 4, K = 10, J = 10, 100 local steps, ten clients, 8 × 64 tokens, except where one varies.

step         CPU seconds of one thread over the rank and over the rows of the batch. Formula: multiplications and
             additions, scaled to the point at r = 4 or at 8 rows. A token costs 4·m·n in every target layer (forward
             and gradient of the input), 2·r·(m + n) for the projections and, in every block, 12·t·d for attention; a
             step costs 2·r·m·n per layer for W ← W + B P.
up, down     bytes per client and round over K and over J, measured on real records, mean over clients and rounds.
             Formula: 4·(s·Q + h), where s is the expected number of distinct seeds among those drawn with replacement:
             K·(1 − (1 − 1/K)^I) with I the intervals of one client (up) or of all clients (down).
server       peak MiB over the number of replies (benchmarks/server.py). Formula: 20·(K·Q + h) bytes for any number:
             totals of 8 bytes and three float32 copies of the average on its way to the ledger.
rebuild      CPU seconds over the rounds missed (benchmarks/replica.py). Formula: proportional, scaled to one round.
"""

import argparse
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import replica, server, wire
from benchmarks.models import RANK, RATE, SIZES, batch, classifier, head_of, loaded, medians, show
from fedkrso_app.config import Config
from fedkrso_app.core.projection import stream
from fedkrso_app.core.rso import RSO
from fedkrso_app.core.subspace import SubspaceLinear
from fedkrso_app.runs.compare import settings
from fedkrso_app.strategies import parse
from fedkrso_app.strategies.fedkrso import FedKRSO, FedKRSOSettings, distinct_seeds
from fedkrso_app.training.loop import head_optimizer
from fedkrso_app.training.model import find_targets
from fedkrso_app.training.shapes import Shapes

CLIENTS, STEPS, ROUNDS = 10, 100, 10
ROWS, TOKENS = 8, 64
RANKS = {"tiny": (1, 2, 4, 8, 16), "base": (1, 4, 8, 16, 32, 64)}
BATCHES = (1, 2, 4, 8, 16)
KS, JS = (1, 2, 5, 10, 20, 40), (1, 2, 5, 10, 20, 50, 100)
REPLIES, MISSED = (1, 3, 10, 30, 100), (1, 2, 4, 8)

Row = dict[str, Any]  # cost, over, at, measured, formula


def rows(size: str, repeats: int) -> list[Row]:
    """Every point of every panel."""
    with torch.device("meta"):
        module = classifier(size)
    shapes = Shapes.of(loaded(module))
    return [*steps(size, shapes, repeats), *traffic(shapes), *memory(size, shapes), *rebuild(size, repeats)]


def steps(size: str, shapes: Shapes, repeats: int) -> list[Row]:
    """A step over the rank and over the rows of the batch."""
    torch.manual_seed(0)
    module = classifier(size)
    head, targets = head_of(module), find_targets(module)
    for parameter in head.values():
        parameter.requires_grad_(True)
    dense = head_optimizer(head, RATE)
    inputs = {count: batch(count, TOKENS) for count in BATCHES}
    rsos = {}
    for rank in RANKS[size]:
        rsos[rank] = RSO({name: SubspaceLinear(layer, rank) for name, layer in targets.items()}, RATE)
        rsos[rank].start_interval(1)

    def step(rank: int, count: int) -> None:
        for name, layer in rsos[rank].layers.items():
            module.set_submodule(name, layer)
        module(**inputs[count]).loss.backward()
        for optimizer in (rsos[rank], dense):
            optimizer.step()
            optimizer.zero_grad()

    points = {("rank", rank): (rank, ROWS) for rank in RANKS[size]}
    points |= {("rows of the batch", count): (RANK, count) for count in BATCHES}
    calls = {f"{over} {at}": functools.partial(step, *point) for (over, at), point in points.items()}
    seconds = medians(calls, repeats)

    def operations(rank: int, count: int) -> float:
        tokens, d, blocks = count * TOKENS, SIZES[size]["hidden_size"], SIZES[size]["num_hidden_layers"]
        linear = sum(tokens * (4 * m * n + 2 * rank * (m + n)) + 2 * rank * m * n for m, n in shapes.targets.values())
        return linear + tokens * blocks * 12 * TOKENS * d

    anchors = {"rank": RANK, "rows of the batch": ROWS}
    return [
        {
            "cost": "step, CPU s",
            "over": over,
            "at": at,
            "measured": seconds[f"{over} {at}"],
            "formula": seconds[f"{over} {anchors[over]}"] * operations(*point) / operations(RANK, ROWS),
        }
        for (over, at), point in points.items()
    ]


def drawn(config: Config, round: int, client: int) -> set[int]:
    """Which of the K seeds one client draws in a round."""
    own = config.of(FedKRSOSettings)
    intervals = -(-config.local_steps // own.interval)
    return set(stream(round, "draws", client).integers(own.num_seeds, size=intervals).tolist())


def traffic(shapes: Shapes) -> list[Row]:
    """Bytes over K and over J."""

    @functools.cache
    def measured(count: int) -> dict[str, int]:
        lengths = {"s": count}
        return wire.measure(FedKRSO(_config(num_seeds=max(KS)), shapes), lengths, lengths)

    result = []
    cases = [("K", K, _config(num_seeds=K)) for K in KS] + [("J", J, _config(interval=J)) for J in JS]
    for over, at, config in cases:
        own = config.of(FedKRSOSettings)
        K, intervals = own.num_seeds, -(-STEPS // own.interval)
        sets = [[drawn(config, round, client) for client in range(CLIENTS)] for round in range(ROUNDS)]
        counts = {
            "up": [len(seeds) for of_round in sets for seeds in of_round],
            "down": [len(set().union(*of_round)) for of_round in sets],
        }
        for way, draws in (("up", intervals), ("down", CLIENTS * intervals)):
            bytes = statistics.fmean(measured(count)[way] for count in counts[way])
            formula = 4 * (distinct_seeds(K, draws) * shapes.outputs(own.rank) + shapes.head)
            point = {"cost": f"{way}, MB", "over": over, "at": at}
            result.append({**point, "measured": bytes / 1e6, "formula": formula / 1e6})
    return result


def memory(size: str, shapes: Shapes) -> list[Row]:
    """The server's peak over the number of replies."""
    own = _config().of(FedKRSOSettings)
    formula = 20 * (own.num_seeds * shapes.outputs(own.rank) + shapes.head) / 2**20
    return [
        {
            "cost": "server, MiB",
            "over": "replies",
            "at": row["clients"],
            "measured": row["peak MiB"],
            "formula": formula,
        }
        for row in server.rows(size, list(REPLIES))
    ]


def rebuild(size: str, repeats: int) -> list[Row]:
    """The time to rebuild W over the number of missed rounds."""
    seconds = {}
    for missed in MISSED:
        parts = {row["part"]: row["seconds"] for row in replica.rows(size, missed, repeats)}
        seconds[missed] = missed * parts["advance"]
    return [
        {
            "cost": "rebuild, CPU s",
            "over": "missed rounds",
            "at": missed,
            "measured": value,
            "formula": missed * seconds[1],
        }
        for missed, value in seconds.items()
    ]


def draw(rows: Sequence[Row], title: str, file: Path) -> None:
    """Plot one panel per variable."""
    overs = list(dict.fromkeys(row["over"] for row in rows))
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    figure.suptitle(title)
    for axes, over in zip(figure.subplots(2, 3).flat, overs, strict=True):
        costs = list(dict.fromkeys(row["cost"] for row in rows if row["over"] == over))
        for cost in costs:
            points = [row for row in rows if row["over"] == over and row["cost"] == cost]
            xs = [row["at"] for row in points]
            [line] = axes.plot(xs, [row["formula"] for row in points], label=f"{cost}: formula")
            axes.plot(xs, [row["measured"] for row in points], "o", color=line.get_color(), label="measured")
        if over in ("J", "replies"):
            axes.set_xscale("log")
        axes.set(xlabel=over, ylabel=costs[0].rpartition(", ")[2])
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=100)


def _config(**fedkrso: int) -> Config:
    changed = {f"fedkrso.{name.replace('_', '-')}": value for name, value in fedkrso.items()}
    return parse(settings(None, []) | {"local-steps": STEPS} | changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="base", choices=list(RANKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw the panels into this PNG")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    result = rows(a.size, a.repeats)
    title = f"How cost grows, RoBERTa-{a.size}"
    if a.output:
        draw(result, title, a.output)
    show(title, result, a.json)


if __name__ == "__main__":
    main()
