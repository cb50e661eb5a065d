"""Methods × partitions × seeds on one task: one run each, kept, resumed or reported as failed; then the table.

The status in a run's folder says how the run ended: ``flwr run`` also returns 0 when the run has crashed.
"""

import csv
import json
import tomllib
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text

from fedkrso_app import data
from fedkrso_app.config import ConfigError, flatten, resolved_path
from fedkrso_app.runs import engines
from fedkrso_app.runs.engines import APP, Engine
from fedkrso_app.runs.folder import ASIDE, Run
from fedkrso_app.runs.results import mean_sd, measures
from fedkrso_app.runs.summary import line
from fedkrso_app.strategies import STRATEGIES, parse
from fedkrso_app.training import metrics

Settings = dict[str, Any]  # a flat run config with every key

HOLDOUT, FACTOR, LAST = 0.2, 2.0, 3  # of a sweep: share of the training rows, step of the grid, rounds in the score


def settings(file: Path | None, assignments: Sequence[str]) -> Settings:
    """pyproject.toml's defaults, changed by the TOML ``file`` and then by ``key=value``; not checked yet.

    Raises ConfigError where something cannot be read.
    """
    try:
        project = tomllib.loads((APP / "pyproject.toml").read_text())
        flat = flatten(project["tool"]["flwr"]["app"]["config"])
        flat |= flatten(tomllib.loads(file.expanduser().read_text())) if file else {}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the settings cannot be read: {error}.") from None
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment!r} is not key=value.")
        try:
            flat[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            flat[key] = value  # a string without quotes
    for key in ("model", "data-dir"):  # Flower's engine runs in a folder of its own
        if flat[key] and Path(str(flat[key])).expanduser().exists():
            flat[key] = str(resolved_path(str(flat[key])))
    return flat


class Plan:
    """All methods × partitions × seeds, in the folder ``output``. Raises ConfigError where that cannot be."""

    def __init__(
        self,
        base: Settings,
        strategies: list[str],
        partitions: list[str],
        seeds: list[int],
        output: Path,
        clients: int,
        engine: Engine = "flower",
    ) -> None:
        if not (strategies and partitions and seeds) or base["evaluate"] == "off":
            raise ConfigError(
                "a comparison needs a method, a partition and a seed at least, and evaluate = 'server' or 'clients'."
            )
        engines.check(engine)
        self.base, self.seeds, self.output = base, seeds, output.expanduser().resolve()
        self.clients, self.engine = clients, engine
        pairs = [{"partition": partition, "strategy": strategy} for partition in partitions for strategy in strategies]
        self.pairs = [parse(base | pair).to_dict() for pair in pairs]
        self.runs = [self._job(pair, f"seed{seed}", seed=seed) for pair in self.pairs for seed in seeds]
        self.metric = data.task(base["task"]).metric
        file = self.output / "clients"
        now = f"{clients}" + (f" --engine {engine}" if engine != "flower" else "")  # times and memory differ
        before = file.read_text().strip() if file.is_file() else now
        if before != now:
            raise ConfigError(f"{output} was made with --clients {before}, not {now}; choose another --output.")
        self.output.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{now}\n")

    def sweep(self, count: int, console: Console) -> list[dict[str, Any]]:
        """Try ``count`` learning rates for every pair; returns what :func:`choose` does, and writes sweep.json."""
        if self.base["holdout"]:
            raise ConfigError("a sweep holds training rows back by itself: leave out holdout, or --sweep.")
        tried = [
            self._job(pair, f"rate{rate:g}", "sweep", rate, seed=0, holdout=HOLDOUT)
            for pair in self.pairs
            for rate in grid(rate_of(pair), count)
        ]
        make(tried, self.clients, self.engine, console)
        choices = choose(tried)
        (self.output / "sweep" / "sweep.json").write_text(json.dumps(choices, indent=2) + "\n")
        return choices

    def run(self, choices: Sequence[Mapping[str, Any]], console: Console) -> dict[str, str]:
        """Make all runs, at the rates of ``choices`` if there are any; returns why those that failed did, by name."""
        rates = {(choice["strategy"], choice["partition"]): choice["best"] for choice in choices}
        failures = {f"{s}-{p}": "every learning rate failed" for (s, p), best in rates.items() if best is None}
        self.pairs = [pair for pair in self.pairs if f"{pair['strategy']}-{pair['partition']}" not in failures]
        self.runs = [
            self._job(pair, f"seed{seed}", "", rates.get((pair["strategy"], pair["partition"])), seed=seed)
            for pair in self.pairs
            for seed in self.seeds
        ]
        return failures | make(self.runs, self.clients, self.engine, console)

    def save(self, command: str) -> dict[str, Any]:
        """Write results.csv and results.json; returns what the latter holds."""
        table = rows(self.runs)
        with open(self.output / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]) if table else [])
            writer.writeheader()
            writer.writerows(table)
        runs = [(config["seed"], _run(config)) for config in self.runs if _run(config).path.exists()]
        facts = {
            "command": command,
            "task": self.base["task"],
            "metric": self.metric,
            "head": self.base["head"],
            "clients": self.clients,
            "engine": self.engine,
            "rows": table,
            "runs": [{"run": run.path.name, "seed": seed, "status": run.status, **measures(run)} for seed, run in runs],
        }
        (self.output / "results.json").write_text(json.dumps(facts, indent=2) + "\n")
        return facts

    def _job(self, pair: Settings, what: str, inside: str = "", rate: float | None = None, **changes: Any) -> Settings:
        name = f"{pair['strategy']}-{pair['partition']}-{what}"
        places = {"output-dir": str(self.output / inside), "run-name": name, "resume": ""}
        key = STRATEGIES[pair["strategy"]].learning_rate_key
        return parse(pair | changes | places | {key: rate or pair[key]}).to_dict()


