"""Weighted means that no order of arrival can change by a bit: integer sums on a fixed grid."""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

GRID = 2.0**36  # values are kept to 1.5e-11, finer than float32's own steps above 2e-4
LARGEST = 2.0**19  # of a value times its weight: 256 replies at this limit still have room in 63 bits
_CHUNK = 1 << 15  # elements handled at once, so that the float64 copy stays in the cache

# Float64 numbers around _OFFSET lie one grid step apart: x + _OFFSET is x rounded to the grid (ties to even, as in
# rint), and its bits, read as an integer, are those of _OFFSET plus the number of steps. The bits are summed as they
# are, and the offsets' bits taken out once at the end: integers that wrap around lose nothing.
_OFFSET = 1.5 * 2.0**52 / GRID
_OFFSET_BITS = int(np.float64(_OFFSET).view(np.int64))
_NEAR = 2.0**51 / GRID  # it holds below this size


class FixedPointMeans:
    """Σ w·x / W by key, for integer weights w ≥ 1. Each key's array has one shape and costs 8 bytes an element.

    ``into``: arrays to sum in, int64 zeros, for keys that are known before.
    """

    def __init__(self, into: Mapping[Any, np.ndarray] | None = None) -> None:
        self._sums: dict[Hashable, np.ndarray] = dict(into or {})
        self._offsets: dict[Hashable, int] = dict.fromkeys(self._sums, 0)  # how many offsets are in a sum
        self._bounds: dict[Hashable, int] = {}  # no element of a sum can be larger
        self._buffer = np.empty(_CHUNK)

    def add(self, arrays: Mapping[Any, np.ndarray], weight: int) -> None:
        """Add ``weight`` times every array (finite floats), or raise OverflowError and add none if one is too large."""
        bounds, near = {}, {}
        for key, x in arrays.items():
            largest = max(float(x.max()), -float(x.min())) if x.size else 0.0
            near[key] = largest < _NEAR
            bounds[key] = self._bounds.get(key, 0) + (int(largest * GRID) + 1) * weight
            if largest * weight >= LARGEST or bounds[key] >= 2**63:
                raise OverflowError(f"values up to {largest:g} with weight {weight} are too large to be averaged")
        for key, x in arrays.items():
            if key not in self._sums:
                self._sums[key], self._offsets[key] = np.zeros(x.shape, dtype=np.int64), 0
            total, flat = self._sums[key].reshape(-1), x.reshape(-1)
            for start in range(0, flat.size, _CHUNK):
                part = flat[start : start + _CHUNK]
                copy = self._buffer[: part.size]
                np.copyto(copy, part)
                if near[key]:
                    copy += _OFFSET
                    steps = copy.view(np.int64)
                else:
                    steps = np.rint(copy * GRID).astype(np.int64)
                if weight != 1:
                    steps *= weight
                total[start : start + _CHUNK] += steps
            self._offsets[key] += weight * near[key]
        self._bounds.update(bounds)

    def mean(self, key: Hashable, total_weight: int) -> np.ndarray:
        """The sum divided by ``total_weight``, float32: whoever added nothing under ``key`` counts as zero."""
        return divided(self.steps(key), total_weight)

    def steps(self, key: Hashable) -> np.ndarray:
        """The sum in steps of 1/GRID, int64: as it is kept, so that it changes with the next one that is added."""
        self._sums[key] -= np.int64((self._offsets[key] * _OFFSET_BITS + 2**63) % 2**64 - 2**63)  # as it is in 64 bits
        self._offsets[key] = 0
        return self._sums[key]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sums


def divided(steps: np.ndarray, total_weight: int) -> np.ndarray:
    """A sum in steps of 1/GRID (int64) divided by the weight in it, float32."""
    return (steps / (total_weight * GRID)).astype(np.float32)
