"""How the good replies of a round become one: exact weighted means, robust ones, or the replies themselves."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from fedkrso_app.core.fixed_point import FixedPointMeans
from fedkrso_app.core.robust import RobustMeans
from fedkrso_app.strategies.base import Arrays, Method


class Aggregate:
    """The sums of one round, in which no order of arrival changes a bit. ``sums`` adds up the summands.

    With ``keep`` the replies stay in memory too: of methods whose entry is no function of means.
    """

    def __init__(self, sums: FixedPointMeans | RobustMeans, keep: bool = False) -> None:
        self._sums, self._keep = sums, keep
        self._kept: dict[int, tuple[int, Arrays]] = {}
        self._total = 0

    def add(self, summands: Mapping[Any, np.ndarray], reply: Arrays, weight: int, partition: int) -> None:
        """Count one reply, entirely or (raising OverflowError where a value is too large) not at all."""
        self._sums.add(summands, weight)
        self._total += weight
        if self._keep:
            self._kept[partition] = (weight, reply)

    def mean(self, key: Hashable) -> np.ndarray:
        """The weighted mean under ``key``, float32; a reply without it counts as zero."""
        return self._sums.mean(key, self._total)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sums

    @property
    def replies(self) -> Sequence[tuple[float, Arrays]]:
        """Each reply with its share of the weight, in the order of the partitions, whatever that of arrival."""
        return [(weight / self._total, reply) for _, (weight, reply) in sorted(self._kept.items())]


def aggregate(method: Method) -> Aggregate:
    """A new one for a round of ``method``."""
    kind = method.config.aggregation
    return Aggregate(FixedPointMeans() if kind == "mean" else RobustMeans(kind), keep=not method.linear)
