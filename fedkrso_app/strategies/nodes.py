"""Who is there: which node holds which partition, who takes part in a round, and at which version each one is."""

import logging
import time
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedkrso_app import wire
from fedkrso_app.config import ConfigError
from fedkrso_app.core.projection import probe, stream
from fedkrso_app.wire import Refused

logger = logging.getLogger("flwr")

_GATHERING = 120.0  # seconds to wait, before the first round, for nodes that have not come yet


class Nodes:
    """The nodes of a run, asked once each who they are before they take part."""

    def __init__(self, model_digest: str, timeout: float) -> None:
        self._timeout = timeout  # seconds for an answer; a node may have to fetch its model first
        self._join = ConfigRecord({"model": model_digest, "probe": probe()})
        self.partitions: dict[int, int | None] = {}  # node id -> partition id; None: cannot take part
        self.versions: dict[int, int] = {}  # node id -> version it is known to hold
        self._expected = 0

    def wait_for_all(self, grid: Any) -> None:
        """Return once every node of the federation has joined, or with fewer (a warning) when that takes too long.

        Raises ConfigError, with the reason a node gave, when none can take part.
        """
        self.welcome_new(grid)
        end = time.monotonic() + _GATHERING
        while len(self.partitions) < max(1, self._expected) and time.monotonic() < end:
            time.sleep(0.5)
            self.welcome_new(grid)
        if not self.partitions:
            raise ConfigError("no node came: start SuperNodes, then run again.")
        if len(self.partitions) < self._expected:
            logger.warning("%d of %d nodes are there; going on with them", len(self.partitions), self._expected)

    def welcome_new(self, grid: Any) -> None:
        """Ask every node that is not known yet. Raises ConfigError if all that are known cannot take part."""
        new = [node for node in grid.get_node_ids() if node not in self.partitions]
        messages = [Message(RecordDict({"join": self._join}), node, "query.join") for node in new]
        reasons = []
        for reply in grid.send_and_receive(messages, timeout=self._timeout):
            asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
            node = asked[reply.metadata.reply_to_message_id]
            try:
                self.partitions[node] = self._read(reply)
            except Refused as reason:
                self.partitions[node] = None
                reasons.append(str(reason))
                logger.warning("node %d cannot take part: %s", node, reason)
        if reasons and all(partition is None for partition in self.partitions.values()):
            raise ConfigError(f"no node can take part: {reasons[0]}")

    def sample(self, grid: Any, fraction: float, seed: int, round: int) -> list[int]:
        """This round's nodes, by partition id: the same whenever seed, round and those present are the same."""
        online = set(grid.get_node_ids())
        present = {p: node for node, p in self.partitions.items() if p is not None and node in online}
        count = max(1, int(fraction * len(present) + 0.5))
        chosen = stream(seed, "sample", round).permutation(sorted(present))[:count]
        return [present[int(partition)] for partition in sorted(chosen)]

    def _read(self, reply: Message) -> int:
        if reply.has_error():
            raise Refused(reply.error.reason or f"error {reply.error.code}")
        answer = reply.content.get("join")
        if not isinstance(answer, ConfigRecord):
            raise Refused("record 'join' is missing")
        if answer.get("error"):
            raise Refused(str(answer["error"]))
        self._expected = wire.number(answer, "num-partitions", int, 1, 2**31)
        return wire.number(answer, "partition-id", int, 0, 2**31)
