"""How the good replies of a round become one: exact weighted means, robust ones, or the replies themselves."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedkrso_app.core.fixed_point import FixedPointMeans
from fedkrso_app.core.robust import RobustMeans
from fedkrso_app.federation.transforms import Differences, Transform
from fedkrso_app.records import protocol, wire
from fedkrso_app.records.protocol import UPDATE, Figures
from fedkrso_app.records.schema import differences
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Method
from fedkrso_app.strategies.privacy import Privacy


class Unopened(ValueError):
    """Replies have come, and the round has no mean all the same; the text says why."""


class Aggregate:
    """The sums of one round of ``method``, in which no order of arrival changes a bit.

    ``start`` has the states that training began with, where ``transforms`` or a bound need them. Of methods whose entry
    is no function of means the replies stay in memory too.
    """

    def __init__(
        self, method: Method, round: int = 0, transforms: Sequence[Transform] = (), start: Arrays | None = None
    ) -> None:
        self.method, self.config, self.round = method, method.config, round
        self.transforms, self.start = transforms, start or {}
        kind = method.config.aggregation
        self._sums = FixedPointMeans() if kind == "mean" else RobustMeans(kind)
        self._kept: dict[int, tuple[int, Arrays]] = {}
        self._losses: dict[int, tuple[float, int]] = {}  # partition -> its loss and its weight
        self.weight = 0  # of all replies

    # What travels

    @property
    def records(self) -> RecordDict:
        """What a train message has beside the instructions and entries."""
        return RecordDict()

    def apart(self, content: RecordDict, partitions: Sequence[int]) -> Iterator[tuple[Sequence[int], RecordDict]]:
        """What is counted or refused as one, in a node's reply for ``partitions``: each of them."""
        for partition, own in protocol.apart(content, partitions):
            yield (partition,), own

    def accept(self, content: RecordDict, node: int, partitions: Sequence[int]) -> dict[int, dict[str, float]]:
        """Check one part of a ``node``'s reply and add it; returns figures by partition. Raises :class:`Refused`."""
        (partition,) = partitions
        update, figures = protocol.arrays(content, UPDATE), Figures.read(content, self.config.of(Privacy).unit)
        schema = self.method.reply_of(partition)
        arrays = schema.filled(wire.decode(wire.unpack(update, schema.travelling)))
        self.method.check(arrays, self.round)
        if self.config.max_update_norm:
            norm = self._norm(arrays)
            if norm > self.config.max_update_norm:
                raise Refused(
                    f"its update has norm {norm:.4g}, above max-update-norm = {self.config.max_update_norm:g}"
                )
        for transform in reversed(self.transforms):
            arrays = dict(transform.reply(arrays, self.start))
        weight = figures.num_examples if self.config.weighting == "examples" else 1
        try:
            self.add(self.method.summands(arrays), arrays, weight, partition)
        except OverflowError as error:
            hint = "; set weighting = 'uniform'" if weight > 1 else ""
            raise Refused(f"{error}{hint}") from None
        if figures.train_loss is not None:
            self._losses[partition] = figures.train_loss, weight
        return {partition: {**figures.known(), "weight": weight}}

    def open(self, grid: Any, figures: dict[str, Any]) -> None:
        """Do what is left to do before there are means, and add to the round's ``figures``. Raises
        :class:`Unopened`."""

    # What becomes of it

    def add(self, summands: Mapping[Any, np.ndarray], reply: Arrays, weight: int, partition: int) -> None:
        """Count one reply, entirely or (raising OverflowError where a value is too large) not at all."""
        self._sums.add(summands, weight)
        self.weight += weight
        if not self.method.linear:
            self._kept[partition] = (weight, reply)

    @property
    def loss(self) -> float | None:
        """The mean training loss; None where nobody tells his."""
        if not self._losses:
            return None
        return sum(loss * weight for _, (loss, weight) in sorted(self._losses.items())) / self.weight

    def mean(self, key: Hashable) -> np.ndarray:
        """The weighted mean under ``key``, float32; a reply without it counts as zero."""
        return self._sums.mean(key, self.weight)

    def moved(self, key: Hashable, mean: np.ndarray) -> np.ndarray:
        """What a ``mean`` of differences leads to from the start, for methods that compute with values."""
        return mean + self.start[key] if self.method.from_values and key in self.start else mean  # type: ignore[index]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sums

    @property
    def replies(self) -> Sequence[tuple[float, Arrays]]:
        """Each reply with its share of the weight, in the order of the partitions, whatever that of arrival."""
        return [(weight / self.weight, reply) for _, (weight, reply) in sorted(self._kept.items())]

    def _norm(self, arrays: Arrays) -> float:
        """L2 norm of what a reply would move: its updates, and the differences of its states to the newest ones."""
        schema, moved = self.method.reply.only(arrays), arrays
        if not any(isinstance(transform, Differences) for transform in self.transforms):
            # A server that began without a model knows no states in round 1.
            known = [name for name in arrays if name not in schema.named("state") or name in self.start]
            moved = differences({name: arrays[name] for name in known}, self.start, schema)
        floats = [value for value in moved.values() if value.dtype == np.float32]
        return math.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in floats))
