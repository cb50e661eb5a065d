"""What is under the masks: the summands of a round one after another, as integers of so many bits.

Both ends make it from what the method says before any reply is there, so that no reply shows what a client drew.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedkrso_app.core import ring
from fedkrso_app.core.fixed_point import GRID, LARGEST, FixedPointMeans, divided
from fedkrso_app.records.sealed import LOSS, TAIL
from fedkrso_app.strategies.base import Arrays, Method
from fedkrso_app.strategies.secure import SecureSums

_ADAM = 4  # steps of a learning rate each that a value may be away, by the number of steps: what Adam moves, with room


class Layout:
    """The words of a round of ``method`` that asks all these ``partitions`` and has ``told`` them its instructions.

    ``reach`` and ``step`` (32 and 16 bits) are those of each summand: how far a client may move, and the grid.
    """

    def __init__(self, method: Method, round: int, told: Mapping[str, Any], partitions: Sequence[int]) -> None:
        own = method.config.of(SecureSums)
        self.bits, self.partitions = own.bits, len(partitions)
        self.shapes = dict(method.layout(round, told))
        self.dtype = ring.word(self.bits)
        ends = np.cumsum([0, *(math.prod(shape) for shape in self.shapes.values())]).tolist()
        self.size = ends[-1]
        self._places = {key: slice(*ends[i : i + 2]) for i, key in enumerate(self.shapes)}
        self.reach: Mapping[Hashable, float] = {}
        self.step: Mapping[Hashable, float] = {}
        if self.bits < 64:
            moved = {} if own.range else method.reach(round, told)
            self.reach = {key: own.range or _ADAM * moved[key] for key in self.shapes}
            self.step = {key: ring.step(reach, self.partitions, self.bits) for key, reach in self.reach.items()}

    def __str__(self) -> str:
        """All that both ends must agree on."""
        return repr((self.bits, self.partitions, list(self.shapes.items()), list(self.reach.items())))

    def views(self, words: np.ndarray) -> Iterator[tuple[Hashable, np.ndarray]]:
        """The summands in ``words``, by key, in their shapes."""
        for key, shape in self.shapes.items():
            yield key, words[self._places[key]].reshape(shape)

    def too_large(self, words: np.ndarray) -> bool:
        """Whether the sum ``words`` (signed) is beyond what honest clients add up to: then it is none."""
        for key, sums in self.views(words):
            one = LARGEST * GRID if self.bits == 64 else self.reach[key] / self.step[key] + 1
            bound = int(self.partitions * one)
            if sums.size and not -bound <= int(sums.min()) <= int(sums.max()) <= bound:
                return True
        return False

    def mean(self, key: Hashable, words: np.ndarray, weight: int) -> np.ndarray:
        """One summand of the sum ``words`` (signed), divided by the ``weight`` in it, float32."""
        sums = words[self._places[key]].reshape(self.shapes[key])
        return divided(sums, weight) if self.bits == 64 else (sums * (self.step[key] / weight)).astype(np.float32)


class Words:
    """A node's own: the sum of what its partitions send. ``tail``: weight, weight times loss in steps, partitions."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.vector, self.tail = np.zeros(layout.size, layout.dtype), np.zeros(TAIL, np.dtype("<u8"))
        self._views = dict(layout.views(self.vector.view(f"<i{layout.bits // 8}")))
        self._sums = FixedPointMeans(self._views) if layout.bits == 64 else None

    def add(self, summands: Arrays, weight: int, loss: float, rng: np.random.Generator) -> None:
        """Add a partition's ``summands`` (of those that it leaves out, zeros), entirely or, raising OverflowError or
        ValueError, not at all. ``rng`` rounds at 16 bits."""
        # What never leaves a client is empty here.
        summands = {key: x for key, x in summands.items() if x.size or key in self.layout.shapes}
        if strangers := summands.keys() - self.layout.shapes.keys():
            raise ValueError(f"a summand {next(iter(strangers))!r} that the round does not have")
        if not all(np.isfinite(x).all() for x in summands.values()) or not math.isfinite(loss):
            raise ValueError("an update or a loss that is not finite")
        if abs(loss) * weight * LOSS >= 2**55:
            raise OverflowError(f"a loss of {loss:g} is too large to be averaged")
        if self._sums is not None:
            self._sums.add(summands, weight)
        else:
            rounding = rng if self.layout.bits == 16 else None
            grids = {key: (self.layout.reach[key], self.layout.step[key], rounding) for key in summands}
            steps: dict[Any, np.ndarray] = {key: ring.steps(x, *grids[key]) for key, x in summands.items()}
            for key, x in steps.items():
                self._views[key] += x.astype(self._views[key].dtype)
        told = np.array([weight, round(weight * loss * LOSS), 1], np.int64)
        self.tail += told.view(self.tail.dtype)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Vector and tail, ready to be masked in place."""
        for key in self._views if self._sums else ():
            self._sums.steps(key)  # type: ignore[union-attr]
        return self.vector, self.tail


def told(tail: np.ndarray) -> tuple[int, float, int]:
    """Weight, mean loss and number of partitions in the sum of all tails (words)."""
    weight, loss, partitions = (int(value) for value in ring.signed(tail))
    return weight, loss / LOSS / weight if weight else 0.0, partitions
