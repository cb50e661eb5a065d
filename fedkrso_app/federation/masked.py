"""The sum of a round whose updates are under masks, and which nodes it is of."""

import logging
import secrets
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core import ring, shamir
from fedkrso_app.federation.aggregate import Aggregate, Unopened
from fedkrso_app.federation.layout import Layout, told
from fedkrso_app.federation.nodes import Nodes, sampled
from fedkrso_app.federation.sealed_sum import Note, SealedSum
from fedkrso_app.federation.sealing import MOST, context
from fedkrso_app.federation.transforms import Transform
from fedkrso_app.records.protocol import TRAIN
from fedkrso_app.records.sealed import SESSION, Party, Roster
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Method
from fedkrso_app.strategies.privacy import Privacy
from fedkrso_app.strategies.secure import SecureSums, narrow

logger = logging.getLogger("flwr")

_PARTITIONS = 256  # of one round: so many of the largest values have room in 63 bits


class Masked(Aggregate):
    """The sum of a round whose updates are under masks. ``story`` is that of :func:`masks.story_of`; the rest as
    :class:`SealedSum` has it."""

    def __init__(
        self,
        method: Method,
        round: int,
        transforms: Sequence[Transform],
        start: Arrays,
        roster: Roster,
        story: str,
        note: Note,
        nodes: Nodes,
    ) -> None:
        super().__init__(method, round, transforms, start)
        self.layout = Layout(method, round, method.instructions(round), roster.partitions)
        ctx = context(roster, round, TRAIN, str(self.layout), story)
        self.sealed = SealedSum(roster, ctx, self.layout.size, self.layout.dtype, nodes, self.config, note)
        self._loss: float | None = None

    @property
    def records(self) -> RecordDict:
        return self.sealed.records

    def apart(self, content: RecordDict, partitions: Sequence[int]) -> Iterator[tuple[Sequence[int], RecordDict]]:
        """A node's reply is one."""
        yield partitions, content

    def accept(self, content: RecordDict, node: int, partitions: Sequence[int]) -> dict[int, dict[str, float]]:
        reply = self.sealed.read(content)
        figures = {"train_seconds": float(reply.seconds), "peak_bytes": 0.0}
        if self.config.of(Privacy).unit == "example":
            if reply.epsilon is None:
                raise Refused("it says no epsilon")
            figures["epsilon"] = reply.epsilon
        self.sealed.add(reply, node)
        return dict.fromkeys(partitions, figures)

    def open(self, grid: Any, figures: dict[str, Any]) -> None:
        self.sealed.open(grid, self.round, figures)
        words = ring.signed(self.sealed.vector)
        self.weight, loss, clients = told(self.sealed.tail)
        self._loss = loss if self.config.of(Privacy).unit == "none" else None
        if not 1 <= clients <= min(self.sealed.asked, self.weight) or self.layout.too_large(words):
            raise Unopened("the sum is none that honest nodes add up to: one of them sent something else")
        figures["clients"] = clients

    @property
    def loss(self) -> float | None:
        return self._loss

    def mean(self, key: Hashable) -> np.ndarray:
        mean = self.layout.mean(key, ring.signed(self.sealed.vector), self.weight)
        by_difference = narrow(self.config) or self.config.of(Privacy).unit == "client"
        return self.moved(key, mean) if by_difference else mean

    def __contains__(self, key: Hashable) -> bool:
        """A summand that clients draw (no array of every reply) and that is zero in the sum counts as not drawn."""
        if key not in self.layout.shapes:
            return False
        return key in self.method.reply.fields or bool(dict(self.layout.views(self.sealed.vector))[key].any())


def roster_of(asked: Mapping[int, Sequence[int]], nodes: Nodes, config: Config) -> Roster:
    """The nodes of a round (node id -> partitions), with a session of its own. Raises :class:`Unopened` where they are
    too few."""
    t = check_nodes(len(asked), config, Unopened)
    if (partitions := sum(map(len, asked.values()))) > _PARTITIONS:
        raise Unopened(f"{partitions} partitions are asked; secure sums are of at most {_PARTITIONS}")
    order = sorted(asked, key=lambda node: min(asked[node]))
    parties = tuple(Party(node, tuple(sorted(asked[node])), *nodes.keys[node]) for node in order)
    return Roster(secrets.token_bytes(SESSION), parties, t)


def check_nodes(n: int, config: Config, error: type[ValueError] = ConfigError, about: str = "") -> int:
    """The threshold of a round of ``n`` nodes. Raises ``error`` where there can be none;
    ``about``: why there are so many."""
    own = config.of(SecureSums)
    if n < own.min_cohort:
        raise error(
            f"secure-aggregation needs at least {own.min_cohort} nodes per round; {about or f'this one has {n}'}."
        )
    if n > MOST:
        raise error(f"secure-aggregation takes at most {MOST} nodes per round, not {n}: lower fraction-train.")
    least = shamir.least_threshold(n)
    t = own.threshold or shamir.usual_threshold(n)
    if t < least:
        raise error(f"secagg.threshold = {t} is below {least}, the least for {n} nodes.")
    if t > n:
        raise error(f"secagg.threshold = {t} is above {n}, the number of nodes per round.")
    if own.colluders >= t:
        raise error(f"secagg.colluders = {own.colluders} leaves nobody who adds noise: it must be below {t}.")
    return t


def check_federation(nodes: Nodes, config: Config) -> None:
    """Raise :class:`ConfigError`, before round 1, where the rounds of this federation cannot have a secure sum."""
    clients = sampled(config.fraction_train, nodes.expected)
    n = min(clients, nodes.count)
    about = f"fraction-train = {config.fraction_train:g} of {nodes.count} nodes is {n}"
    t = check_nodes(n, config, about=about)
    if n == t:
        logger.warning("Of %d nodes per round none may be missing: a sum of fewer is not opened", n)
    if config.evaluate == "clients" and n < nodes.count:
        logger.warning(
            "fraction-train = %g: sums of tallies over other nodes in each round tell how many validation rows a node "
            "has; see docs/privacy-protocol.md",
            config.fraction_train,
        )
    if not all(signature for _, signature in nodes.keys.values()):
        logger.warning(
            "The nodes' keys are not signed: secure sums hide updates from a server that follows the protocol, not "
            "from one that makes up nodes"
        )
