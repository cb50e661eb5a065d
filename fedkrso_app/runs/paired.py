"""Arms against one another over the same draws: mean differences with intervals, at equal steps and at equal bytes."""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

LAST = 3  # rounds in a score: single rounds swing

Rounds = Sequence[Sequence[float]]  # [round, metric, bytes up, bytes down] each, round 0 first


def score(rounds: Rounds, within: float = math.inf) -> float:
    """The mean metric of the last :data:`LAST` rounds up to which a client has sent and received ``within`` bytes.

    Where not one round fits, that of the first round: of the model before training, if a server judges it.
    """
    total, reached = 0.0, list[float]()
    for number, metric, up, down in rounds:
        total += up + down
        if number and total <= within:
            reached.append(metric)
    return statistics.fmean(reached[-LAST:] or [rounds[0][1]])


def spent(rounds: Rounds) -> float:
    """Bytes that one client sent and received in all rounds."""
    return sum(up + down for _, _, up, down in rounds)


def interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean, and the ends of its confidence interval by Student's t, (n − 1 degrees of freedom); None below n = 2."""
    mean = statistics.fmean(differences)
    if (n := len(differences)) < 2:
        return mean, None, None
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def differences(arms: Mapping[str, Mapping[int, Rounds]]) -> list[dict[str, Any]]:
    """For every two arms (name -> draw -> rounds): ``a`` minus ``b`` over the draws that both have.

    "steps" compares them after all rounds, "bytes" within the megabytes ``mb`` of the pair's cheaper run, in the mean.
    """
    found = []
    for (a, of_a), (b, of_b) in combinations(arms.items(), 2):
        both = [(of_a[draw], of_b[draw]) for draw in of_a if draw in of_b]
        budgets = [min(spent(x), spent(y)) for x, y in both]
        views = {"steps": [math.inf] * len(both), "bytes": budgets}
        for view, within in views.items() if both else ():
            apart = [score(x, limit) - score(y, limit) for (x, y), limit in zip(both, within, strict=True)]
            mean, low, high = interval(apart)
            megabytes = statistics.fmean(budgets) / 1e6 if view == "bytes" else None
            row = {"a": a, "b": b, "view": view, "mean": mean, "low": low, "high": high}
            found.append(row | {"draws": len(both), "mb": megabytes})
    return found


def kept(arms: Mapping[str, Mapping[int, Rounds]], low: str, high: str) -> list[dict[str, Any]]:
    """Of every other arm the share of the distance from arm ``low`` to arm ``high`` that it covers, at equal steps.

    A ratio of means over the draws that all three have, with its 95 % interval by Fieller's theorem; ``from`` and
    ``to`` are None where there is none: below three draws, or where the distance itself may be 0.
    """
    found = []
    for name, runs in arms.items():
        draws = [draw for draw in runs if draw in arms[low] and draw in arms[high]]
        if name in (low, high) or not draws:
            continue
        base = np.array([score(arms[low][draw]) for draw in draws])
        x, y = (np.array([score(arms[arm][draw]) for draw in draws]) - base for arm in (name, high))
        ends = fieller(x, y) if len(draws) > 2 else (None, None)
        share = float(x.mean() / y.mean()) if y.mean() else None
        found.append({"arm": name, "share": share, "from": ends[0], "to": ends[1], "draws": len(draws)})
    return found


def fieller(x: np.ndarray, y: np.ndarray, level: float = 0.95) -> tuple[float | None, float | None]:
    """The θ for which the mean of x − θy is not told from 0 by Student's t at ``level``; None where they have no ends.

    (x̄ − θȳ)² ≤ t² (s_xx − 2θ s_xy + θ² s_yy)/n, a quadratic in θ (Fieller 1954).
    """
    n = len(x)
    (s_xx, s_xy), (_, s_yy) = np.cov(x, y) * float(stats.t.ppf((1 + level) / 2, n - 1)) ** 2 / n
    a, b, c = y.mean() ** 2 - s_yy, x.mean() * y.mean() - s_xy, x.mean() ** 2 - s_xx
    if a <= 0:
        return None, None
    root = math.sqrt(max(0.0, b * b - a * c))
    return float((b - root) / a), float((b + root) / a)
