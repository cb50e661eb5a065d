"""Runs as one HTML page that needs nothing else: what was learned, sent and spent, and with which settings."""

import base64
import html
import io
import statistics
from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedkrso_app import data
from fedkrso_app.runs.folder import Run
from fedkrso_app.runs.results import Line, lines, mean_sd, plus_minus, text
from fedkrso_app.training.metrics import LOWER_IS_BETTER

# Okabe and Ito's palette without its yellow, which is too faint on white; line and marker tell the same once more.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_MARKERS, _DASHES = "osD^vPX", ["-", "--", "-.", (0, (1, 1.2)), (0, (6, 1, 1, 1, 1, 1))]
_STYLE = """
:root{color-scheme:light} *{box-sizing:border-box} h3{font-size:1rem;margin:1.4em 0 .3em} p{margin:.4em 0}
body{margin:0 auto;max-width:1100px;padding:16px;font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff}
h1{font-size:1.6rem;line-height:1.25;margin:.4em 0} footer{margin-top:2.5em;color:#444;font-size:.85rem}
h2{font-size:1.25rem;margin:2em 0 .4em;padding-top:.6em;border-top:2px solid #0072b2}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px;align-items:start}
figure{margin:0;padding:8px;border:1px solid #ddd;border-radius:8px} figcaption{font-size:.9rem;padding:2px 6px 6px}
img{display:block;width:100%;max-width:100%;height:auto} .wide{overflow-x:auto;margin:.6em 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums} th{background:#f3f6f9}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid #ddd;vertical-align:bottom} td{white-space:nowrap}
th:first-child,td:first-child{text-align:left} .note{padding:8px 12px;border-left:4px solid #d55e00;background:#fdf3ec}
.shared{columns:3 260px;font-size:.9rem} .shared div{break-inside:avoid;overflow-wrap:anywhere;padding:2px 0}
"""


def write(runs: Sequence[Run], file: Path) -> None:
    """Write the page about ``runs`` to ``file``."""
    found = lines(runs)
    tasks = _escape(", ".join(dict.fromkeys(line.config["task"] for line in found)))
    methods = list(dict.fromkeys(line.config["strategy"] for line in found))
    body = [
        f"<h1>Federated fine-tuning on {tasks}</h1>",
        f"<p>{len(runs)} run(s) of {_escape(', '.join(methods))}.</p>",
    ]
    cut = [f"{run.path.name} ({run.status})" for run in runs if run.status != "completed"]
    if cut:
        body.append(f'<p class="note">Not complete: {_escape("; ".join(cut))}.</p>')
    for setting in dict.fromkeys(line.setting for line in found):
        body += _section(setting, [line for line in found if line.setting == setting])
    body += ["<h2>Settings</h2>", *_settings(runs), f"<footer>{_NOTES}</footer>"]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f"<title>{tasks}</title><style>{_STYLE}</style>"
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>' + "\n".join(body) + "</body></html>\n"
    file.write_text(page, encoding="utf-8")


_NOTES = """The tables show the metric after the last round, ± the sample standard deviation over the seeds. Curves are
means over the seeds; bands reach from the lowest to the highest. MB are 10<sup>6</sup> bytes of a client in one round,
measured on the wire; MB, paper: both ways by the paper's formula. What a client has sent and received is that of one
asked in every round. Seconds are medians over the rounds. A client's memory is the peak of its process, or of its GPU
where it has one. Incomplete runs count only where a line has no complete one."""


def _section(setting: tuple[str, str], here: list[Line]) -> list[str]:
    metric = data.task(setting[0]).metric
    drawn, counted = [h for h in here if len(h.curves()[0]) > 1], [h for h in here if any(h.of("rounds"))]
    pictures = [_curves(drawn, metric, True), _curves(drawn, metric, False)] if drawn else []
    pictures += [_bytes(counted), _costs(counted), _replies(counted)] if counted else []
    keys = {"uplink_mb": 3, "downlink_mb": 3, "paper_mb": 3, "seconds_per_round": 1, "step_ms": 0, "client_peak_mb": 0}
    rows = []
    for line in here:
        score = plus_minus(*mean_sd(line.of("metric")))
        figures = [f"{line.mean(key):.{digits}f}" for key, digits in keys.items()]
        replies = [f"{sum(line.of(key)):.0f}" for key in ("clients", "refused", "failed")]
        rows.append([line.label, f"{line.rate:g}", len(line.whole()), score, *figures, *replies])
    head = ["method", "rate", "seeds", metric, "MB up", "MB down", "MB, paper", "s a round", "ms a step", "client MB"]
    head += ["replies", "refused", "failed"]
    return [
        f"<h2>{_escape(', '.join(setting))}</h2>",
        f'<div class="pictures">{"".join(pictures)}</div>',
        _table(head, rows),
    ]