def rate_of(config: Settings) -> float:
    """The learning rate of the config's own method."""
    return config[STRATEGIES[config["strategy"]].learning_rate_key]


def grid(rate: float, count: int) -> list[float]:
    """``count`` rates, each twice the one before, ``rate`` in their middle or just below it."""
    return [float(f"{rate * FACTOR ** (i - (count - 1) // 2):.6g}") for i in range(count)]


def choose(tried: Sequence[Settings]) -> list[dict[str, Any]]:
    """Per strategy and partition the rate with the best score: the mean metric of a completed run's last rounds.

    ``best`` is None where no run has completed; ``edge`` says that a better one may lie outside the grid.
    """
    choices = []
    for (strategy, partition), group in _by_pair(tried).items():
        rates, scores = [rate_of(config) for config in group], [_score(_run(config)) for config in group]
        ranked = [(score, rate) for score, rate in zip(scores, rates, strict=True) if score is not None]
        metric = data.task(group[0]["task"]).metric
        top = metrics.best(metric, (score for score, _ in ranked)) if ranked else None
        best = max((rate for score, rate in ranked if score == top), default=None)
        choice = {"strategy": strategy, "partition": partition, "rates": rates, "scores": scores, "best": best}
        choices.append(choice | {"edge": best in (rates[0], rates[-1])})
    return choices


