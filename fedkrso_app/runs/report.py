"""Runs as one HTML page that needs nothing else: what was learned, sent and spent, and with which settings."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template

from fedkrso_app.core.accounting import shown
from fedkrso_app.runs import pictures
from fedkrso_app.runs.folder import Run
from fedkrso_app.runs.privacy import epsilons
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
_FOOTER = (
    "The tables show the metric after the last round, ± the sample standard deviation over the seeds. Curves are means "
    "over the seeds; bands reach from the lowest to the highest. MB are 10^6 bytes per client and round, measured on "
    "the wire; MB, paper: both ways by the paper's formula. What a client has sent and received is that of one asked "
    "in every round. Seconds are medians over the rounds. A client's memory is the peak of its process, or of its GPU "
    "if it has one. Incomplete runs count only where a line has no complete one."
)
_SUMS = {"replies": "clients", "refused": "refused", "failed": "failed"}


def write(runs: Sequence[Run], file: Path) -> None:
    """Write the page about ``runs`` to ``file``."""
    found = lines(runs)
    settings = dict.fromkeys(line.setting for line in found)
    cut = "; ".join(f"{run.path.name} ({run.status})" for run in runs if run.status != "completed")
    flat = [run.info["config"] | run.info["libraries"] | {"status": run.status} for run in runs]
    render(
        file,
        f"Federated fine-tuning on {', '.join(dict.fromkeys(line.config['task'] for line in found))}",
        f"{len(runs)} run(s) of {', '.join(dict.fromkeys(line.config['strategy'] for line in found))}.",
        [_section(setting, [line for line in found if line.setting == setting]) for setting in settings],
        settings_of({run.path.name: config for run, config in zip(runs, flat, strict=True)}, "run"),
        _FOOTER,
        f"Not complete: {cut}." if cut else "",
    )


def render(
    file: Path, title: str, intro: str, sections: list[dict[str, Any]], settings: dict[str, Any], footer: str, note: str
) -> None:
    """Write the page: of every section its title, pictures, and tables as (head, rows); then the settings."""
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"), autoescape=True)
    page = template.render(title=title, intro=intro, sections=sections, footer=footer, note=note, **settings)
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
    title = ", ".join([*setting, f"head {' and '.join(heads)}"])
    return {"title": title, "pictures": pictures.of(here, metric), "tables": [(head, rows), *_spent(here)]}


def _spent(here: list[Line]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """ε after each round, of the lines whose runs have one; the largest of the repeats."""
    spent: dict[str, dict[int, float]] = {}
    for line in here:
        of_line = spent.setdefault(f"ε at δ = {line.config.get('privacy.delta', 0):g}, {line.label}", {})
        for run in line.runs:
            for round, value in epsilons(run).items():
                of_line[round] = max(value, of_line.get(round, 0.0))
    spent = {name: values for name, values in spent.items() if values}
    if spent:
        rounds = sorted(set().union(*spent.values()))
        cells = [[shown(values[r]) if r in values else "–" for values in spent.values()] for r in rounds]
        yield ["round", *spent], [[str(r), *row] for r, row in zip(rounds, cells, strict=True)]


def settings_of(named: Mapping[str, Mapping[str, Any]], what: str) -> dict[str, Any]:
    """What all settings share, once; what differs, by name. ``what`` the names are heads their column."""
    flat = list(named.values())
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if key not in ("run-name", "resume")]
    differing = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    shared = {key: text(flat[0][key]) for key in keys if key not in differing}
    rows = [[name, *(text(values.get(key, "")) for key in differing)] for name, values in named.items()]
    return {"shared": shared, "differing": [what, *differing] if differing else [], "rows": rows}
