"""A study made: one run for each case, arm and draw, kept, resumed or reported as failed; then the tables.

The status in a run's folder says how the run ended: ``flwr run`` also returns 0 when the run has crashed.
"""

import csv
import json
import re
import shutil
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text

from fedkrso_app import data
from fedkrso_app.config import ConfigError
from fedkrso_app.runs import engines, journal, paired, pins, replay
from fedkrso_app.runs.energy import captured
from fedkrso_app.runs.engines import Engine
from fedkrso_app.runs.folder import ASIDE, Run
from fedkrso_app.runs.journal import Journal
from fedkrso_app.runs.results import mean_sd
from fedkrso_app.runs.study import Settings, Study, grid, rate_of, settings
from fedkrso_app.runs.summary import line
from fedkrso_app.strategies import STRATEGIES, parse
from fedkrso_app.training import metrics

HOLDOUT = 0.2  # share of the training rows that a sweep judges by


class OutOfTime(Exception):
    """The minutes are over; what is missing can be made later."""


@dataclass(frozen=True)
class Job:
    """One run of a comparison, with the config that makes it."""

    case: str
    arm: str
    draw: int
    config: Settings
    sweep: bool = False

    @property
    def run(self) -> Run:
        return _run(self.config)


class Comparison:
    """A study made in the folder ``output``; its finished runs are lines of ``results``.

    Without ``results`` they are in ``output``/results.jsonl, and every run keeps its folder; else the folder of a run
    is deleted once its line is written. Raises ConfigError where that cannot be, before anything is written.
    """

    def __init__(self, study: Study, output: Path, engine: Engine = "flower", results: Path | None = None) -> None:
        engines.check(engine)
        self.study, self.engine, self.keeps = study, engine, results is None
        self.output = output.expanduser().resolve()
        self.configs = {pair: study.settings(*pair) for pair in study.pairs()}
        for config in self.configs.values():
            config |= pins.hold(parse(config), self.output / "commits.json")
        self.metrics = {pair: data.metric(config) for pair, config in self.configs.items()}
        jobs = [self._job(*pair, draw) for pair in study.pairs() for draw in study.draws]
        if len({job.config["run-name"] for job in jobs}) < len(jobs):
            raise ConfigError("two arms or cases have the same name but for spaces and signs; give one another name.")
        self.journal = Journal(results or self.output / "results.jsonl")
        file = self.output / "clients"
        now = f"{study.clients}" + (f" --engine {engine}" if engine != "flower" else "")  # times and memory differ
        before = file.read_text().strip() if file.is_file() else now
        if before != now:
            raise ConfigError(f"{output} was made with --clients {before}, not {now}; choose another --output.")
        defaults = settings(None, [])
        self.journal.expect((*pair, self._defining(config), defaults) for pair, config in self.configs.items())
        self.output.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{now}\n")
        self.journal.lock()

    def close(self) -> None:
        self.journal.close()

    def make(self, console: Console, minutes: float | None = None) -> dict[str, str]:
        """Make all runs, case by case, after a sweep if the study asks for one; returns why those that failed did.

        Draws come one after another, each with every arm, so that what is there can be compared at any time. Raises
        OutOfTime after ``minutes``; the run that was being made can be resumed.
        """
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        failures: dict[str, str] = {}
        for case in self.study.cases:
            failures |= self._make(self._tried(case), deadline, console)
            rates = {arm: self.rate(case, arm) for arm in self.study.arms}
            failures |= {f"{arm}-{case}": "every learning rate failed" for arm, rate in rates.items() if rate is None}
            jobs = [
                self._job(case, arm, draw, rate)
                for draw in self.study.draws
                for arm, rate in rates.items()
                if rate is not None
            ]
            failures |= self._make(jobs, deadline, console)
        return failures

    def rate(self, case: str, arm: str) -> float | None:
        """The learning rate of an arm in a case: that of its settings, or what the sweep chose. None if all failed."""
        config = self.configs[case, arm]
        return self.choice(case, arm)["best"] if self.study.rates else rate_of(config)

    def choice(self, case: str, arm: str) -> dict[str, Any]:
        """What a sweep found: the rate with the best score, the mean over the sweep's draws.

        ``best`` is None where no rate has completed every draw; ``edge`` says that a better one may lie outside the
        grid.
        """
        config, every = self.configs[case, arm], self._tried(case)
        rates = grid(rate_of(config), self.study.rates)
        scores: list[float | None] = []
        for rate in rates:
            lines = [self._line(job) for job in every if job.arm == arm and rate_of(job.config) == rate]
            whole = [paired.score(line["rounds"]) for line in lines if line]
            scores.append(fmean(whole) if len(whole) == len(lines) else None)
        ranked = [(score, rate) for score, rate in zip(scores, rates, strict=True) if score is not None]
        top = metrics.best(self.metrics[case, arm], (score for score, _ in ranked)) if ranked else None
        best = max((rate for score, rate in ranked if score == top), default=None)
        found = {"case": case, "arm": arm, "strategy": config["strategy"], "partition": config["partition"]}
        return found | {"rates": rates, "scores": scores, "best": best, "edge": best in (rates[0], rates[-1])}

    def lines(self, case: str, arm: str) -> dict[int, dict[str, Any]]:
        """The finished runs of an arm in a case, at its learning rate: draw -> line of the journal."""
        rate = self.rate(case, arm)
        jobs = [self._job(case, arm, draw, rate) for draw in self.study.draws] if rate is not None else []
        return {job.draw: line for job in jobs if (line := self._line(job))}

    def save(self, command: str) -> dict[str, Any]:
        """Write results.csv, results.json and, of a sweep, sweep.json; returns what results.json holds."""
        for case, arm in self.study.pairs():
            made = [line for line in self.journal.find(case, arm) if not line["sweep"]]
            if others := sum(line["rate"] != self.rate(case, arm) for line in made):
                note = f"{others} runs of arm {arm!r} in case {case!r} had another learning rate and are not counted."
                self.journal.notes.append(f"{self.journal.file}: {note}")
        table = [self._row(*pair) for pair in self.study.pairs()]
        with open(self.output / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        pairs, shares = list[dict[str, Any]](), list[dict[str, Any]]()
        for case in self.study.cases:
            arms = {arm: self.lines(case, arm) for arm in self.study.arms}
            curves = {arm: {draw: line["rounds"] for draw, line in lines.items()} for arm, lines in arms.items()}
            pairs += [{"case": case, **row} for row in paired.differences(curves)]
            if self.study.span:
                shares += [{"case": case, **row} for row in paired.kept(curves, *self.study.span)]
        facts = {
            "command": command,
            "task": ", ".join(dict.fromkeys(config["task"] for config in self.configs.values())),
            "metric": ", ".join(dict.fromkeys(self.metrics.values())),
            "head": ", ".join(dict.fromkeys(config["head"] for config in self.configs.values())),
            "clients": self.study.clients,
            "engine": self.engine,
            "rows": table,
            "pairs": pairs,
            "span": list(self.study.span),
            "shares": shares,
            "results": str(self.journal.file),
        }
        (self.output / "results.json").write_text(json.dumps(facts, indent=2) + "\n")
        if self.study.rates:
            (self.output / "sweep").mkdir(exist_ok=True)
            choices = [self.choice(*pair) for pair in self.study.pairs()]
            (self.output / "sweep" / "sweep.json").write_text(json.dumps(choices, indent=2) + "\n")
        return facts

    def _row(self, case: str, arm: str) -> dict[str, Any]:
        """An arm in a case over its finished runs: means, and sample sds of the last metric and of the score."""
        config, lines = self.configs[case, arm], list(self.lines(case, arm).values())
        row: dict[str, Any] = {"case": case, "arm": arm, "strategy": config["strategy"]}
        row |= {"partition": config["partition"], "learning_rate": self.rate(case, arm), "draws": len(lines)}
        row["metric"], row["metric_sd"] = mean_sd([line["rounds"][-1][1] for line in lines])
        row["score"], row["score_sd"] = mean_sd([paired.score(line["rounds"]) for line in lines])
        for key in ("uplink_mb", "downlink_mb", "paper_mb", "client_peak_mb", "step_ms", "seconds_per_round", "lost"):
            row[key] = mean_sd([line["figures"][key] for line in lines])[0]
        return row

    def _make(self, wanted: Sequence[Job], deadline: float | None, console: Console) -> dict[str, str]:
        """Make the runs that are not finished yet, those that failed before last; returns why those that failed did.

        Raises ConfigError, before anything starts, if a folder holds a run with other settings.
        """
        todo = [job for job in wanted if not self._finished(job)]
        todo.sort(key=lambda job: job.run.status.startswith("failed"))
        failures: dict[str, str] = {}
        bar = Progress(
            "rounds",
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            speed_estimate_period=7200,
            console=console,
        )
        before = [_rounds(job.config) for job in todo]
        missing = [job.config["num-server-rounds"] - made for job, made in zip(todo, before, strict=True)]
        task = bar.add_task("", total=sum(missing))
        with Live(console=console, transient=True) as live:
            for i, job in enumerate(todo):
                title = f"{len(wanted) - len(todo) + i + 1} of {len(wanted)}  {job.config['run-name']}"
                with closing(_play(job.config, self.study.clients, self.engine)) as playing:
                    for _ in playing:
                        if deadline is not None and time.monotonic() > deadline:
                            raise OutOfTime
                        live.update(Group(Text(f"{title}\n{_last(job.config)}"), bar))
                        bar.update(task, completed=sum(missing[:i]) + _rounds(job.config) - before[i])
                outcome = _last(job.config)
                if not self._finished(job):
                    outcome = failures[job.config["run-name"]] = _why(job.config)
                console.print(f"{title}  {outcome}", markup=False, highlight=False, soft_wrap=True)
        return failures

    def _finished(self, job: Job) -> bool:
        """Whether the journal has the run's line; a completed run without one gets it."""
        if self._line(job):
            return True
        if not _complete(job.config):
            return False
        config = job.config
        about = {"case": job.case, "arm": job.arm, "task": config["task"], "metric": self.metrics[job.case, job.arm]}
        about |= {"config": self._defining(self.configs[job.case, job.arm])}
        line = journal.line_of(job.run, job.draw, rate_of(config), job.sweep)
        if self.study.energy and not job.sweep:
            line["energy"] = [
                [version, float(f"{shares['all'][0]:.4g}"), shares["all"][1]]
                for version, shares in captured(*replay.opened(job.run.path)).items()
            ]
        self.journal.add(about, line)
        if not self.keeps:
            shutil.rmtree(job.run.path)
            for ending in (".log", ".toml"):
                _beside(config, ending).unlink(missing_ok=True)
        return True

    def _line(self, job: Job) -> dict[str, Any] | None:
        wanted = {"draw": job.draw, "rate": rate_of(job.config), "sweep": job.sweep}
        found = (line for line in self.journal.find(job.case, job.arm) if wanted.items() <= line.items())
        return next(found, None)

    def _tried(self, case: str) -> list[Job]:
        """The runs of a sweep in a case, the same learning rates and draws for every arm."""
        return [
            self._job(case, arm, draw, rate, sweep=True)
            for arm in self.study.arms
            for draw in self.study.sweep_draws
            for rate in grid(rate_of(self.configs[case, arm]), self.study.rates)
        ]

    def _job(self, case: str, arm: str, draw: int, rate: float | None = None, sweep: bool = False) -> Job:
        config, vary = self.configs[case, arm], self.study.vary
        drawn = f"{'seed' if vary == 'seed' else 'draw'}{draw}"
        parts = [arm, case, drawn]
        if sweep:
            parts = [arm, case, f"rate{rate:g}", *([drawn] if len(self.study.sweep_draws) > 1 else [])]
        name = re.sub(r"[^\w.=-]+", "-", "-".join(parts))
        places = {"output-dir": str(self.output / ("sweep" if sweep else "")), "run-name": name, "resume": ""}
        key = STRATEGIES[config["strategy"]].learning_rate_key
        changes = {vary: draw, key: rate or config[key]} | ({"holdout": HOLDOUT} if sweep else {})
        return Job(case, arm, draw, parse(config | changes | places).to_dict(), sweep)

    def _defining(self, config: Settings) -> dict[str, Any]:
        return journal.defining(config, self.study.clients, self.study.vary)


def _play(config: Settings, clients: int, engine: Engine) -> Generator[None]:
    """Make or resume one run; yields now and then until it has ended."""
    run, log, file = _run(config), _beside(config, ".log"), _beside(config, ".toml")
    log.parent.mkdir(parents=True, exist_ok=True)
    if run.path.exists():
        engines.stop(log)  # Flower continues a run whose watcher was killed
        run.set_status("running")  # so that an old failure is not taken for a new one
        config = config | {"resume": str(run.path)}
    file.write_text("".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items()))
    yield from engines.play(engine, file, clients, int(config["clients-per-node"]), log)


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
    return line(figures[0], parse(config), data.metric(config)) if figures else "starting"
