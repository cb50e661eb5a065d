"""What travels under masks, added up at the server: it sees the sum, and none of what it is the sum of."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict

from fedkrso_app.config import Config
from fedkrso_app.federation.aggregate import Unopened
from fedkrso_app.federation.nodes import Nodes
from fedkrso_app.federation.opening import Opening
from fedkrso_app.federation.sealing import CHECK, bundle_size
from fedkrso_app.records import wire
from fedkrso_app.records.sealed import ROSTER, TAIL, UNMASK, Roster, Sealed, Shares, Unmask
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.secure import SecureSums

logger = logging.getLogger("flwr")

Note = Callable[[list[int]], None]
_ANSWERS = 300.0  # seconds to wait for the answers that open a sum; a device may have to start its process first


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
