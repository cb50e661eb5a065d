"""``fedkrso compare``."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedkrso_app.cli.console import PLAIN, err, explained, out
from fedkrso_app.config import ConfigError, names


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
                err.print("Out of time, the current run is stopped. The same command continues from here.", **PLAIN)
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
                err.print(note, **PLAIN)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        out.print(tables.results(facts))
        if facts["pairs"]:
            out.print(tables.pairs(facts))
        if facts["shares"]:
            out.print(tables.shares(facts))
        drawn = results or comparison.output
        out.print(f"Made by: {command}\nDraw it: fedkrso report {shlex.quote(str(drawn))}", **PLAIN)
    if failures:
        err.print(f"{len(failures)} failed: " + "; ".join(f"{name}: {why}" for name, why in failures.items()), **PLAIN)
        raise typer.Exit(1)


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in names(text)]
    except ValueError:
        raise ConfigError(f"--seeds {text!r} are not whole numbers separated by commas, such as 0,1,2.") from None
