"""How clients judged the model, added up: in clear, or under masks, where the server sees the sum and no client's own.

A tally under masks is whole steps of 2^-20, 64 bits each: counts are exact, sums of losses and of predictions rounded.
A version is judged at most once, ever: the same model gives the same tallies, and two sums that differ in one node give
that node's.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedkrso_app.config import Config
from fedkrso_app.core import ring
from fedkrso_app.federation.aggregate import Unopened
from fedkrso_app.federation.nodes import Nodes
from fedkrso_app.federation.sealed_sum import Note, SealedSum
from fedkrso_app.federation.sealing import context
from fedkrso_app.records import protocol, wire
from fedkrso_app.records.protocol import EVALUATE, TALLY
from fedkrso_app.records.schema import Schema
from fedkrso_app.records.sealed import TAIL, Roster
from fedkrso_app.records.wire import Refused

STEPS = 2.0**20  # of 1
_LARGEST = 2.0**34  # of a value: 256 of them have room in 63 bits

Score = Callable[[np.ndarray], tuple[float, float]]  # metric and loss; ValueError for a tally that cannot be


class Tallies:
    """The tallies of one round; ``schema`` is that of a reply."""

    def __init__(self, schema: Schema, score: Score) -> None:
        self.schema, self.score = schema, score
        self._tallies: dict[int, np.ndarray] = {}  # partition -> its own
        self._scores: dict[int, float] = {}

    @property
    def records(self) -> RecordDict:
        """What an evaluate message has beside the instructions and entries."""
        return RecordDict()

    def accept(self, content: RecordDict, node: int, partitions: Sequence[int]) -> dict[str, float]:
        """Check a partition's reply and count it; returns figures of its own. Raises :class:`Refused`."""
        (partition,) = partitions
        tally = wire.unpack(protocol.arrays(content, TALLY), self.schema)["tally"]
        try:
            figures = dict(zip(("metric", "eval_loss"), self.score(tally), strict=True))
        except ValueError as error:
            raise Refused(f"tally: {error}") from None
        self._tallies[partition], self._scores[partition] = tally, figures["metric"]
        return figures

    def close(self, grid: Any, round: int, figures: dict[str, Any]) -> None:
        """Add to the round's ``figures``: the sum, and how clients differ. Raises :class:`Unopened`."""
        if self._tallies:
            figures["tally"] = sum(self._tallies[partition] for partition in sorted(self._tallies))
            own = np.array([self._scores[partition] for partition in sorted(self._scores)])
            figures["client_metric"] = {
                "mean": own.mean(), "sd": own.std(ddof=1) if len(own) > 1 else 0.0, "min": own.min(), "max": own.max()
            }  # fmt: skip


class MaskedTallies(Tallies):
    """Those of the ``plain`` kind under masks: no partition has figures of its own. ``version`` is that which is
    judged, ``story`` that of :func:`masks.story_of`; the rest as :class:`SealedSum` has it."""

    def __init__(
        self, plain: Tallies, roster: Roster, version: int, story: str, nodes: Nodes, config: Config, note: Note
    ) -> None:
        super().__init__(plain.schema, plain.score)
        (size,) = self.schema.fields["tally"].shape
        ctx = context(roster, version, EVALUATE, str(self.schema), story)
        self.sealed = SealedSum(roster, ctx, int(size), ring.word(64), nodes, config, note)

    @property
    def records(self) -> RecordDict:
        return self.sealed.records

    def accept(self, content: RecordDict, node: int, partitions: Sequence[int]) -> dict[str, float]:
        self.sealed.add(self.sealed.read(content), node)
        return {}

    def close(self, grid: Any, round: int, figures: dict[str, Any]) -> None:
        self.sealed.open(grid, round, figures)
        tally, judged = ring.signed(self.sealed.vector) / STEPS, int(ring.signed(self.sealed.tail)[-1])
        try:
            self.score(tally)
            if not 1 <= judged <= self.sealed.asked:
                raise ValueError(f"it is of {judged} partitions, of {self.sealed.asked} that were asked")
        except ValueError as error:
            raise Unopened(f"the sum is none that honest nodes add up to ({error})") from None
        figures["tally"] = tally


def summed(tallies: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A node's vector and tail (words), ready to be masked, from the ``tallies`` of those of its partitions that were
    judged. Raises OverflowError for a value that has no room in the sum."""
    vector, judged = np.zeros(0, np.int64), 0
    for tally in tallies:
        if not (np.abs(tally) < _LARGEST).all():
            raise OverflowError("a tally is too large to be added up under masks")
        steps = np.rint(tally * STEPS).astype(np.int64)
        vector, judged = vector + steps if judged else steps, judged + 1
    tail = np.zeros(TAIL, np.int64)
    tail[-1] = judged
    return vector.view(ring.word(64)), tail.view("<u8")
