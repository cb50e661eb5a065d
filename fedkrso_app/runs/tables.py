"""The tables that a comparison prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from fedkrso_app.runs.paired import LAST
from fedkrso_app.runs.results import plus_minus

_FEW = 6  # arms of which every pair is shown
_COSTS = {
    "uplink_mb": "MB up",
    "downlink_mb": "MB down",
    "client_peak_mb": "client MB",
    "seconds_per_round": "s/round",
    "lost": "lost",
}


def results(facts: Mapping[str, Any]) -> Table:
    """What every arm reached and cost, of the facts that a comparison saves."""
    table = Table(title=f"{facts['task']}, head {facts['head']}: mean ± sd over the draws", box=box.SIMPLE_HEAD)
    table.caption = (
        f"{facts['metric']}: after the last round; last {LAST}: the mean of the last {LAST} rounds. "
        "MB: 10^6 bytes, of one client and round; lost: replies refused or failed; more in results.csv"
    )
    for head in ("case", "arm", "rate", "draws", facts["metric"], f"last {LAST}", *_COSTS.values()):
        table.add_column(head, justify="left" if head in ("case", "arm") else "right")
    for row in facts["rows"]:
        rate = "–" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        cells = ["–" if row[key] is None else f"{row[key]:.3g}" for key in _COSTS]
        cells[2] = cells[2] if row["client_peak_mb"] is None else f"{row['client_peak_mb']:.0f}"
        reached = [plus_minus(row[key], row[f"{key}_sd"]) for key in ("metric", "score")]
        table.add_row(row["case"], row["arm"], rate, str(row["draws"]), *reached, *cells)
    return table


def pairs(facts: Mapping[str, Any]) -> Table:
    """The differences of every two arms, or of many arms to the first one, with their intervals."""
    table = Table(title=f"Differences of the last {LAST} rounds' mean, paired over the draws", box=box.SIMPLE_HEAD)
    table.caption = (
        "[ ]: 95 % interval by Student's t, for each difference by itself; * does not hold 0. At equal bytes both have "
        "the rounds that fit into the megabytes of the cheaper one."
    )
    for head in ("case", "difference", "draws", "at equal steps", "at equal bytes", "MB"):
        table.add_column(head, justify="left" if head in ("case", "difference") else "right")
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in facts["pairs"]:
        rows.setdefault((row["case"], row["a"], row["b"]), {})[row["view"]] = row
    first = facts["rows"][0]["arm"]
    if len({row["arm"] for row in facts["rows"]}) > _FEW:
        rows = {key: views for key, views in rows.items() if first in key[1:]}
        table.caption += f" Those to {first} alone; all are in results.json."
    for (case, a, b), views in rows.items():
        steps, by_bytes = views["steps"], views["bytes"]
        cells = [str(steps["draws"]), difference(steps), difference(by_bytes), f"{by_bytes['mb']:.3g}"]
        table.add_row(case, f"{a} - {b}", *cells)
    return table


def shares(facts: Mapping[str, Any]) -> Table:
    """Which share of the way between the study's two arms of ``span`` the others cover."""
    low, high = facts["span"]
    table = Table(title=f"Share of the distance from {low} to {high}, at equal steps", box=box.SIMPLE_HEAD)
    table.caption = "[ ]: 95 % interval by Fieller's theorem; none where the distance itself may be 0."
    for head in ("case", "arm", "draws", "share"):
        table.add_column(head, justify="left" if head in ("case", "arm") else "right")
    for row in facts["shares"]:
        ends = "" if row["from"] is None else f" [{row['from']:.0%}, {row['to']:.0%}]"
        share = "–" if row["share"] is None else f"{row['share']:.0%}{ends}"
        table.add_row(row["case"], row["arm"], str(row["draws"]), share)
    return table


def difference(row: Mapping[str, Any]) -> str:
    """``+0.0123 [-0.0100, +0.0346]``, with a star where the interval does not hold 0."""
    if row["low"] is None:
        return f"{row['mean']:+.4f}"
    star = " *" if row["low"] > 0 or row["high"] < 0 else ""
    return f"{row['mean']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]{star}"


def sweep(choices: Sequence[Mapping[str, Any]], holdout: float) -> Table:
    """The rates that were tried, and which one was taken."""
    table = Table(
        title=f"Learning rates by the mean metric of the last {LAST} rounds on {holdout:.0%} of the training rows"
    )
    for head in ("arm", "case", *(f"rate {i + 1}" for i in range(len(choices[0]["rates"]))), ""):
        table.add_column(head)
    for choice in choices:
        cells = []
        for rate, score in zip(choice["rates"], choice["scores"], strict=True):
            text = f"{rate:g}: " + ("none" if score is None else f"{score:.4f}")
            cells.append(f"[bold]{text} *[/bold]" if rate == choice["best"] else text)
        edge = "the best is at the edge: a better one may lie beyond" if choice["edge"] else ""
        table.add_row(choice["arm"], choice["case"], *cells, edge)
    return table
