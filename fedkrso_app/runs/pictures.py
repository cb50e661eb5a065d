"""Pictures of runs: what each method reached, sent and spent."""

import base64
import io
import statistics
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from fedkrso_app.config import ConfigError
from fedkrso_app.runs.results import Line
from fedkrso_app.training.metrics import LOWER_IS_BETTER

# Okabe and Ito's palette without its yellow, which is too faint on white; line and marker tell the same once more.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_MARKERS, _DASHES = "osD^vPX", ["-", "--", "-.", (0, (1, 1.2)), (0, (6, 1, 1, 1, 1, 1))]


Picture = tuple[str, str, str]  # title, note, an SVG file as a data URL


class Curves(Protocol):
    """What a line of a picture is drawn from: a method's runs, or an arm's."""

    label: str
    style: int

    def curves(self) -> tuple[list[int], list[float], list[list[float]]]:
        """Rounds, megabytes of one client up to each, and in each the metrics of the repeats."""


def of(here: list[Line], metric: str) -> list[Picture]:
    """The pictures of one setting: the metric over megabytes and over rounds, bytes, time and memory, replies."""
    drawn, counted = [h for h in here if len(h.curves()[0]) > 1], [h for h in here if any(h.of("rounds"))]
    pictures = [curves(drawn, metric, by_bytes) for by_bytes in (True, False)] if drawn else []
    return pictures + ([_bytes(counted), _costs(counted), _replies(counted)] if counted else [])


