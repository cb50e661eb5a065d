"""Sums of what travels under masks: the server sees them, and none of what they are the sums of."""

import logging
import secrets
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core import ring, shamir
from fedkrso_app.federation.aggregate import Aggregate, Unopened
from fedkrso_app.federation.layout import Layout, told
from fedkrso_app.federation.nodes import Nodes, sampled
from fedkrso_app.federation.opening import Opening
from fedkrso_app.federation.sealing import CHECK, MOST, bundle_size, context
from fedkrso_app.federation.transforms import Transform
from fedkrso_app.records import wire
from fedkrso_app.records.protocol import TRAIN
from fedkrso_app.records.sealed import ROSTER, SESSION, TAIL, UNMASK, Party, Roster, Sealed, Shares, Unmask
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Method
from fedkrso_app.strategies.privacy import Privacy
from fedkrso_app.strategies.secure import SecureSums, narrow

logger = logging.getLogger("flwr")

_ANSWERS = 300.0  # seconds to wait for the answers that open a sum; a device may have to start its process first
Note = Callable[[list[int]], None]
_PARTITIONS = 256  # of one round: so many of the largest values have room in 63 bits


class SealedSum:
    """The vectors of one session, added as they come and not kept; :meth:`open` takes the masks off their sum.

    ``ctx`` is that of :func:`sealing.context`, and ``size`` that of the vector in words of ``dtype``. ``note`` is
    called with the partitions of the survivors before anything is asked of the nodes: it puts them down where a
    resumed run finds them.
    """

    def __init__(
        self, roster: Roster, ctx: bytes, size: int, dtype: np.dtype, nodes: Nodes, config: Config, note: Note
    ) -> None:
        self.roster, self.ctx, self.nodes, self.config, self._note = roster, ctx, nodes, config, note
        self.least = max(roster.threshold, config.of(SecureSums).min_cohort)
        self.vector, self.tail = np.zeros(size, dtype), np.zeros(TAIL, np.dtype("<u8"))
        self._arrived: dict[int, Sealed] = {}  # place -> what it sent, without its vector

    @property
    def records(self) -> RecordDict:
        """What a message has beside the instructions and entries."""
        return RecordDict({ROSTER: self.roster.record()})

    def read(self, content: RecordDict) -> Sealed:
        """A node's reply, once it is of this session. Raises :class:`Refused`."""
        n, bits = len(self.roster), 8 * self.vector.itemsize
        sealed = Sealed.read(content, f"uint{bits}", self.vector.size)
        if sealed.session != self.roster.session:
            raise Refused("it is sealed for another session")
        if len(sealed.bundles) != n or any(len(bundle) != bundle_size(n) for bundle in sealed.bundles):
            raise Refused("its shares for the others have a wrong number or length")
        if len(sealed.checks) != CHECK * n:
            raise Refused("the checks of its secrets have a wrong length")
        return sealed

    def add(self, sealed: Sealed, node: int) -> None:
        place = [party.node for party in self.roster.parties].index(node)
        self.vector += sealed.vector
        self.tail += sealed.tail
        nothing = np.zeros(0)
        self._arrived[place] = Sealed(nothing, nothing, sealed.bundles, sealed.checks)

    @property
    def asked(self) -> int:
        """How many partitions the nodes that have arrived were asked for."""
        return sum(len(self.roster.parties[place].partitions) for place in self._arrived)

    def open(self, grid: Any, round: int, figures: dict[str, Any]) -> None:
        """Leave the sums of what was sealed in ``vector`` and ``tail``; bytes go to ``figures``. Raises
        :class:`Unopened`."""
        survivors = sorted(self._arrived)
        if len(survivors) < self.least:
            raise Unopened(f"{len(survivors)} sealed replies have come; a sum of fewer than {self.least} stays closed")
        self._note(sorted(p for u in survivors for p in self.roster.parties[u].partitions))
        checks = {u: self._arrived[u].checks for u in survivors}
        opening = Opening(len(self.roster), self.roster.threshold, self.ctx, checks)
        complete = self._ask(grid, round, survivors, opening, figures)
        for place in sorted(opening.wrong):
            self._distrust(place, "its shares of the others' secrets are wrong")
        if not complete:
            for place in opening.dealers:
                self._distrust(place, "the shares that it gave the others are wrong")
            raise Unopened(
                f"{len(opening.answers)} of {len(self.roster)} nodes have answered for the sum, and no "
                f"{self.roster.threshold} of the answers open it"
            )
        opening.unmask(self.vector, self.tail)

    def _ask(self, grid: Any, round: int, survivors: list[int], opening: Opening, figures: dict[str, Any]) -> bool:
        """Collect answers until they are enough; whether they are. Their bytes are counted with all, and apart."""
        online, messages = set(grid.get_node_ids()), {}
        figures.setdefault("opening_bytes", 0)

        def count(way: str, content: RecordDict) -> None:
            size = wire.measured_bytes(content)
            figures[way] += size
            figures["opening_bytes"] += size

        for place, party in enumerate(self.roster.parties):
            if party.node in online:
                bundles = [self._arrived[u].bundles[place] for u in survivors]
                content = Unmask(self.roster.session, survivors, bundles).content()
                messages[place] = Message(content, party.node, UNMASK, group_id=str(round))
                count("downlink_bytes", content)
        timeout = min(_ANSWERS, self.config.round_timeout)
        for reply in grid.send_and_receive(list(messages.values()), timeout=timeout):
            places = {message.metadata.message_id: place for place, message in messages.items()}
            if reply.metadata.reply_to_message_id not in places:
                continue
            place = places[reply.metadata.reply_to_message_id]
            try:
                if reply.has_error():
                    raise Refused(reply.error.reason or f"code {reply.error.code}")
                count("uplink_bytes", reply.content)
                shares = Shares.read(reply.content, self.roster.session, len(survivors), opening.size)
            except Refused as reason:
                logger.warning("node %d does not help to open the sum: %s", self.roster.parties[place].node, reason)
                continue
            if opening.add(place, shares):
                return True
        return False

    def _distrust(self, place: int, reason: str) -> None:
        self.nodes.expel(self.roster.parties[place].node, reason)


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
