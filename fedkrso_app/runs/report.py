"""Runs as one HTML page that needs nothing else: what was learned, sent and spent, and with which settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template

from fedkrso_app.runs import pictures
from fedkrso_app.runs.folder import Run
from fedkrso_app.runs.results import Line, lines, mean_sd, plus_minus, text

# Column of the table -> figure of a run, and its digits after the point; means over the seeds.
_MEANS = {
    "MB up": ("uplink_mb", 3),
    "MB down": ("downlink_mb", 3),
    "MB, paper": ("paper_mb", 3),
    "s per round": ("seconds_per_round", 1),
    "ms per step": ("step_ms", 0),
    "client MB": ("client_peak_mb", 0),
}
_SUMS = {"replies": "clients", "refused": "refused", "failed": "failed"}


def write(runs: Sequence[Run], file: Path) -> None:
    """Write the page about ``runs`` to ``file``."""
    found = lines(runs)
    settings = dict.fromkeys(line.setting for line in found)
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"), autoescape=True).render(
        tasks=", ".join(dict.fromkeys(line.config["task"] for line in found)),
        methods=", ".join(dict.fromkeys(line.config["strategy"] for line in found)),
        runs=len(runs),
        cut="; ".join(f"{run.path.name} ({run.status})" for run in runs if run.status != "completed"),
        sections=[_section(setting, [line for line in found if line.setting == setting]) for setting in settings],
        **_settings(runs),
    )
    file.write_text(page, encoding="utf-8")


def _section(setting: tuple[str, str], here: list[Line]) -> dict[str, Any]:
    metric = here[0].metric
    rows = [
        [
            line.label,
            f"{line.rate:g}",
            len(line.whole()),
            plus_minus(*mean_sd(line.of("metric"))),
            *(f"{line.mean(key):.{digits}f}" for key, digits in _MEANS.values()),
            *(f"{sum(line.of(key)):.0f}" for key in _SUMS.values()),
        ]
        for line in here
    ]
    head = ["method", "rate", "seeds", metric, *_MEANS, *_SUMS]
    heads = dict.fromkeys(line.config.get("head", "dense") for line in here)
    return {
        "title": ", ".join([*setting, f"head {' and '.join(heads)}"]),
        "pictures": pictures.of(here, metric),
        "head": head,
        "rows": rows,
    }


def _settings(runs: Sequence[Run]) -> dict[str, Any]:
    """What all runs share, once; what differs, run by run."""
    flat = [run.info["config"] | run.info["libraries"] | {"status": run.status} for run in runs]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if key not in ("run-name", "resume")]
    differing = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    shared = {key: text(flat[0][key]) for key in keys if key not in differing}
    pairs = zip(runs, flat, strict=True)
    rows = [[run.path.name, *(text(values.get(key, "")) for key in differing)] for run, values in pairs]
    return {"shared": shared, "differing": differing, "rows": rows}
