"""The nodes: which of them holds which partitions, takes part in a round, and is at which version."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedkrso_app.config import ConfigError
from fedkrso_app.core.projection import probe, stream
from fedkrso_app.records.ledger import Ledger, LedgerError
from fedkrso_app.records.protocol import JOIN, LEAVE, Answer, Question
from fedkrso_app.records.wire import Refused

logger = logging.getLogger("flwr")

_GATHERING = 120.0  # seconds to wait, before the first round, for nodes that have not come yet
_AGAIN = 120.0  # seconds for the answer of a node that could not take part when asked before
_FAREWELL = 30.0  # seconds for the nodes to remove their files at the end


UNKNOWN_HISTORY = -2  # version of a node that holds files of this run, but not those of the server's entries


def sampled(fraction: float, clients: int) -> int:
    """How many of ``clients`` (partitions) are asked in a round."""
    return max(1, int(fraction * clients + 0.5))


def named(partitions: Sequence[int]) -> str:
    """Ascending partition ids in few letters: "0-4, 7"."""
    runs: list[list[int]] = []
    for partition in partitions:
        if runs and partition == runs[-1][1] + 1:
            runs[-1][1] = partition
        else:
            runs.append([partition, partition])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


class Nodes:
    """The nodes of a run, asked who they are before they take part.

    ``model`` is the digest of the server's W^0, or "" for that of the first node that joins; ``run`` (16 hex digits,
    the run folder's id) names the files of this run on the nodes, also after a resume; ``ledger`` is the server's;
    ``commits`` are those of :class:`Question`.
    """

    def __init__(
        self, model: str, run: str, timeout: float, ledger: Ledger, commits: Mapping[str, str] | None = None
    ) -> None:
        self._timeout = timeout  # seconds for an answer; a node may have to fetch its model first
        self.model, self.run, self._ledger = model, run, ledger
        self.commits = dict(commits or {})  # of the hub's model and dataset; what is missing the first node tells
        self.partitions: dict[int, tuple[int, ...]] = {}  # node id -> partition ids, of those that can take part
        self.versions: dict[int, int] = {}  # node id -> version it is known to hold
        # (node id, partition id) -> the version that a node with this partition alone would hold
        self.alone: dict[tuple[int, int], int] = {}
        self._problems: dict[int, str] = {}  # node id -> why it cannot take part
        self._absent: dict[int, int] = {}  # node id -> how many partitions it holds, of those that cannot
        self.expected = 0  # partitions of the federation
        self.keys: dict[int, tuple[bytes, bytes]] = {}  # node id -> its public key for masks, signature
        self._expelled: set[int] = set()  # node ids

    def wait_for_all(self, grid: Any) -> None:
        """Return once every node of the federation has joined, or with fewer (a warning) when that takes too long.

        Raises ConfigError, with the reason a node gave, when none can take part.
        """
        began = time.monotonic()
        self.welcome(grid)
        while self.joined + sum(self._absent.values()) < max(1, self.expected):
            if time.monotonic() > began + _GATHERING:
                break
            time.sleep(0.5)
            self.welcome(grid)
        if not self.partitions and self._problems:
            raise ConfigError(f"no node can take part: {next(iter(self._problems.values()))}")
        if not self.partitions:
            raise ConfigError("no node joined: start SuperNodes, then run again.")
        if self.joined < self.expected:
            logger.warning("%d of %d partitions have joined; the run starts with them", self.joined, self.expected)

    @property
    def joined(self) -> int:
        """How many partitions can take part."""
        return len({partition for held in self.partitions.values() for partition in held})

    @property
    def count(self) -> int:
        """How many nodes are known, those included that cannot take part now."""
        return len(self.partitions.keys() | self._absent.keys())

    def found(self, node: int, version: int, partitions: Sequence[int]) -> None:
        """Note that ``node`` is at ``version``, as a message about its ``partitions`` says."""
        self.versions[node] = version
        self.alone |= {(node, partition): version for partition in partitions}

    def welcome(self, grid: Any, again: bool = False) -> None:
        """Ask every node that is not known yet; with ``again`` those too that could not take part when asked before."""
        known = self.partitions.keys() | self._expelled | (set() if again else self._problems.keys())
        new = [node for node in grid.get_node_ids() if node not in known]
        timeout = min(_AGAIN, self._timeout) if again else self._timeout
        content = Question(self.model, probe(), self.run, self.commits).content()
        messages = [Message(content, node, JOIN) for node in new]
        answered = set()
        for reply in grid.send_and_receive(messages, timeout=timeout):
            asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
            node = asked[reply.metadata.reply_to_message_id]
            answered.add(node)
            try:
                self._admit(node, reply)
                self._problems.pop(node, None)
                self._absent.pop(node, None)
            except Refused as reason:
                self._complain(node, str(reason))
        for node in new:
            if node not in answered:
                self._complain(node, f"no answer within {timeout:g} s")

    def wait_online(self, grid: Any, count: int) -> None:
        """Wait, at most as long as for an answer, until ``count`` nodes that can take part are online."""
        end, logged = time.monotonic() + self._timeout, False
        while len(self._online(grid)) < count and time.monotonic() < end:
            if not logged:
                logger.warning("fewer than %d nodes are online; waiting for them", count)
            logged = True
            time.sleep(1.0)
            self.welcome(grid)

    def sample(self, grid: Any, fraction: float, seed: int, round: int) -> dict[int, list[int]]:
        """This round's nodes, each with the partitions that it is asked for: the same whenever seed, round and the
        partitions present are the same."""
        present = self._online(grid)
        chosen = stream(seed, "sample", round).permutation(sorted(present))[: sampled(fraction, len(present))]
        asked: dict[int, list[int]] = {}
        for partition in map(int, sorted(chosen)):
            asked.setdefault(present[partition], []).append(partition)
        return asked

    def _online(self, grid: Any) -> dict[int, int]:
        """Partition id -> node id."""
        online = set(grid.get_node_ids())
        present: dict[int, int] = {}
        for node, held in self.partitions.items():
            for partition in held if node in online else ():
                if partition in present:
                    logger.warning(
                        "partition %d joined twice; node %d takes part, not %d", partition, node, present[partition]
                    )
                present[partition] = node
        return present

    def expel(self, node: int, reason: str) -> None:
        """Ask ``node`` nothing more in this run."""
        self._complain(node, reason)
        self._expelled.add(node)
        self._absent[node] = max(1, len(self.partitions.pop(node, ())))

    def dismiss(self, grid: Any) -> None:
        """Have all nodes remove this run's files."""
        record = RecordDict({"leave": ConfigRecord({"run": self.run})})
        messages = [Message(record, node, LEAVE) for node in grid.get_node_ids()]
        for _ in grid.send_and_receive(messages, timeout=_FAREWELL):
            pass

    def _complain(self, node: int, reason: str) -> None:
        if self._problems.get(node) != reason:  # once, though it is asked again every round
            logger.warning("node %d cannot take part: %s", node, reason)
        self._problems[node] = reason
        self._absent.setdefault(node, 1)

    def _admit(self, node: int, reply: Message) -> None:
        if reply.has_error():
            raise Refused(f"{reply.error.reason or 'no reason given'} (code {reply.error.code})".strip())
        answer = Answer.read(reply.content)
        self.expected, self._absent[node] = answer.total or self.expected, max(1, len(answer.partitions))
        where = f"partition {named(answer.partitions)}: " if answer.partitions else ""
        if answer.error:
            raise Refused(f"{where}{answer.error}")
        self.model = self.model or answer.model
        if answer.model != self.model:
            raise Refused(f"{where}other weights or label names than the node that joined first")
        if answer.dataset and answer.dataset != self.commits.setdefault("dataset", answer.dataset):
            raise Refused(f"{where}its rows are {answer.dataset}, not {self.commits['dataset']} as the others'")
        known = answer.version < 0 or self._holds(answer.version, answer.stamp)
        self.found(node, answer.version if known else UNKNOWN_HISTORY, answer.partitions)
        self.keys[node] = answer.key, answer.signature
        self.partitions[node] = answer.partitions

    def _holds(self, version: int, stamp: str) -> bool:
        """Whether a node that says it is at ``version`` has reached it by the server's entries, or is so far behind
        that those replace all it has."""
        if version < min(self._ledger.versions(), default=0):
            return True
        try:
            return self._ledger.stamp(version) == stamp
        except LedgerError:
            return False
