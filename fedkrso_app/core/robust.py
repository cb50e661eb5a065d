"""Means that a minority of wild updates cannot move far: coordinate-wise median and trimmed mean."""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from fedkrso_app.core.fixed_point import LARGEST

TRIMMED = 0.3  # share of the values that the trimmed mean leaves out at either end


class RobustMeans:
    """Like FixedPointMeans, but by the order of the values: ``kind`` is "median" or "trimmed-mean", all weights are 1.

    It keeps every array that was added, so its memory grows with their number. Sorted values are added up in one order
    whatever that of arrival, hence the same bits.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._added: dict[Hashable, list[np.ndarray]] = {}

    def add(self, arrays: Mapping[Any, np.ndarray], weight: int) -> None:
        """Keep every array; raise OverflowError and keep none if a value is too large, as FixedPointMeans does."""
        largest = max((float(np.abs(x).max(initial=0.0)) for x in arrays.values()), default=0.0)
        if largest >= LARGEST:
            raise OverflowError(f"values up to {largest:g} are too large to be averaged")
        for key, x in arrays.items():
            self._added.setdefault(key, []).append(x)

    def mean(self, key: Hashable, total_weight: int) -> np.ndarray:
        """The robust mean of what was added under ``key``, float32, times the share of those who added something.

        The share keeps the size of a plain mean in which the others count as zero; a median over those zeros would be
        zero for any seed that fewer than half of the clients drew.
        """
        values = np.sort(np.stack(self._added[key]), axis=0)
        n = len(values)
        cut = (n - 1) // 2 if self._kind == "median" else min(math.ceil(TRIMMED * n), (n - 1) // 2)
        middle = values[cut : n - cut].astype(np.float64).mean(axis=0)
        return (middle * (n / total_weight)).astype(np.float32)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._added
