"""``fedkrso``: plan a run, compare methods, draw runs, export a model of any round, read and verify a ledger."""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fedkrso_app.config import ConfigError, names
from fedkrso_app.records.ledger import LedgerError

# The rest of the package is imported inside the commands, since torch takes seconds and --help should not.

app = typer.Typer(
    name="fedkrso",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=__doc__,
)
# A pipe or a file has no width; the tables should not be cut to 80 columns there.
out = Console(width=None if sys.stdout.isatty() else 120)
err = Console(width=None if sys.stderr.isatty() else 120, stderr=True)
_PLAIN: Any = {"markup": False, "highlight": False, "soft_wrap": True}  # for sentences and paths
_SHOWN = 6  # entries side by side in the table of layers
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, wherever it was copied to.")]


@contextmanager
def explained() -> Iterator[None]:
    """What the user can fix ends with exit code 2 and one sentence."""
    try:
        yield
    except (ConfigError, LedgerError, OSError) as error:  # the last: a full disk, a folder that cannot be written to
        err.print(f"Error: {error}", **_PLAIN)
        raise typer.Exit(2) from None


@app.command()
def compare(
    study: Annotated[
        Path | None, typer.Argument(metavar="STUDY.toml", help="A file with settings, cases, arms and draws.")
    ] = None,
    strategies: Annotated[
        str | None, typer.Option(help="Methods, separated by commas; default: fedkrso,fedit,ffa-lora,fedfft.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME: METHOD, KEY=VALUE, ...'", help="One arm, instead of methods by name; repeat it."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Draws, separated by commas; each arm runs once with each. Default: 0,1,2.")
    ] = None,
    vary: Annotated[
        str | None, typer.Option(help="What a draw sets: seed (default), or partition-seed, the partition alone.")
    ] = None,
    partitions: Annotated[
        str | None, typer.Option(help="Partition schemes, separated by commas; default: what the settings say.")
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML file with run settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One run setting.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the runs; default: compare-TASK, or STUDY, in output-dir.")
    ] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Clients of the simulation; default: 10.")] = None,
    engine: Annotated[
        Literal["flower", "process"], typer.Option(help="Flower's simulation, or each run in one process; see above.")
    ] = "flower",
    sweep: Annotated[bool, typer.Option("--sweep", help="Choose each arm's learning rate first, see above.")] = False,
    rates: Annotated[
        int | None, typer.Option(min=1, help="Learning rates that the sweep tries for each arm; default: 4.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Stop after so many minutes; the same command continues.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of the tables.")] = False,
) -> None:
    """Run arms on the same clients, partitions and seeds, and print what they reach and cost and how they differ.

    An arm is a method, or any settings with a name: --arm "one seed: fedkrso, fedkrso.num-seeds=1, fedkrso.rank=40".
    The differences of every two arms are paired over the draws, with 95 % intervals by Student's t.

    The folder gets one run and one log per arm, partition and seed, results.csv, results.json, and a line per finished
    run in results.jsonl. The same command continues an interrupted comparison: it keeps finished runs and resumes
    incomplete ones. Ctrl-C also stops the current run. If a run fails, the comparison continues and the exit code is 1.

    STUDY.toml describes a larger comparison: [settings] of all runs, [[cases]] (tasks and partitions), [arms.NAME],
    draws, vary, clients, and rates for a sweep. Its finished runs are lines of STUDY/results.jsonl beside the file,
    each with device, versions and commit, so that it can grow on several machines; their folders are deleted.

    --engine process makes each run in one process, where the clients train one after another (on one core unless
    torch-threads says more). The models are the same bit for bit. Small models take less time, because no SuperLink and
    no Ray start. Client memory is then that of the process, server included.

    --sweep chooses the learning rate of each arm for each partition: as many rates for every arm, each twice the
    one before, around the rate in the settings (4 rates: ×0.5, ×1, ×2, ×4), with seed 0. They are judged by the mean
    metric of the last 3 rounds on a fifth of the training rows, which those runs do not train on; the validation rows
    that the table reports are never looked at. The choice is printed and kept in OUTPUT/sweep/sweep.json.
    """
    with explained():
        from fedkrso_app.runs import compare as c
        from fedkrso_app.runs import study as s
        from fedkrso_app.runs import tables

        if study:
            given: dict[str, Any] = {
                "--strategies": strategies,
                "--arm": arm,
                "--seeds": seeds,
                "--vary": vary,
                "--rates": rates,
            }
            given |= {"--partitions": partitions, "--config": config, "--clients": clients, "--sweep": sweep or None}
            if clash := [option for option, value in given.items() if value is not None]:
                raise ConfigError(f"{', '.join(clash)}: {study} says that; change the file, or leave the file out.")
            plan = s.load(study, set_ or [])
            results, name = study.with_suffix("") / "results.jsonl", study.stem
        else:
            base = s.settings(config, set_ or [])
            if strategies is not None and arm:
                raise ConfigError("--strategies and --arm both name the arms; leave one of them out.")
            methods = {name: {"strategy": name} for name in names(strategies or "fedkrso,fedit,ffa-lora,fedfft")}
            plan = s.Study(
                base,
                {name: {"partition": name} for name in names(partitions or base["partition"])},
                dict(map(s.arm, arm)) if arm else methods if strategies is None or names(strategies) else {},
                tuple(_numbers("0,1,2" if seeds is None else seeds)),
                vary or "seed",
                clients or 10,
                (rates or 4) if sweep else 0,
            )
            results, name = None, f"compare-{base['task']}".replace("/", "-")
        folder = output or Path(str(plan.base["output-dir"])) / name
        comparison = c.Comparison(plan, folder, engine, results)
        try:
            try:
                failures = comparison.make(err, minutes)
            except c.OutOfTime:
                failures = {}
                err.print("Out of time, the current run is stopped. The same command continues from here.", **_PLAIN)
            except KeyboardInterrupt:
                err.print("Stopped, the current run too. The same command continues from here.")
                raise typer.Exit(130) from None
            command = shlex.join(["fedkrso", *sys.argv[1:]])
            facts = comparison.save(command)
            if plan.rates:
                err.print(tables.sweep([comparison.choice(*pair) for pair in plan.pairs()], c.HOLDOUT))
        finally:
            comparison.close()
            for note in comparison.journal.notes:
                err.print(note, **_PLAIN)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        out.print(tables.results(facts))
        if facts["pairs"]:
            out.print(tables.pairs(facts))
        if facts["shares"]:
            out.print(tables.shares(facts))
        drawn = results or comparison.output
        out.print(f"Made by: {command}\nDraw it: fedkrso report {shlex.quote(str(drawn))}", **_PLAIN)
    if failures:
        err.print(f"{len(failures)} failed: " + "; ".join(f"{name}: {why}" for name, why in failures.items()), **_PLAIN)
        raise typer.Exit(1)


@app.command()
def plan(
    strategies: Annotated[str, typer.Option(help="Methods, separated by commas; default: all.")] = "",
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML file with run settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One run setting.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients of the federation.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes instead of MB and MiB.")] = False,
) -> None:
    """Say what a run would cost before it starts: trained numbers, bytes both ways, and a client's memory.

    Needs the model's config.json and no weights (embedded is pretrained if it was not yet), computes nothing and takes
    no memory to speak of. The memory is that of two steps by each method's own code on a batch of full length.
    """
    with explained():
        from fedkrso_app.runs import plan as p
        from fedkrso_app.runs.study import STRATEGIES, settings

        with err.status("Counting"):
            facts = p.plan(settings(config, set_ or []), names(strategies) or list(STRATEGIES), clients)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    out.print(_costs_table(facts))
    if any(row["memory"] for row in facts["rows"]):
        out.print(_memory_table(facts))
    for line in _plan_notes(facts):
        out.print(f"- {line}", **_PLAIN)


@app.command()
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

        if [run.suffix for run in runs] == [".jsonl"] and runs[0].is_file() and not picture:
            file = output or runs[0].with_name("report.html")
            forest.write(journal.Journal(runs[0]), file)
            out.print(str(file), **_PLAIN)
            return

        file = picture or output or runs[0] / "report.html"
        found = find_runs(runs)
        with err.status(f"Drawing {len(found)} runs"):
            if picture:
                pictures.save(lines(found), picture)
            else:
                r.write(found, file)
    out.print(str(file), **_PLAIN)


@app.command()
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
    out.print(f"{folder}: version {version} of {run}", **_PLAIN)


@app.command()
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
            out.print(_layers_table(described))
        if energy:
            out.print(_energy_table(described))
    if verify:
        said = "leads to the model in" if facts["verified"] else f"leads to another model ({facts['digest']}) than"
        (out if facts["verified"] and not as_json else err).print(f"The ledger {said} result.json.", **_PLAIN)
        raise typer.Exit(0 if facts["verified"] else 1)


@app.command()
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


def _layers_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    shown = [entry for entry in entries if entry["layers"]][-_SHOWN:]
    table = Table("layer", title="How far each entry moved each layer: Frobenius norms")
    for entry in shown:
        table.add_column(f"version {entry['version']}", justify="right")
    for name in shown[-1]["layers"] if shown else ():
        table.add_row(name, *(f"{entry['layers'][name]:.4g}" for entry in shown))
    return table


def _energy_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    shown = [entry for entry in entries if entry["energy"]][-_SHOWN:]
    table = Table("layer", title="Share of the gradient's energy in the directions that each entry moved in (how many)")
    for entry in shown:
        table.add_column(f"version {entry['version']}", justify="right")
    for name in shown[-1]["energy"] if shown else ():
        table.add_row(name, *("{:.4f} ({})".format(*entry["energy"][name]) for entry in shown))
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
        title="A client's memory while it trains, MiB (2^20 bytes), by activation-memory", box=box.SIMPLE_HEAD
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


def _plan_notes(facts: Mapping[str, Any]) -> Iterator[str]:
    """What the figures mean and what moves them; each follows from a formula or from the count itself."""
    for name, reason in facts["left_out"].items():
        yield f"{name} is left out: {reason}"
    if facts["epsilon"]:
        values = ", ".join(f"{rows:,} rows {value:.2f}" for rows, value in facts["epsilon"].items())
        yield f"epsilon of the run for each example, by the rows of a client that is asked in every round: {values}."
    if facts["client_epsilon"] is not None:
        yield f"epsilon of the run for each client that is asked in every round: {facts['client_epsilon']:.2f}."
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
        for setting, reason in row["refused"].items():
            yield f"{row['strategy']}: memory with {setting!r} is not counted: {reason}"
    yield (
        "MB down: the mean over the run: no update in round 1, and of methods that send updates those that a client "
        "missed while others were asked. FedSRD's MB up are those of fedsrd.max-sparsity."
    )
    yield (
        "peak of a pass: forward and backward, gradients included; total: most at any moment. Attention is counted as "
        "written out: fused kernels keep less. On top: libraries, the allocator's reserve, packing the reply."
    )
    yield "fedkrso.rank: bytes both ways, gradients and optimizer in proportion, except for the head; lora.rank too."
    yield (
        "fedkrso.num-seeds K, fedkrso.interval J: I = local-steps / J draws a client, so K(1 - (1 - 1/K)^I) seeds up; "
        "down the same with I × clients draws. In memory an accumulator for each seed drawn, and no more."
    )
    yield "batch-size: kept for backward, in proportion; max-length: the same, and its square for attention."
    yield "wire-dtype: bytes alone. num-server-rounds: GB in all; fraction-train: these, and what a client missed."


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in names(text)]
    except ValueError:
        raise ConfigError(f"--seeds {text!r} are not whole numbers separated by commas, such as 0,1,2.") from None
