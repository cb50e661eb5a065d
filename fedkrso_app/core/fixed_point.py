"""Weighted means that no order of arrival can change by a bit: integer sums on a fixed grid."""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

GRID = 2.0**36  # values are kept to 1.5e-11, finer than float32's own steps above 2e-4
_CHUNK = 1 << 16  # elements handled at once, so that the float64 copy stays in the cache


class FixedPointMeans:
    """Σ w·x / W by key, for integer weights w ≥ 1. Each key's array has one shape and costs 8 bytes an element."""

    def __init__(self) -> None:
        self._sums: dict[Hashable, np.ndarray] = {}
        self._bounds: dict[Hashable, int] = {}  # no element of a sum can be larger

    def add(self, arrays: Mapping[Any, np.ndarray], weight: int) -> None:
        """Add ``weight`` times every array (finite floats), or raise OverflowError and add none if one is too large."""
        bounds = {}
        for key, x in arrays.items():
            largest = float(np.abs(x).max()) if x.size else 0.0
            bounds[key] = self._bounds.get(key, 0) + (int(largest * GRID) + 1) * weight
            if bounds[key] >= 2**63:
                raise OverflowError(f"values up to {largest:g} with weight {weight} are too large to be averaged")
        for key, x in arrays.items():
            total = self._sums.setdefault(key, np.zeros(x.shape, dtype=np.int64)).reshape(-1)
            flat = x.reshape(-1)
            for start in range(0, flat.size, _CHUNK):
                part = np.rint(flat[start : start + _CHUNK].astype(np.float64) * GRID).astype(np.int64)
                total[start : start + _CHUNK] += part * weight
        self._bounds.update(bounds)

    def mean(self, key: Hashable, total_weight: int) -> np.ndarray:
        """The sum divided by ``total_weight``, float32: whoever added nothing under ``key`` counts as zero."""
        return (self._sums[key] / (total_weight * GRID)).astype(np.float32)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sums
