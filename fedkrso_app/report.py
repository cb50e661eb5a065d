"""Runs as one HTML page that needs nothing else: what was learned, sent and spent, and with which settings."""

import base64
import html
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedkrso_app import data
from fedkrso_app.config import ConfigError
from fedkrso_app.run import Run
from fedkrso_app.strategies import STRATEGIES

# Okabe and Ito's palette without its yellow, which is too faint on white; line and marker tell the same once more.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_MARKERS, _DASHES = "osD^vPX", ["-", "--", "-.", (0, (1, 1.2)), (0, (6, 1, 1, 1, 1, 1))]
_PLACES = {"seed", "run-name", "output-dir", "resume"}  # what repeats of one setting may differ in
_STYLE = """
:root{color-scheme:light} *{box-sizing:border-box}
body{margin:0 auto;max-width:1100px;padding:16px;font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff}
h1{font-size:1.6rem;line-height:1.25;margin:.4em 0} h2{font-size:1.25rem;margin:2em 0 .4em;padding-top:.6em;border-top:2px solid #0072b2}
h3{font-size:1rem;margin:1.4em 0 .3em} p{margin:.4em 0;max-width:75ch}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px;align-items:start}
figure{margin:0;padding:8px;border:1px solid #ddd;border-radius:8px} img{display:block;width:100%;max-width:100%;height:auto}
figcaption{font-size:.85rem;color:#333;padding:4px 6px}
.wide{overflow-x:auto} table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid #ddd;vertical-align:top} td{white-space:nowrap}
th{background:#f3f6f9} th:first-child,td:first-child,.settings td{text-align:left} .settings td{white-space:normal;overflow-wrap:anywhere}
.note{padding:8px 12px;border-left:4px solid #d55e00;background:#fdf3ec} footer{margin-top:2.5em;color:#444;font-size:.85rem}
"""


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs that ``paths`` name: a run's folder itself, or all run folders directly inside. Raises ConfigError."""
    found: list[Run] = []
    for path in paths:
        folders = [path] if (path / "config.json").is_file() else sorted(c.parent for c in path.glob("*/config.json"))
        if not folders:
            raise ConfigError(f"{path} is neither a run's folder nor holds any: there is no config.json in it.")
        found += [Run(folder) for folder in folders if folder not in {run.path for run in found}]
    return found