def save(found: Sequence[Line], file: Path) -> None:
    """Write one PNG picture, 1350 pixels wide: the metric against megabytes, with one panel per setting.

    Raises ConfigError where no run has a metric in two rounds.
    """
    found = [line for line in found if len(line.curves()[0]) > 1]
    settings = list(dict.fromkeys(line.setting for line in found))
    if not settings:
        raise ConfigError("there is nothing to draw: no run has a metric for two rounds.")
    columns = min(2, len(settings))
    rows = ceil(len(settings) / columns)
    figure = Figure(figsize=(9, 3.8 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, setting in zip(panels, settings, strict=False):
        here = [line for line in found if line.setting == setting]
        _curves(axes, here, here[0].metric, True)
        axes.set_title(_plain(", ".join(setting)), fontsize=11)
    for axes in panels[len(settings) :]:
        axes.remove()
    _legend(figure)
    _plain_axes(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    Image.open(buffer).convert("RGB").quantize(64).save(file, format="png", optimize=True)  # a third of the bytes


def curves(here: Sequence[Curves], metric: str, by_bytes: bool) -> Picture:
    """The metric against megabytes or over the rounds."""
    figure = Figure(figsize=(4.9, 3.8), layout="constrained")
    _curves(figure.subplots(), here, metric, by_bytes)
    _legend(figure)
    better = "Down" if metric in LOWER_IS_BETTER else "Up"
    title = f"{metric} against what a client has sent and received" if by_bytes else f"{metric} over the rounds"
    return _picture(figure, title, f"{better} and to the left is better." if by_bytes else "")


def forest(rows: Sequence[Mapping[str, Any]], metric: str) -> Picture:
    """The rows of :func:`paired.differences`: each mean with its interval, at equal steps and at equal bytes."""
    pairs = list(dict.fromkeys((row["a"], row["b"]) for row in rows))
    figure = Figure(figsize=(4.9, 2 * (0.75 + 0.27 * len(pairs))), layout="constrained")
    panels = dict(zip(("steps", "bytes"), figure.subplots(2, 1), strict=True))
    for view, axes in panels.items():
        axes.axvline(0, color="#1a1a1a", linewidth=1)
        for row in rows:
            if row["view"] == view:
                place, mean = pairs.index((row["a"], row["b"])), row["mean"]
                low, high = (mean, mean) if row["low"] is None else (row["low"], row["high"])
                clear = low > 0 or high < 0
                axes.plot([low, high], [place, place], color=_COLOURS[0], linewidth=2)
                axes.plot([mean], [place], "o", color=_COLOURS[0], markerfacecolor=_COLOURS[0] if clear else "white")
        axes.set_xlabel(f"difference in {metric}, at equal {view}")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_yticks(range(len(pairs)), [_plain(f"{a} − {b}") for a, b in pairs])
        axes.set_ylim(len(pairs) - 0.45, -0.55)
    note = "Means and 95 % intervals, paired over the draws. A full dot has an interval without 0."
    return _picture(figure, "Paired differences", note)


def _curves(axes: Axes, here: Sequence[Curves], metric: str, by_bytes: bool) -> None:
    """Means over the seeds, and bands from the lowest to the highest."""
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
    axes.set_xlabel("MB sent and received per client so far" if by_bytes else "round")
    axes.set_ylabel(metric)


def _legend(figure: Figure) -> None:
    """One legend below all panels, which makes ``figure`` taller."""
    pairs = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    names = {name: handle for handle, name in pairs}
    in_a_row = max(1, int(figure.get_figwidth() * 12.3) // (max(map(len, names)) + 9))  # 12.3 letters per inch
    rows = ceil(len(names) / in_a_row)
    figure.set_figheight(figure.get_figheight() + 0.22 * rows)
    look: dict[str, Any] = {"frameon": False, "handlelength": 3, "ncols": ceil(len(names) / rows)}
    figure.legend(list(names.values()), list(names), loc="outside lower center", **look)


def _bytes(here: list[Line]) -> Picture:
    figure = Figure(figsize=(4.9, 1.5 + 0.62 * len(here)), layout="constrained")
    axes = figure.subplots()
    kinds = (("uplink_mb", "up", -0.2, "#0072B2", ""), ("downlink_mb", "down", 0.2, "#E69F00", "//"))
    for key, name, offset, colour, hatch in kinds:
        values, places = [line.mean(key) for line in here], [place + offset for place in range(len(here))]
        _bars(axes, places, values, "{:.3g}", height=0.38, color=colour, hatch=hatch, label=name)
    _log(axes)
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.5, high * max(2, (high / low) ** 0.2))  # room for the numbers
    _methods(axes, here, "MB per client and round")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return _picture(figure, "Megabytes up and down", "The axis is logarithmic.")


def _costs(here: list[Line]) -> Picture:
    panels = {"step_ms": "ms of the slowest client, per local step", "seconds_per_round": "seconds per round"}
    panels |= {"client_peak_mb": "peak memory of a client, MB"}
    figure = Figure(figsize=(4.9, 0.4 + len(panels) * (0.7 + 0.32 * len(here))), layout="constrained")
    every = list(figure.subplots(len(panels), 1))
    for axes, (key, name) in zip(every, panels.items(), strict=True):
        values = [line.mean(key) for line in here]
        colours = [_COLOURS[line.style % len(_COLOURS)] for line in here]
        _bars(axes, range(len(here)), values, "{:.1f}" if max(values) < 100 else "{:.0f}", height=0.7, color=colours)
        axes.set_xlim(0, (max(values) or 1) * 1.2)
        _methods(axes, here, name)
    return _picture(figure, "Time and memory")


def _replies(here: list[Line]) -> Picture:
    figure = Figure(figsize=(4.9, 1.3 + 0.4 * len(here)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(here)
    kinds = {"clients": ("#009E73", ""), "refused": ("#D55E00", "//"), "failed": ("#777777", "xx")}
    for key, (colour, hatch) in kinds.items():
        values, name = [sum(line.of(key)) for line in here], "counted" if key == "clients" else key
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "#1a1a1a", "linewidth": 0.5}
        axes.barh(range(len(here)), values, left=left, label=name, **look)
        left = [before + value for before, value in zip(left, values, strict=True)]
    _methods(axes, here, "replies over all rounds and seeds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    bad = sum(sum(line.of(key)) for line in here for key in ("refused", "failed"))
    return _picture(figure, "Replies", f"{bad:.0f} of {sum(left):.0f} were refused or failed.")


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


def _plain_axes(figure: Figure) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both" if axes.get_ylabel() else "x", color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)


def _picture(figure: Figure, title: str, note: str = "") -> Picture:
    _plain_axes(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    source = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return title[0].upper() + title[1:], note, source


def _plain(label: str) -> str:
    return label.replace("$", r"\$")  # matplotlib would set it as a formula
