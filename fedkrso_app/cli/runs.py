"""The commands about a run that there is: report, export, ledger, privacy."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedkrso_app.cli.console import PLAIN, err, explained, out
from fedkrso_app.config import ConfigError
from fedkrso_app.records.ledger import LedgerError

_SHOWN = 6  # entries side by side in the table of layers
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, wherever it was copied to.")]


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders, or folders that hold some; or one results.jsonl."),
    ],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: report.html in the first RUN.")] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the metric over bytes alone, as a PNG picture.")
    ] = None,
) -> None:
    """Draw runs as one HTML file that needs no network: metric over rounds and over bytes, costs, settings.

    Of a comparison's results.jsonl it draws the paired differences of its arms, with their intervals, and the metric
    over bytes; the runs' folders are not needed.

    Runs that differ in nothing but the seed are drawn as one line with a band. --picture draws one small picture
    instead, for a README.
    """
    with explained():
        from fedkrso_app.runs import forest, journal, pictures
        from fedkrso_app.runs import report as r
        from fedkrso_app.runs.results import find_runs, lines

        if [run.suffix for run in runs] == [".jsonl"] and runs[0].is_file():
            if picture:
                raise ConfigError(f"--picture draws runs from their folders, which {runs[0]} has not: leave it out.")
            file = output or runs[0].with_name("report.html")
            forest.write(journal.Journal(runs[0]), file)
            out.print(str(file), **PLAIN)
            return

        file = picture or output or runs[0] / "report.html"
        found = find_runs(runs)
        with err.status(f"Drawing {len(found)} runs"):
            if picture:
                pictures.save(lines(found), picture)
            else:
                r.write(found, file)
    out.print(str(file), **PLAIN)


def export(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder for the model.")],
    round: Annotated[int | None, typer.Option(min=0, help="Round to export; default: the newest.")] = None,
    partition: Annotated[
        int | None, typer.Option(min=0, help="Whose model, where clients keep a part of it to themselves.")
    ] = None,
) -> None:
    """Rebuild the model of a round from the base model and the ledger, and write it in the hub's format.

    transformers' from_pretrained reads DIR without this package; its README.md is a model card with the metric of that
    round. A method whose entries are complete states keeps only the newest ones: its older rounds cannot be exported.
    What clients keep to themselves is on their own machines: run this there, with --partition, once the run has ended.
    """
    with explained():
        from fedkrso_app import data
        from fedkrso_app.runs import card, replay
        from fedkrso_app.training import model

        opened, entries = replay.opened(run)

        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists and is not empty; choose another folder.")
        at = replay.exportable(opened, entries)
        if not at or (round is not None and round not in at):
            listed = ", ".join(map(str, sorted(at))) or "none"
            asked = "no round" if round is None else f"round {round}"
            raise LedgerError(f"{asked} can be exported from {run}; the ledger leads to these rounds: {listed}.")
        round = max(at) if round is None else round
        version = at[round]
        own = replay.personal(opened, round, partition)
        loaded, state = replay.replayed(opened, entries, version, own)
        model.export(loaded, state, folder)
        card.write(opened, data.resolve(opened.config), round, folder)
    out.print(f"{folder}: version {version} of {run}", **PLAIN)


def ledger(
    run: RunFolder,
    verify: Annotated[
        bool, typer.Option("--verify", help="Replay all and compare with the digest in result.json.")
    ] = False,
    layers: Annotated[
        bool,
        typer.Option("--layers", help=f"Replay, and show how far the last {_SHOWN} entries moved each layer."),
    ] = False,
    energy: Annotated[
        bool, typer.Option("--energy", help="Replay, and show which share of the gradient each round could move in.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False,
) -> None:
    """Show what every round did: who took part, what was sent, and how far the model moved.

    The norms are those of each kind of array: of what an entry adds, or of the change where an entry holds absolute
    values. --layers gives the Frobenius norm of what an entry moved each target layer's weight (in LoRA methods the
    product of its factors) and the head; with --json of every entry but the first. --energy takes the gradient of 128
    training rows before each entry and gives the share of its energy that lies in the directions in which the entry
    moved the layer; it needs the training data, and a second copy of the model. --verify rebuilds the final model
    from the base model and the ledger; exit code 1 if it is another one.
    """
    with explained():
        from fedkrso_app.runs import replay

        opened, entries = replay.opened(run)
        described = list(replay.described(opened, entries))
        facts: dict[str, Any] = {"run": str(run), "status": opened.status, "entries": described}
        if layers:
            moved = replay.moved(opened, entries)
            facts["entries"] = described = [e | {"layers": moved.get(e["version"], {})} for e in described]
        if energy:
            from fedkrso_app.runs.energy import captured

            shares = captured(opened, entries)
            facts["entries"] = described = [e | {"energy": shares.get(e["version"], {})} for e in described]
        if verify:
            from fedkrso_app.training import model

            if not (expected := opened.digest):
                raise LedgerError(f"{run} has no result.json with a digest to compare with: {opened.status}.")
            facts["digest"] = model.state_digest(replay.replayed(opened, entries, entries.version)[1])
            facts["verified"] = facts["digest"] == expected
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        out.print(_entries_table(facts))
        if layers:
            title = "How far each entry moved each layer: Frobenius norms"
            out.print(_layers_table(described, "layers", title, "{:.4g}"))
        if energy:
            title = "Share of the gradient's energy in the directions that each entry moved in (how many)"
            out.print(_layers_table(described, "energy", title, "{0[0]:.4f} ({0[1]})"))
    if verify:
        said = "leads to the model in" if facts["verified"] else f"leads to another model ({facts['digest']}) than"
        (out if facts["verified"] and not as_json else err).print(f"The ledger {said} result.json.", **PLAIN)
        raise typer.Exit(0 if facts["verified"] else 1)


def privacy(run: RunFolder, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what each party saw of the data in a run, what was guaranteed, what went in clear, what is not covered.

    It reads the settings, the rounds and the logs of what was spent and opened in the run's folder, also of an
    interrupted run. A guarantee is named with its assumptions, and only where the run has left a trace of it.
    """
    with explained():
        from fedkrso_app.runs import exposure as e
        from fedkrso_app.runs.folder import Run

        facts = e.facts(Run(run))
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for line in e.lines(facts):
        out.print(line, markup=False, highlight=False)