def _curves(here: list[Line], metric: str, by_bytes: bool) -> str:
    rows = ceil(len(here) / max(1, 60 // (max(len(line.label) for line in here) + 9)))  # of the legend
    figure = Figure(figsize=(4.9, 3.8 + 0.22 * rows), layout="constrained")
    axes = figure.subplots()
    for line in here:
        rounds, spent, metrics = line.curves()
        # A log axis has no 0, where round 0 is.
        points = [p for p in zip(spent if by_bytes else rounds, metrics, strict=True) if p[0] > 0 or not by_bytes]
        x, y = [x for x, _ in points], [values for _, values in points]
        colour = _COLOURS[line.style % len(_COLOURS)]
        look: dict[str, Any] = {"color": colour, "label": _plain(line.label), "linewidth": 1.8, "markersize": 5.5}
        look |= {"linestyle": _DASHES[line.style % len(_DASHES)], "marker": _MARKERS[line.style % len(_MARKERS)]}
        axes.plot(x, [statistics.fmean(values) for values in y], markevery=0.08, **look)
        axes.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=colour, alpha=0.15, linewidth=0)
    if by_bytes:
        _log(axes)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("MB up and down of one client, so far" if by_bytes else "round")
    axes.set_ylabel(metric)
    figure.legend(loc="outside lower center", ncols=ceil(len(here) / rows), frameon=False, handlelength=3)
    better = "Down" if metric in LOWER_IS_BETTER else "Up"
    title = f"{metric} against what a client has sent and received" if by_bytes else f"{metric} over the rounds"
    return _picture(figure, [axes], title, f" {better} and to the left is better." if by_bytes else "")


def _bytes(here: list[Line]) -> str:
    figure = Figure(figsize=(4.9, 1.5 + 0.62 * len(here)), layout="constrained")
    axes = figure.subplots()
    kinds = (("uplink_mb", "up", -0.2, "#0072B2", ""), ("downlink_mb", "down", 0.2, "#E69F00", "//"))
    for key, name, offset, colour, hatch in kinds:
        values, places = [line.mean(key) for line in here], [place + offset for place in range(len(here))]
        _bars(axes, places, values, "{:.3g}", height=0.38, color=colour, hatch=hatch, label=name)
    _log(axes)
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.5, high * max(2, (high / low) ** 0.2))  # room for the numbers
    _methods(axes, here, "MB of one client in one round")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _picture(figure, [axes], "Megabytes up and down", " Mind the log axis.")


def _costs(here: list[Line]) -> str:
    panels = {"step_ms": "ms of the slowest client, per local step", "seconds_per_round": "seconds of a round"}
    panels |= {"client_peak_mb": "peak memory of a client, MB"}
    figure = Figure(figsize=(4.9, 0.4 + len(panels) * (0.7 + 0.32 * len(here))), layout="constrained")
    every = list(figure.subplots(len(panels), 1))
    for axes, (key, name) in zip(every, panels.items(), strict=True):
        values = [line.mean(key) for line in here]
        colours = [_COLOURS[line.style % len(_COLOURS)] for line in here]
        _bars(axes, range(len(here)), values, "{:.1f}" if max(values) < 100 else "{:.0f}", height=0.7, color=colours)
        axes.set_xlim(0, (max(values) or 1) * 1.2)
        _methods(axes, here, name)
    return _picture(figure, every, "Time and memory")


def _replies(here: list[Line]) -> str:
    figure = Figure(figsize=(4.9, 1.3 + 0.4 * len(here)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(here)
    kinds = (
        ("clients", "counted", "#009E73", ""),
        ("refused", "refused", "#D55E00", "//"),
        ("failed", "failed", "#777777", "xx"),
    )
    for key, name, colour, hatch in kinds:
        values = [sum(line.of(key)) for line in here]
        axes.barh(
            range(len(here)),
            values,
            left=left,
            color=colour,
            hatch=hatch,
            label=name,
            edgecolor="#1a1a1a",
            linewidth=0.5,
        )
        left = [before + value for before, value in zip(left, values, strict=True)]
    _methods(axes, here, "replies over all rounds and seeds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    bad = sum(sum(line.of(key)) for line in here for key in ("refused", "failed"))
    return _picture(figure, [axes], "Replies", f" {bad:.0f} of {sum(left):.0f} were refused or failed.")


def _bars(axes: Axes, places: Sequence[float], values: list[float], form: str, **look: Any) -> None:
    bars = axes.barh(places, values, edgecolor="#1a1a1a", linewidth=0.5, **look)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3)


def _methods(axes: Axes, here: list[Line], name: str) -> None:
    axes.set_yticks(range(len(here)), [_plain(line.label) for line in here])
    axes.set_ylim(len(here) - 0.45, -0.55)  # the first on top
    axes.set_xlabel(name)


def _log(axes: Axes) -> None:
    """A log axis that reads 0.2, 0.5, 1, 2, … and never in powers."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    middle = (low * high) ** 0.5
    low, high = axes.set_xlim(min(low, middle / 3.2), max(high, middle * 3.2))  # a decade at least
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _picture(figure: Figure, every: Iterable[Axes], title: str, note: str = "") -> str:
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both" if axes.get_ylabel() else "x", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    source = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    title = _escape(title[0].upper() + title[1:])
    return f'<figure><figcaption><b>{title}.</b>{note}</figcaption><img src="{source}" alt="{title}"></figure>'


def _settings(runs: Sequence[Run]) -> list[str]:
    """What all runs share, once; what differs, run by run."""
    flat = [run.info["config"] | run.info["libraries"] | {"status": run.status} for run in runs]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if key not in ("run-name", "resume")]
    differing = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    shared = [(key, text(flat[0][key])) for key in keys if key not in differing]
    listed = "".join(f"<div>{_escape(key)} <b>{_escape(value)}</b></div>" for key, value in shared)
    parts = [f'<div class="shared">{listed}</div>']
    if differing:
        pairs = zip(runs, flat, strict=True)
        rows = [[run.path.name, *(text(values.get(key, "")) for key in differing)] for run, values in pairs]
        parts = ["<h3>The same in all runs</h3>", *parts, "<h3>What differs</h3>", _table(["run", *differing], rows)]
    return parts


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    def row(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _plain(label: str) -> str:
    return label.replace("$", r"\$")  # matplotlib would set it as a formula
