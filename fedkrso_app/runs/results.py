"""Finished and unfinished runs as figures: what each came to, and which of them are repeats of one another."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from fedkrso_app.config import ConfigError
from fedkrso_app.data.tasks import metric
from fedkrso_app.runs.folder import ASIDE, Run
from fedkrso_app.strategies import STRATEGIES

RATES = {strategy.learning_rate_key for strategy in STRATEGIES.values()}
_REPEATS = {"seed", *ASIDE}  # what the repeats of one line may differ in


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs that ``paths`` name: a run's folder itself, or all run folders directly inside. Raises ConfigError."""
    found: dict[Path, Run] = {}
    for path in paths:
        folders = [path] if (path / "config.json").is_file() else sorted(c.parent for c in path.glob("*/config.json"))
        if not folders:
            raise ConfigError(f"{path} is neither a run's folder nor holds any: there is no config.json in it.")
        found |= {folder.resolve(): Run(folder) for folder in folders}
    return list(found.values())


def replied_in(line: dict[str, Any]) -> int:
    """How many replies a line of metrics.jsonl tells of, those refused included."""
    return line["clients"] + line["refused"]


def asked_in(line: dict[str, Any]) -> int:
    return replied_in(line) + line["failed"]


def measures(run: Run) -> dict[str, Any]:
    """What a run came to: its last metric, megabytes (10**6) of one client and round, typical seconds and memory."""
    rounds = [line for line in run.metrics() if line["round"]]
    asked, replied = (max(1, sum(count(line) for line in rounds)) for count in (asked_in, replied_in))
    shared = {"uplink": replied, "downlink": asked, "paper": asked}  # who failed sent nothing up
    megabytes = {key: sum(line[f"{key}_bytes"] for line in rounds) / count / 1e6 for key, count in shared.items()}
    steps = run.info["config"]["local-steps"]
    return {
        "rounds": len(rounds),
        "metric": rounds[-1].get("metric") if rounds else None,
        **{f"{key}_mb": value for key, value in megabytes.items()},
        # Medians, since the first round of a simulation also starts the workers.
        "seconds_per_round": statistics.median([line["seconds"] for line in rounds] or [0]),
        "step_ms": statistics.median([line["client_seconds"] for line in rounds] or [0]) * 1000 / steps,
        "client_peak_mb": max([line["client_peak_bytes"] for line in rounds], default=0) / 1e6,
        **{key: sum(line[key] for line in rounds) for key in ("clients", "refused", "failed")},
        "lost": sum(line["refused"] + line["failed"] for line in rounds),
    }


def mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    return (statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None)


def plus_minus(mean: float | None, sd: float | None) -> str:
    """``0.8123 ± 0.0045``, without the spread where there is none, or a dash."""
    return "–" if mean is None else f"{mean:.4f}" + (f" ± {sd:.4f}" if sd is not None else "")


@dataclass
class Line:
    """One method with one choice of settings; its runs are repeats over seeds."""

    config: dict[str, Any]
    runs: list[Run]
    label: str = ""
    style: int = 0

    @property
    def setting(self) -> tuple[str, str]:
        """The task with its metric, and how its rows are split among clients: what one picture is about."""
        c = self.config
        alpha = f", α = {c['dirichlet-alpha']:g}" if c["partition"].startswith("dirichlet") else ""
        schemes = {"iid": "IID", "dirichlet": "Dirichlet", "dirichlet-equal": "Dirichlet of equal size"}
        task = c["task"] + (f" ({self.metric})" if c.get("metric") else "")
        return task, schemes.get(c["partition"], c["partition"]) + alpha

    @property
    def metric(self) -> str:
        return metric(self.config)

    @property
    def rate(self) -> float:
        return self.config[STRATEGIES[self.config["strategy"]].learning_rate_key]

    def whole(self) -> list[Run]:
        """The completed repeats, or all of them where none is complete."""
        return [run for run in self.runs if run.status == "completed"] or self.runs

    def of(self, key: str) -> list[float]:
        """``measures()[key]`` of every repeat that has it."""
        return [value for value in (measures(run)[key] for run in self.whole()) if value is not None]

    def mean(self, key: str) -> float:
        return mean_sd(self.of(key))[0] or 0.0

    def curves(self) -> tuple[list[int], list[float], list[list[float]]]:
        """Rounds that all repeats have, megabytes of one client up to each, and the repeats' metrics in each."""
        repeats = [{line["round"]: line for line in run.metrics() if "metric" in line} for run in self.whole()]
        rounds = sorted(set.intersection(*(set(lines) for lines in repeats)))
        spent = [accumulate(megabytes_of(lines[number]) for number in rounds) for lines in repeats]
        metrics = [[lines[number]["metric"] for lines in repeats] for number in rounds]
        return rounds, [statistics.fmean(values) for values in zip(*spent, strict=True)], metrics


def lines(runs: Sequence[Run]) -> list[Line]:
    """Runs grouped by all settings but the seed, with labels that tell those of one picture apart."""
    grouped: dict[str, Line] = {}
    for run in runs:
        config = run.info["config"]
        if config["strategy"] not in STRATEGIES:
            raise ConfigError(f"{run.path}: strategy = {config['strategy']!r} is not one of {', '.join(STRATEGIES)}.")
        others = RATES - {STRATEGIES[config["strategy"]].learning_rate_key}
        kept = {key: value for key, value in config.items() if key not in _REPEATS | others}
        # How many clients there were is no setting, and a resumed run may have had more rounds than it began with.
        recorded = run.metrics()
        kept["clients"] = max((asked_in(line) for line in recorded), default=0)
        kept["num-server-rounds"] = max([kept["num-server-rounds"], *(line["round"] for line in recorded)])
        grouped.setdefault(repr(sorted(kept.items())), Line(kept, [])).runs.append(run)
    methods = list(STRATEGIES)
    found = sorted(
        grouped.values(), key=lambda line: (*line.setting[::-1], methods.index(line.config["strategy"]), line.rate)
    )
    found.sort(key=lambda line: line.config["partition"] != "iid")
    for line in found:
        beside = [other for other in found if other.setting == line.setting]
        rivals = [other for other in beside if other.config["strategy"] == line.config["strategy"]]
        differing = [  # a method's own settings ("lora.rank") tell its lines apart, what all have tells all apart
            key
            for key in line.config
            if key != "strategy" and len({repr(r.config.get(key)) for r in (rivals if "." in key else beside)}) > 1
        ]
        extra = [f"{'rate' if key in RATES else key} {text(line.config[key])}" for key in differing]
        line.label = ", ".join([line.config["strategy"], *extra])
    order = list(dict.fromkeys(line.label for line in found))
    for line in found:
        line.style = order.index(line.label)  # the same look in every picture of the page
    return found


def megabytes_of(line: dict[str, Any]) -> float:
    """Up and down, of one client, in one round."""
    up, down = line["uplink_bytes"] / max(1, replied_in(line)), line["downlink_bytes"] / max(1, asked_in(line))
    return (up + down) / 1e6


def text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) or "–"
