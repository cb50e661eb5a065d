"""The messages of a round and what comes back: bytes are counted, and why a reply does not count is logged."""

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from flwr.app import Message, RecordDict

from fedkrso_app.config import Config
from fedkrso_app.federation import budget
from fedkrso_app.federation.aggregate import Aggregate
from fedkrso_app.federation.nodes import UNKNOWN_HISTORY, Nodes
from fedkrso_app.federation.published import Published
from fedkrso_app.records import protocol, wire
from fedkrso_app.records.protocol import TRAIN, Instructions, Status
from fedkrso_app.records.wire import Refused

logger = logging.getLogger("flwr")


class Exchange:
    """Those of one round: it asks once to train, and after that at most once to evaluate."""

    def __init__(self, round: int, published: Published, nodes: Nodes, config: Config) -> None:
        self.round, self.published, self.nodes, self.config = round, published, nodes, config
        self.figures = no_figures()
        self.spent = 0  # clients that declined by the run's bound on ε
        self._training = False
        self._asked: list[tuple[Message, tuple[int, Sequence[int]]]] = []  # with node and partitions

    def ask(
        self,
        kind: str,
        asked: Mapping[int, Sequence[int]],
        method: Mapping[str, Any] = MappingProxyType({}),
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[Message]:
        """A message for each node of ``asked`` (node id -> partition ids), with the ``method``'s instructions and
        ``more`` records; nodes that lack the same entries share them.

        Bytes are those of messages to each partition by itself.
        """
        version, self._training = self.published.version, kind == TRAIN
        stamp, round = self.published.ledger.stamp(version), self.round if self._training else 0

        @functools.cache
        def entries(since: int) -> RecordDict:
            return self.published.catch_up(max(since, -1))

        @functools.cache
        def content(since: int, partitions: tuple[int, ...] = ()) -> RecordDict:
            afresh = since == UNKNOWN_HISTORY
            instructions = Instructions(self.nodes.run, version, stamp, afresh, round, method, partitions)
            return RecordDict({**entries(since), kind: instructions.record(), **more})

        messages = []
        for node, partitions in asked.items():
            alone = len(self.nodes.partitions[node]) == 1
            text = content(self.nodes.versions[node], () if alone else tuple(partitions))
            messages.append(Message(text, node, kind, group_id=str(self.round)))
        behind = [self.nodes.alone[node, partition] for node, partitions in asked.items() for partition in partitions]
        if self.config.secure_aggregation:  # where a node is one
            behind = [self.nodes.versions[node] for node in asked]
        sizes = {since: wire.measured_bytes(content(since)) for since in dict.fromkeys(behind)}
        self.figures["downlink_bytes"] += sum(sizes[since] for since in behind)
        if missed := [since for since in behind if since < version - 1]:
            usual = wire.measured_bytes(content(version - 1))
            self.figures["catchup_bytes"] += sum(sizes[since] - usual for since in missed)
        self._asked = list(zip(messages, asked.items(), strict=True))
        return messages

    def received(
        self, replies: Iterable[Message], sums: Aggregate
    ) -> Iterator[tuple[int, Sequence[int], RecordDict, int]]:
        """The replies that are no errors, partition by partition unless they are under masks: node, partitions,
        content, its bytes. Errors and silence are logged and counted."""
        waiting: dict[str, tuple[int, Sequence[int]]] = {}
        sent = False
        for reply in replies:
            # Messages have their ids only now: the grid sends them when the first reply is asked for.
            if not sent:
                waiting, sent = {message.metadata.message_id: asked for message, asked in self._asked}, True
            node, partitions = waiting.pop(reply.metadata.reply_to_message_id, (0, ()))
            if not partitions:
                logger.warning("a reply that nobody is waiting for was dropped")
            elif reply.has_error():
                reason = f"{reply.error.reason or 'no reason given'} (code {reply.error.code})"
                self._without(partitions, "failed", f"failed: {reason.strip()}")
            else:
                for some, content in sums.apart(reply.content, partitions):
                    if reason_given := protocol.reason_of_failure(content):
                        self._without(some, "failed", f"failed: {reason_given}")
                        continue
                    size = wire.measured_bytes(content)
                    self.figures["uplink_bytes"] += size
                    yield node, some, content, size
        silent = waiting.values() if sent else [asked for _, asked in self._asked]
        for _, partitions in silent:
            self._without(partitions, "failed", f"sent no reply within {self.config.round_timeout:g} s")
        self._asked = []

    def _without(self, partitions: Sequence[int], counter: str, reason: str) -> None:
        """Log why a reply does not count; in training it is counted, as ``refused`` or ``failed``."""
        self.spent += len(partitions) * (budget.OF_THE_RUN in reason)
        for partition in partitions:
            logger.warning("partition %s %s", partition, reason)
            if self._training:
                self.figures[counter] += 1

    @contextmanager
    def refusing(self, partitions: Sequence[int]) -> Iterator[None]:
        """Whoever raises :class:`Refused` inside, does not count."""
        try:
            yield
        except Refused as reason:
            self._without(partitions, "refused", f"refused: {reason}")

    def check_version(self, content: RecordDict, node: int, partitions: Sequence[int]) -> int:
        """The version that a reply was made at, if it is the newest; else :class:`Refused`."""
        status = Status.read(content, self.published.version)
        if status.key:
            self.nodes.keys[node] = status.key, status.signature
            raise Refused("has lost its key for masks and made a new one: it takes part in the next round")
        if status.need_sync:
            self.nodes.found(node, status.version, partitions)
            raise Refused(f"is at version {status.version} and asks to be brought up to date")
        if status.version != self.published.version:
            raise Refused(f"is at version {status.version}, expected {self.published.version}")
        return status.version


def no_figures() -> dict[str, Any]:
    """What a round is described by, before there was any."""
    counts = ("uplink_bytes", "downlink_bytes", "catchup_bytes", "paper_bytes", "clients", "refused", "failed")
    return {"round": 0, "version": 0, "train_loss": None, **dict.fromkeys(counts, 0), "partitions": [], "seconds": 0.0}