def measures(run: Run) -> dict[str, Any]:
    """What a run came to: its last metric, megabytes (10**6) of one client and round, typical seconds and memory."""
    rounds = [line for line in run.metrics() if line["round"]]
    asked = max(1, sum(_asked(line) for line in rounds))
    steps = run.info["config"]["local-steps"]
    return {
        "rounds": len(rounds),
        "metric": rounds[-1].get("metric") if rounds else None,
        "up_mb": sum(line["uplink_bytes"] for line in rounds) / asked / 1e6,
        "down_mb": sum(line["downlink_bytes"] for line in rounds) / asked / 1e6,
        "paper_mb": sum(line["paper_bytes"] for line in rounds) / asked / 1e6,
        # Medians, since the first round of a simulation also starts the workers.
        "seconds_per_round": statistics.median([line["seconds"] for line in rounds] or [0]),
        "step_ms": statistics.median([line["client_seconds"] for line in rounds] or [0]) * 1000 / steps,
        "client_peak_mb": max([line["client_peak_bytes"] for line in rounds], default=0) / 1e6,
        "replies": sum(line["clients"] for line in rounds),
        "refused": sum(line["refused"] for line in rounds),
        "failed": sum(line["failed"] for line in rounds),
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
    def setting(self) -> tuple:
        c = self.config
        return c["task"], c["partition"], c["dirichlet-alpha"] if c["partition"] == "dirichlet" else None

    @property
    def rate(self) -> float:
        return self.config[STRATEGIES[self.config["strategy"]].learning_rate_key]

    def of(self, key: str) -> list[float]:
        """``measures()[key]`` of every repeat that has it."""
        return [value for value in (measures(run)[key] for run in self.whole()) if value is not None]

    def whole(self) -> list[Run]:
        """The completed repeats, or all of them where none is complete."""
        return [run for run in self.runs if run.status == "completed"] or self.runs

    def curves(self) -> tuple[list[int], list[float], list[list[float]]]:
        """Rounds that all repeats have, megabytes of one client up to each, and the metrics of the repeats in it."""
        repeats = [{line["round"]: line for line in run.metrics() if "metric" in line} for run in self.whole()]
        rounds = sorted(set.intersection(*(set(lines) for lines in repeats)))
        spent = [accumulate(_megabytes(lines[number]) for number in rounds) for lines in repeats]
        metrics = [[lines[number]["metric"] for lines in repeats] for number in rounds]
        return rounds, [statistics.fmean(values) for values in zip(*spent, strict=True)], metrics


def lines(runs: Sequence[Run]) -> list[Line]:
    """Runs grouped by all settings but the seed, with labels that tell those of one picture apart."""
    grouped: dict[str, Line] = {}
    rates = {strategy.learning_rate_key for strategy in STRATEGIES.values()}
    for run in runs:
        config = run.info["config"]
        if config["strategy"] not in STRATEGIES:
            raise ConfigError(f"{run.path}: strategy = {config['strategy']!r} is not one of {', '.join(STRATEGIES)}.")
        own = STRATEGIES[config["strategy"]].learning_rate_key
        kept = {k: v for k, v in config.items() if k not in _PLACES and (k not in rates or k == own)}
        grouped.setdefault(repr(sorted(kept.items())), Line(kept, [])).runs.append(run)
    result = sorted(grouped.values(), key=lambda line: (repr(line.setting), line.config["strategy"], line.rate))
    for line in result:
        rivals = [r for r in result if (r.setting, r.config["strategy"]) == (line.setting, line.config["strategy"])]
        differing = [k for k in line.config if len({repr(rival.config.get(k)) for rival in rivals}) > 1]
        own = STRATEGIES[line.config["strategy"]].learning_rate_key
        extra = [f"{'rate' if key == own else key} {_text(line.config[key])}" for key in differing]
        line.label = ", ".join([line.config["strategy"], *extra])
    order = list(dict.fromkeys(line.label for line in result))
    for line in result:
        line.style = order.index(line.label)  # the same look in every picture of the page
    return result


def write(runs: Sequence[Run], file: Path) -> None:
    """Write the page about ``runs`` to ``file``."""
    everything = lines(runs)
    settings = list(dict.fromkeys(line.setting for line in everything))
    methods = list(dict.fromkeys(line.config["strategy"] for line in everything))
    tasks = ", ".join(dict.fromkeys(line.config["task"] for line in everything))
    body = [f"<h1>Federated fine-tuning on {_escape(tasks)}</h1>"]
    body.append(
        f"<p>{_count(len(runs), 'run')} of {_count(len(methods), 'method')}: {_escape(', '.join(methods))}.</p>"
    )
    cut = [f"{run.path.name} ({run.status})" for run in runs if run.status != "completed"]
    if cut:
        body.append(f'<p class="note">Not complete: {_escape("; ".join(cut))}.</p>')
    for setting in settings:
        body += _section(setting, [line for line in everything if line.setting == setting])
    body += ["<h2>Settings</h2>", *_settings(runs)]
    body.append(
        "<footer>Curves are means over the seeds, bands reach from the lowest to the highest. MB are 10<sup>6</sup> "
        "bytes as measured on the wire. Seconds are medians over the rounds. A client's memory is the peak of its "
        "process (of its GPU, where it has one), the highest of all clients and rounds.</footer>"
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    file.write_text(
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<title>{_escape(tasks)}</title><style>{_STYLE}</style></head>\n'
        f"<body>{chr(10).join(body)}</body></html>\n"
    )


def _section(setting: tuple, here: list[Line]) -> list[str]:
    task, partition, alpha = setting
    metric = data.task(task).metric
    name = f"{task}, {partition}" + ("" if alpha is None else f" α = {alpha:g}")
    pictures = []
    drawn = [line for line in here if len(line.curves()[0]) > 1]
    if drawn:
        pictures.append(_curves(drawn, metric, by_bytes=True))
        pictures.append(_curves(drawn, metric, by_bytes=False))
    counted = [line for line in here if any(line.of("rounds"))]
    if counted:
        pictures.append(_bytes(counted))
        pictures.append(_costs(counted))
    rows = []
    for line in here:
        mean = {key: mean_sd(line.of(key))[0] or 0.0 for key in ("up_mb", "down_mb", "paper_mb", "seconds_per_round")}
        replies = [sum(int(value) for value in line.of(key)) for key in ("replies", "refused", "failed")]
        rows.append(
            [line.label, f"{line.rate:g}", len(line.whole()), plus_minus(*mean_sd(line.of("metric")))]
            + [f"{mean['up_mb']:.3f}", f"{mean['down_mb']:.3f}", f"{mean['paper_mb']:.3f}"]
            + [f"{mean['seconds_per_round']:.1f}", f"{max(line.of('client_peak_mb')):.0f}", *replies]
        )
    head = ["method", "rate", "seeds", f"{metric}, last round", "MB up", "MB down", "MB both, paper's formula"]
    head += ["s a round", "client MB", "replies", "refused", "failed"]
    caption = "<p>MB up and down are those of one client in one round.</p>"
    return [
        f"<h2>{_escape(name)}</h2>",
        _table(head, rows),
        caption,
        f'<div class="pictures">{"".join(pictures)}</div>',
    ]


def _curves(here: list[Line], metric: str, by_bytes: bool) -> str:
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for line in here:
        rounds, spent, metrics = line.curves()
        first = next((i for i, value in enumerate(spent) if value > 0), 0) if by_bytes else 0  # a log axis has no 0
        x, y = (spent if by_bytes else rounds)[first:], metrics[first:]
        colour, dash = _COLOURS[line.style % len(_COLOURS)], _DASHES[line.style % len(_DASHES)]
        axes.plot(
            x, [statistics.fmean(values) for values in y], color=colour, linestyle=dash, linewidth=1.8, markersize=5.5,
            marker=_MARKERS[line.style % len(_MARKERS)], markevery=max(1, len(x) // 8), label=_plain(line.label),
        )  # fmt: skip
        low, high = [min(values) for values in y], [max(values) for values in y]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if by_bytes:
        _log(axes)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("MB sent and received by one client so far" if by_bytes else "round")
    axes.set_ylabel(metric)
    columns = 1 if max(len(line.label) for line in here) > 24 else 2 if len(here) < 3 else 3
    figure.legend(loc="outside lower center", ncols=min(len(here), columns), frameon=False, handlelength=3)
    what = f"{metric} against the megabytes a client has exchanged" if by_bytes else f"{metric} over the rounds"
    return _picture(figure, axes, what, "Up and to the left is better." if by_bytes else "")


def _bytes(here: list[Line]) -> str:
    figure = Figure(figsize=(5.4, 1.5 + 0.62 * len(here)), layout="constrained")
    axes = figure.subplots()
    kinds = ((-0.2, "up_mb", "up", _COLOURS[0], ""), (0.2, "down_mb", "down", _COLOURS[4], "//"))
    for offset, key, name, colour, hatch in kinds:
        values = [mean_sd(line.of(key))[0] or 0.0 for line in here]
        places = [place + offset for place in range(len(here))]
        bars = axes.barh(places, values, 0.38, color=colour, hatch=hatch, edgecolor="#1a1a1a", lw=0.5, label=name)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=10)
    _log(axes)
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.5, high * (high / low) ** 0.2)  # room for the numbers
    _methods(axes, here)
    axes.set_xlabel("MB of one client in one round")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _picture(figure, axes, "Megabytes up and down", "Measured on the wire; each step of the axis is a multiple.")


def _costs(here: list[Line]) -> str:
    panels = [("step_ms", "milliseconds of the slowest client per local step", 0)]
    panels += [("seconds_per_round", "seconds of a round", 1), ("client_peak_mb", "peak memory of a client, MB", 0)]
    figure = Figure(figsize=(5.4, 0.6 + len(panels) * (0.75 + 0.32 * len(here))), layout="constrained")
    for axes, (key, name, digits) in zip(figure.subplots(len(panels), 1), panels, strict=True):
        values = [mean_sd(line.of(key))[0] or 0.0 for line in here]
        colours = [_COLOURS[line.style % len(_COLOURS)] for line in here]
        bars = axes.barh(range(len(here)), values, 0.7, color=colours, edgecolor="#1a1a1a", linewidth=0.5)
        axes.bar_label(bars, [f"{value:.{digits}f}" for value in values], padding=3, fontsize=10)
        axes.set_xlim(0, (max(values) or 1) * 1.2)
        _methods(axes, here)
        axes.set_xlabel(name)
        _tidy(axes)
    return _picture(figure, axes, "Time and memory", "")


def _methods(axes: Axes, here: list[Line]) -> None:
    axes.set_yticks(range(len(here)), [_plain(line.label) for line in here])
    axes.invert_yaxis()


def _log(axes: Axes) -> None:
    """A log axis that reads 0.2, 0.5, 1, 2, … and never in powers."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def _picture(figure: Figure, axes: Axes, title: str, caption: str) -> str:
    _tidy(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    source = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    title = _escape(title[0].upper() + title[1:])
    note = f"<br>{_escape(caption)}" if caption else ""
    return f'<figure><img src="{source}" alt="{title}"><figcaption><b>{title}.</b>{note}</figcaption></figure>'


def _settings(runs: Sequence[Run]) -> list[str]:
    """What all runs share, once; what differs, run by run."""
    flat = [
        {**run.info["config"], **{f"{k} version": v for k, v in run.info["libraries"].items()}, "status": run.status}
        for run in runs
    ]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if key not in ("run-name", "resume")]
    shared = [key for key in keys if len({repr(values.get(key)) for values in flat}) == 1]
    differing = [key for key in keys if key not in shared]
    parts = ["<h3>The same in all runs</h3>" if differing else ""]
    parts.append(_table(["key", "value"], [[key, _text(flat[0][key])] for key in shared], "settings"))
    if differing:
        rows = [
            [run.path.name, *(_text(values.get(key, "")) for key in differing)]
            for run, values in zip(runs, flat, strict=True)
        ]
        parts += ["<h3>What differs</h3>", _table(["run", *differing], rows)]
    return parts


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "figures") -> str:
    def row(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table></div>'
    )


def _asked(line: dict[str, Any]) -> int:
    return line["clients"] + line["refused"] + line["failed"]


def _megabytes(line: dict[str, Any]) -> float:
    """Up and down, of one client, in one round."""
    return (line["uplink_bytes"] + line["downlink_bytes"]) / max(1, _asked(line)) / 1e6


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _plain(label: str) -> str:
    return label.replace("$", r"\$")  # matplotlib would set it as a formula
