"""``fedkrso plan``: its tables, and notes on what the figures mean."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.table import Table

from fedkrso_app.cli.console import PLAIN, err, explained, out
from fedkrso_app.config import names


def plan(
    strategies: Annotated[str, typer.Option(help="Methods, separated by commas; default: all.")] = "",
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML file with run settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One run setting.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients of the federation.")] = 10,
    device_memory: Annotated[
        str | None, typer.Option(metavar="8GB", help="Which settings fit into so much memory, instead; see above.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes instead of MB and MiB.")] = False,
) -> None:
    """Say what a run would cost before it starts: trained numbers, bytes both ways, and a client's memory.

    Needs the model's config.json and no weights (embedded is pretrained if it was not yet), computes nothing and takes
    no memory to speak of. The memory is that of two steps by each method's own code on a batch of full length, as on a
    CPU, or with device = "cuda" as on a GPU.

    --device-memory says whether a client fits into a GPU of that memory (a CPU, if device = "cpu"), and which settings
    would fit: activation-memory, then smaller batches that are accumulated, then compute-dtype and state-dtype. It
    counts the method in the settings, unless --strategies names others. Exit code 0 if everything fits as set, 1 if
    other settings fit, 3 if none does.
    """
    with explained():
        from fedkrso_app.runs import plan as p
        from fedkrso_app.runs.study import STRATEGIES, settings

        given = settings(config, set_ or [])
        if device_memory is not None:
            _fit(given, names(strategies) or [given["strategy"]], device_memory, as_json)
        with err.status("Counting"):
            facts = p.plan(given, names(strategies) or list(STRATEGIES), clients)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    out.print(_costs_table(facts))
    if any(row["memory"] for row in facts["rows"]):
        out.print(_memory_table(facts))
    for line in notes(facts):
        out.print(f"- {line}", **PLAIN)


def _fit(given: Mapping[str, Any], strategies: Sequence[str], text: str, as_json: bool) -> NoReturn:
    from fedkrso_app.runs import fitting as f

    memory = f.size(text)
    with err.status("Counting"):
        found = [f.fitting(given, strategy, memory) for strategy in strategies]
    if as_json:
        print(json.dumps(found, indent=2))
    for facts in () if as_json else found:
        out.print(_fit_table(facts, text))
        for line in f.notes(facts):
            out.print(f"- {line}", **PLAIN)
    raise typer.Exit(max(3 if facts["choice"] is None else int(facts["choice"] > 0) for facts in found))


def _fit_table(facts: Mapping[str, Any], text: str) -> Table:
    on = "GPU" if facts["device"] == "cuda" else "CPU"
    table = Table(
        title=f"{facts['strategy']} on a {on} of {text}, {facts['budget'] / 2**30:.2f} GiB for what is counted",
        box=box.SIMPLE_HEAD,
    )
    heads = ("activation-memory", "batch", "compute-dtype", "state-dtype", "device", "host", "operations")
    for head in (*heads, "results", "fits"):
        table.add_column(head, justify="right" if head in ("device", "host", "operations") else "left")
    table.caption = "GiB (2^30 bytes). batch: rows × gradient accumulation; host: W^t beside the device"
    for number, row in enumerate(facts["rows"]):
        figures = (f"{row['device'] / 2**30:.2f}", f"{row['host'] / 2**30:.2f}", f"{row['operations']:.2f}")
        batch = " × ".join(map(str, row["batch"]))
        fits = "no" if not row["fits"] else "yes" if number != facts["choice"] else "yes, take it"
        kinds = (row["activation_memory"], batch, row["compute_dtype"], row["state_dtype"])
        table.add_row(*kinds, *figures, row["exactness"], fits)
    return table


def _costs_table(facts: Mapping[str, Any]) -> Table:
    parameters = facts["rows"][0]["parameters"]
    table = Table(
        title=f"{facts['model']} on {facts['task']}, head {facts['head']}: {parameters:,} parameters",
        box=box.SIMPLE_HEAD,
    )
    table.caption = (
        f"MB: 10^6 bytes, of one client and round; GB: of {facts['rounds']} rounds × {facts['sampled']} clients"
    )
    for head in ("method", "trained", "of all", "moved", "MB up", "MB down", "GB in all"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in facts["rows"]:
        trained, share = "–", "–"
        if row["trained"] is not None:
            trained, share = f"{row['trained']:,}", f"{row['trained'] / row['parameters']:.2%}"
        figures = [f"{row['up'] / 1e6:.3f}", f"{row['down'] / 1e6:.3f}", f"{row['run'] / 1e9:.3f}"]
        table.add_row(row["strategy"], trained, share, f"{row['moved']:,}", *figures)
    return table


def _memory_table(facts: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"A client's memory while it trains (as on a {facts['counted_as']}), MiB (2^20 bytes), "
        "by activation-memory",
        box=box.SIMPLE_HEAD,
    )
    kinds = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "aside": "W^t aside",
        "activations": "kept for backward",
        "peak": "peak of a pass",
        "total": "total",
    }
    for head in ("method", "setting", *kinds.values()):
        table.add_column(head, justify="left" if head in ("method", "setting") else "right")
    for row in facts["rows"]:
        for setting, memory in row["memory"].items():
            table.add_row(row["strategy"], setting, *(f"{memory[kind] / 2**20:,.1f}" for kind in kinds))
    return table


def notes(facts: Mapping[str, Any]) -> Iterator[str]:
    """What the figures mean and what moves them; each follows from a formula or from the count itself."""
    from fedkrso_app.core.accounting import shown

    for name, reason in facts["left_out"].items():
        yield f"{name} is left out: {reason}"
    if facts["epsilon"]:
        values = ", ".join(f"{rows:,} rows {shown(value)}" for rows, value in facts["epsilon"].items())
        yield f"epsilon of the run for each example, by the rows of a client that is asked in every round: {values}."
    if facts["client_epsilon"] is not None:
        yield f"epsilon of the run for each client that is asked in every round: {shown(facts['client_epsilon'])}."
    yield "trained: numbers with a gradient and moments; moved: weights that change, FedKRSO's along a few directions."
    for row in facts["rows"]:
        if "drawn" in row:
            used = f", {facts['sampled']} clients use {row['used']:.1f} (sent down)" if "used" in row else ""
            yield (
                f"{row['strategy']}: expected figures: a client draws {row['drawn']:.1f} different seeds per round "
                f"(sent up){used}."
            )
        if "noise_over_clip" in row:
            yield (
                f"{row['strategy']}: with {facts['sampled']} clients per round the noise of the mean is "
                f"{row['noise_over_clip']:.3g} times a full update; more than about 10 rarely trains. Raise the number "
                "of clients, or send less: a lower rank, fewer seeds, head = 'linear'."
            )
        if row["evaluate"] != facts["evaluate"]:
            yield f"{row['strategy']}: counted with evaluate = {row['evaluate']!r}, which it needs."
        if masks := row.get("masks"):
            honest = ", ".join(f"{count} honest nodes with {c} colluding" for c, count in masks["honest"].items())
            yield (
                f"{row['strategy']}: sealed updates of {masks['nodes']} nodes, opened by {masks['threshold']}: "
                f"{masks['missing']} may be missing. The smallest sum that a lying server opens has {honest}."
            )
        if row["pass"]:
            yield (
                f"{row['strategy']}: a pass of {row['pass']['clients']} clients takes "
                f"{row['pass']['total'] / 2**20:,.1f} MiB, with all seeds of a round; one that does not fit is halved."
            )
        for setting, reason in row["refused"].items():
            yield f"{row['strategy']}: memory with {setting!r} is not counted: {reason}"
    yield (
        "MB down: the mean over the run: no update in round 1, and of methods that send updates those that a client "
        "missed while others were asked. FedSRD's MB up are those of fedsrd.max-sparsity."
    )
    yield (
        "peak of a pass: forward and backward, gradients included; total: most at any moment. On a CPU attention is "
        "counted as written out: fused kernels keep less. On top: libraries, the allocator's reserve, packing the "
        "reply."
    )
    yield "fedkrso.rank: bytes both ways, gradients and optimizer in proportion, except for the head; lora.rank too."
    yield (
        "fedkrso.num-seeds K, fedkrso.interval J: I = local-steps / J draws a client, so K(1 - (1 - 1/K)^I) seeds up; "
        "down the same with I × clients draws. In memory an accumulator for each seed drawn, and no more."
    )
    yield "batch-size: kept for backward, in proportion; max-length: the same, and its square for attention."
    yield "wire-dtype: bytes alone. num-server-rounds: GB in all; fraction-train: these, and what a client missed."