def _entries_table(facts: Mapping[str, Any]) -> Table:
    table = Table(title=f"{facts['run']}: {facts['status']}")
    for head in ("version", "round", "took part", "arrays", "on disk, MB", "up, MB", "down, MB", "norm of the update"):
        table.add_column(head, justify="left" if head in ("took part", "arrays", "norm of the update") else "right")
    for e in facts["entries"]:
        who = f"{e['clients']}: {' '.join(map(str, e['partitions']))}" if e["partitions"] else "–"
        arrays = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in e["arrays"].items())
        norms = ", ".join(f"{name} {norm:.4g}" for name, norm in e["norms"].items())
        sizes = [f"{e[key] / 1e6:.3f}" for key in ("disk_bytes", "uplink_bytes", "downlink_bytes")]
        table.add_row(str(e["version"]), str(e["round"]), who, arrays, *sizes, norms or "–")
    return table


def _layers_table(entries: Sequence[Mapping[str, Any]], key: str, title: str, cell: str) -> Table:
    """A row for each layer: what the last entries have of it under ``key``, in the format ``cell``."""
    shown = [entry for entry in entries if entry[key]][-_SHOWN:]
    table = Table("layer", title=title)
    for entry in shown:
        table.add_column(f"version {entry['version']}", justify="right")
    for name in shown[-1][key] if shown else ():
        table.add_row(name, *(cell.format(entry[key][name]) for entry in shown))
    return table