def make(wanted: Sequence[Settings], clients: int, engine: Engine, console: Console) -> dict[str, str]:
    """Make the runs that are not complete yet; returns why those that failed did, by run-name.

    Raises ConfigError, before anything starts, if a folder holds a run with other settings.
    """
    todo = [config for config in wanted if not _complete(config)]
    failures: dict[str, str] = {}
    bar = Progress(
        "rounds", MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), speed_estimate_period=7200, console=console
    )
    before = [_rounds(config) for config in todo]
    missing = [config["num-server-rounds"] - made for config, made in zip(todo, before, strict=True)]
    task = bar.add_task("", total=sum(missing))
    with Live(console=console, transient=True) as live:
        for i, config in enumerate(todo):
            title = f"{len(wanted) - len(todo) + i + 1} of {len(wanted)}  {config['run-name']}"
            with closing(_play(config, clients, engine)) as playing:
                for _ in playing:
                    live.update(Group(Text(f"{title}\n{_last(config)}"), bar))
                    bar.update(task, completed=sum(missing[:i]) + _rounds(config) - before[i])
            if _run(config).status != "completed":
                failures[config["run-name"]] = _why(config)
            told = failures.get(config["run-name"], _last(config))
            console.print(f"{title}  {told}", markup=False, highlight=False, soft_wrap=True)
    return failures


def rows(made: Sequence[Settings]) -> list[dict[str, Any]]:
    """One row per strategy and partition over its completed runs: mean and sample sd of the last metric, mean costs."""
    table = []
    for (strategy, partition), group in _by_pair(made).items():
        figures = [measures(_run(config)) for config in group if _run(config).status == "completed"]
        mean, sd = mean_sd([f["metric"] for f in figures])
        row = {"strategy": strategy, "partition": partition, "learning_rate": rate_of(group[0]), "seeds": len(figures)}
        row |= {"metric": mean, "metric_sd": sd}
        for key in ("uplink_mb", "downlink_mb", "paper_mb", "client_peak_mb", "step_ms", "seconds_per_round", "lost"):
            row[key] = mean_sd([f[key] for f in figures])[0]
        table.append(row)
    return table


def _play(config: Settings, clients: int, engine: Engine) -> Generator[None]:
    """Make or resume one run; yields now and then until it has ended."""
    run, log, file = _run(config), _beside(config, ".log"), _beside(config, ".toml")
    log.parent.mkdir(parents=True, exist_ok=True)
    if run.path.exists():
        engines.stop(log)  # Flower continues a run whose watcher was killed
        run.set_status("running")  # so that an old failure is not taken for a new one
        config = config | {"resume": str(run.path)}
    file.write_text("".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items()))
    yield from engines.play(engine, file, clients, log)


def _why(config: Settings) -> str:
    """Why a run is not complete: its status, or else what its log says."""
    status, log = _run(config).status, _beside(config, ".log")
    return status if status.startswith("failed") else f"failed: {engines.said(log)} (log: {log})"


def _complete(config: Settings) -> bool:
    run = _run(config)
    if not run.path.exists():
        return False
    before = run.info["config"]
    for key, value in config.items():
        if key not in ASIDE and before.get(key) != value:
            raise ConfigError(
                f"{run.path} was made with {key} = {before.get(key)!r}, now it is {value!r}; "
                "choose another --output, or remove that folder."
            )
    return run.status == "completed"


def _run(config: Settings) -> Run:
    return Run(Path(config["output-dir"]) / config["run-name"])


def _beside(config: Settings, ending: str) -> Path:
    return Path(config["output-dir"]) / (config["run-name"] + ending)


def _rounds(config: Settings) -> int:
    """The newest round of a run."""
    return max([figures["round"] for figures in _run(config).metrics()], default=0)


def _last(config: Settings) -> str:
    """The newest round of a run in one line."""
    figures = _run(config).metrics()[-1:]
    return line(figures[0], parse(config), data.task(config["task"]).metric) if figures else "starting"


def _score(run: Run) -> float | None:
    """What a sweep goes by; None for a run that did not complete."""
    metrics = [figures["metric"] for figures in run.metrics() if figures["round"]]
    return fmean(metrics[-LAST:]) if run.status == "completed" else None


def _by_pair(made: Sequence[Settings]) -> dict[tuple[str, str], list[Settings]]:
    groups: dict[tuple[str, str], list[Settings]] = {}
    for config in made:
        groups.setdefault((config["strategy"], config["partition"]), []).append(config)
    return groups
