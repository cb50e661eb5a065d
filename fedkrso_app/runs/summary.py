"""A round in one line and a run in one table, for logs and terminals."""

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from fedkrso_app.config import Config
from fedkrso_app.core.accounting import shown
from fedkrso_app.runs.folder import Run
from fedkrso_app.runs.results import asked_in, replied_in
from fedkrso_app.strategies.privacy import Privacy
from fedkrso_app.training import metrics


def line(figures: dict[str, Any], config: Config, metric: str) -> str:
    """One round in one line."""
    parts = [f"round {figures['round']}/{config.num_server_rounds}"]
    if "metric" in figures:
        parts.append(f"{metric} {figures['metric']:.4f}  loss {figures['eval_loss']:.4f}")
    if figures["round"]:
        train_loss = "none" if figures["train_loss"] is None else f"{figures['train_loss']:.4f}"
        parts.append(f"epsilon {shown(figures['epsilon'])}" if "epsilon" in figures else f"train loss {train_loss}")
        parts.append(f"up {figures['uplink_bytes'] / 1e6:.2f} MB  down {figures['downlink_bytes'] / 1e6:.2f} MB")
        if figures.get("catchup_bytes"):
            parts.append(f"catch-up {figures['catchup_bytes'] / 1e6:.2f} MB of it")
        parts.append(f"clients {figures['clients']}  refused {figures['refused']}  failed {figures['failed']}")
        parts.append(f"{figures['seconds']:.1f} s")
    return "  ".join(parts)


def closing_table(run: Run, metric: str) -> str:
    """The run's figures as a table of text."""
    rounds = [figures for figures in run.metrics() if figures["round"]]
    config = run.config
    replied, asked = sum(map(replied_in, rounds)), sum(map(asked_in, rounds))
    table = Table(title=f"{config.strategy} on {config.task}, {len(rounds)} rounds", show_header=False)
    table.add_row("head", config.head)
    scores = [figures["metric"] for figures in run.metrics() if "metric" in figures]
    if scores:
        table.add_row(
            metric,
            f"{scores[-1]:.4f} at the end, {scores[0]:.4f} at the start, {metrics.best(metric, scores):.4f} at best",
        )
    sums = {key: sum(figures[f"{key}_bytes"] for figures in rounds) / 1e6 for key in ("uplink", "downlink", "paper")}
    for label, key, count in (
        ("up", "uplink", replied),
        ("down", "downlink", asked),
        ("both, paper's formula", "paper", asked),
    ):
        each = sums[key] / max(count, 1)
        table.add_row(label, f"{sums[key]:.2f} MB in all, {each:.3f} MB per client and round")
    if catchup := sum(figures.get("catchup_bytes", 0) for figures in rounds):
        table.add_row("of down, catch-up", f"{catchup / 1e6:.2f} MB to nodes that had missed rounds")
    if idle := len(rounds) - run.metrics()[-1]["version"]:
        table.add_row("rounds without an update", f"{idle}: too few good replies, see the warnings above")
    if epsilons := [figures["epsilon"] for figures in rounds if "epsilon" in figures]:
        own = config.of(Privacy)
        promise = f"{shown(epsilons[-1])} at delta = {own.delta:g} for each {own.unit}"
        table.add_row("epsilon", promise if own.randomness == "os" else f"{promise}; NOT PRIVATE: noise from the seed")
    for key in ("refused", "failed"):
        table.add_row(f"replies {key}", str(sum(figures[key] for figures in rounds)))
    table.add_row("seconds", f"{sum(figures['seconds'] for figures in rounds):.1f} in all rounds")
    if run.digest:
        table.add_row("model", str(run.model))
        table.add_row("SHA-256 of the weights", run.digest)
    else:
        table.add_row("model", f"not built here; `fedkrso export {run.path} DIR` makes it from the ledger")
    console = Console(width=110, file=io.StringIO())
    console.print(table)
    return "\n" + console.file.getvalue()  # type: ignore[attr-defined]
