"""A comparison drawn from its journal alone: differences with intervals, and the metric against megabytes."""

import statistics
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from fedkrso_app.config import ConfigError
from fedkrso_app.runs import pictures, report
from fedkrso_app.runs.journal import Journal
from fedkrso_app.runs.paired import LAST, Rounds, differences, score, spent
from fedkrso_app.runs.results import mean_sd, plus_minus
from fedkrso_app.runs.tables import difference
from fedkrso_app.training.metrics import LOWER_IS_BETTER

_VIEWS = {"steps": "at equal steps", "bytes": "at equal bytes"}
_FOOTER = (
    f"Last {LAST}: the mean of the metric over the last {LAST} rounds, ± the sample standard deviation over the draws. "
    "Differences are of this mean, paired over the draws, with 95 % intervals by Student's t, each by itself; a star "
    "marks those without 0. At equal bytes both arms have the rounds that fit into the megabytes of the cheaper one. "
    "MB are 10^6 bytes that one client sent and received, measured on the wire. Bands reach from the lowest draw to "
    "the highest."
)


@dataclass
class Arm:
    """An arm in a case: draw -> the rounds of its finished run, at one learning rate."""

    label: str
    style: int
    rate: float
    draws: dict[int, Rounds]

    def curves(self) -> tuple[list[int], list[float], list[list[float]]]:
        """Rounds that all draws have, mean megabytes of one client up to each, and the draws' metrics in each."""
        runs = [{row[0]: row for row in rounds} for rounds in self.draws.values()]
        rounds = sorted(set.intersection(*(set(run) for run in runs)))
        megabytes = [accumulate((run[n][2] + run[n][3]) / 1e6 for n in rounds) for run in runs]
        means = [statistics.fmean(values) for values in zip(*megabytes, strict=True)]
        return [int(n) for n in rounds], means, [[run[n][1] for run in runs] for n in rounds]


@dataclass
class Shares:
    """Draw -> version -> share of the gradient's energy, of an arm whose runs tell it."""

    label: str
    style: int
    draws: list[dict[int, float]]

    def curves(self) -> tuple[list[int], list[float], list[list[float]]]:
        """Versions that all draws have, nothing about megabytes, and in each the draws' shares."""
        versions = sorted(set.intersection(*(set(draw) for draw in self.draws)))
        return versions, [], [[draw[version] for draw in self.draws] for version in versions]


def finished(journal: Journal, case: str) -> list[Arm]:
    """The arms of a case with a finished run. Runs of a sweep do not count, and of an arm with runs at several learning
    rates only those at the rate of the last line do."""
    arms = []
    names = [facts["arm"] for facts in journal.settings.values() if facts["case"] == case]
    for style, name in enumerate(dict.fromkeys(names)):
        runs = [run for run in journal.find(case, name) if not run["sweep"]]
        if runs:
            rate = runs[-1]["rate"]
            arms.append(Arm(name, style, rate, {run["draw"]: run["rounds"] for run in runs if run["rate"] == rate}))
    return arms


def write(journal: Journal, file: Path) -> None:
    """Write the page about the runs of ``journal`` to ``file``. Raises ConfigError where none is finished."""
    metrics = {facts["case"]: facts["metric"] for facts in journal.settings.values()}
    found = {case: arms for case in metrics if (arms := finished(journal, case))}
    sections = [_section(case, arms, metrics[case], shares(journal, case, arms)) for case, arms in found.items()]
    if not sections:
        raise ConfigError(f"{journal.file} has no finished run yet: continue the comparison.")
    made = {f"{run['device']} with torch {run['versions']['torch']}, commit {run['commit']}" for run in journal.runs}
    configs = {
        f"{facts['arm']} in {facts['case']}": {"task": facts["task"]} | facts["config"]
        for facts in journal.settings.values()
    }
    runs = sum(not run["sweep"] for run in journal.runs)
    if others := runs - sum(len(arm.draws) for arms in found.values() for arm in arms):
        journal.notes.append(f"{others} runs are not counted: their arm was run again, at another learning rate.")
    intro = f"{runs} finished runs and {len(journal.runs) - runs} of sweeps, made on {'; '.join(sorted(made))}."
    settings = report.settings_of(configs, "arm in case")
    report.render(file, journal.file.parent.name, intro, sections, settings, _FOOTER, " ".join(journal.notes))


def shares(journal: Journal, case: str, arms: list[Arm]) -> list[Shares]:
    """Those of ``arms`` whose runs tell the share of the gradient's energy, for two versions at least."""
    found = []
    for arm in arms:
        runs = [
            r for r in journal.find(case, arm.label) if not r["sweep"] and r["rate"] == arm.rate and r.get("energy")
        ]
        curve = Shares(arm.label, arm.style, [{row[0]: row[1] for row in run["energy"]} for run in runs])
        if runs and len(curve.curves()[0]) > 1:
            found.append(curve)
    return found


def _section(case: str, arms: list[Arm], metric: str, energy: list[Shares]) -> dict[str, Any]:
    apart = differences({arm.label: arm.draws for arm in arms})
    better = ", lower is better" if metric in LOWER_IS_BETTER else ""
    head = ["arm", "rate", "draws", f"{metric}{better}, last round", f"last {LAST}", "MB per client, all rounds"]
    rows = [
        [
            arm.label,
            f"{arm.rate:g}",
            len(arm.draws),
            plus_minus(*mean_sd([rounds[-1][1] for rounds in arm.draws.values()])),
            plus_minus(*mean_sd([score(rounds) for rounds in arm.draws.values()])),
            f"{statistics.fmean(map(spent, arm.draws.values())) / 1e6:.2f}",
        ]
        for arm in arms
    ]
    cells = [[f"{r['a']} − {r['b']}", _VIEWS[r["view"]], r["draws"], difference(r)] for r in apart]
    tables: list[Any] = [(head, rows)]
    tables += [(["difference", "compared", "draws", "mean [95 % interval]"], cells)] if apart else []
    drawn = [pictures.forest(apart, metric)] if apart else []
    drawn += [pictures.curves(arms, metric, by_bytes) for by_bytes in (True, False)]
    drawn += [pictures.curves(energy, "share of the gradient's energy", False)] if energy else []
    return {"title": case, "pictures": drawn, "tables": tables}
