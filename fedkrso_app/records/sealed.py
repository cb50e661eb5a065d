"""What travels beside :mod:`records.protocol` where updates are under masks (:mod:`federation.sealing`).

train          + Roster          -> Sealed    who takes part; the node's vector under masks
query.unmask   Unmask            -> Shares    whose vectors arrived; what opens their sum, and no other
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedkrso_app.records import protocol, wire
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused

UNMASK = "query.unmask"
ROSTER, VECTORS, SHARES = "roster", "sealed", "shares"  # records
KEY, SESSION = 32, 16  # bytes of a public key, of a session's name
TAIL = 3  # words beside the vector: weight, weighted loss, partitions
LOSS = 2.0**20  # steps of 1 in the weighted loss
_ID = 8  # bytes of a node's id


@dataclass(frozen=True)
class Party:
    """A node of a roster: its id, its partitions that are asked, its public key and its peer's signature on that."""

    node: int
    partitions: tuple[int, ...]
    key: bytes
    signature: bytes = b""


@dataclass(frozen=True)
class Roster:
    """Who takes part in one round, in the order of their first partitions: the same for all of them."""

    session: bytes
    parties: tuple[Party, ...]
    threshold: int

    def __len__(self) -> int:
        return len(self.parties)

    @property
    def partitions(self) -> list[int]:
        return [partition for party in self.parties for partition in party.partitions]

    @property
    def keys(self) -> list[bytes]:
        return [party.key for party in self.parties]

    def record(self) -> ConfigRecord:
        return ConfigRecord(
            {
                "session": self.session,
                "threshold": self.threshold,
                "nodes": b"".join(party.node.to_bytes(_ID) for party in self.parties),
                "counts": [len(party.partitions) for party in self.parties],
                "partitions": self.partitions,
                "keys": self.keys,
                "signatures": [party.signature for party in self.parties],
            }
        )

    @classmethod
    def read(cls, content: RecordDict) -> "Roster":
        record = protocol.config(content, ROSTER)
        session, nodes = _bytes(record, "session"), _bytes(record, "nodes")
        counts, partitions = _list(record, "counts", int), _list(record, "partitions", int)
        keys, signatures = _list(record, "keys", bytes), _list(record, "signatures", bytes)
        n = len(counts)
        if not len(nodes) == _ID * n or not len(keys) == len(signatures) == n or sum(counts) != len(partitions):
            raise Refused("the lists of the roster have different lengths")
        ids = [int.from_bytes(nodes[_ID * i : _ID * (i + 1)]) for i in range(n)]
        ends = np.cumsum(counts, dtype=int).tolist()
        held = [tuple(partitions[end - count : end]) for end, count in zip(ends, counts, strict=True)]
        parties = tuple(Party(*each) for each in zip(ids, held, keys, signatures, strict=True))
        return cls(session, parties, wire.number(record, "threshold", int, 1, 2**15))


@dataclass(frozen=True)
class Sealed:
    """What a node sends: ``vector`` and ``tail`` under masks, a bundle for each party of the roster (its own too), and
    a check of each secret: b_u first, then k_uv for every other v in the roster's order. ``seconds``: of training, in
    tens. ``epsilon``: as in :class:`Figures`."""

    vector: np.ndarray
    tail: np.ndarray
    bundles: list[bytes]
    checks: bytes
    session: bytes = b""
    seconds: int = 0
    epsilon: float | None = None

    def records(self) -> RecordDict:
        shares = ConfigRecord({"session": self.session, "bundles": self.bundles, "checks": self.checks})
        shares["train-seconds"] = self.seconds
        shares.update({} if self.epsilon is None else {"epsilon": self.epsilon})
        return RecordDict({VECTORS: wire.pack({"vector": self.vector, "tail": self.tail}), SHARES: shares})

    @classmethod
    def read(cls, content: RecordDict, dtype: str, size: int) -> "Sealed":
        """``size`` words of ``dtype`` are expected."""
        schema = Schema({"vector": Field(dtype, (size,)), "tail": Field("uint64", (TAIL,))})
        arrays = wire.unpack(protocol.arrays(content, VECTORS), schema)
        record = protocol.config(content, SHARES)
        bundles, seconds = _list(record, "bundles", bytes), wire.number(record, "train-seconds", int, 0, 2**31)
        session, checks = _bytes(record, "session"), _bytes(record, "checks")
        epsilon = wire.number(record, "epsilon", float, 0, 1e6) if "epsilon" in record else None
        return cls(arrays["vector"], arrays["tail"], bundles, checks, session, seconds, epsilon)


@dataclass(frozen=True)
class Unmask:
    """The places of the nodes whose vectors arrived, and what each of them has packed for the receiver."""

    session: bytes
    survivors: list[int]
    bundles: list[bytes]

    def content(self) -> RecordDict:
        record = ConfigRecord({"session": self.session, "survivors": self.survivors, "bundles": self.bundles})
        return RecordDict({"unmask": record})

    @classmethod
    def read(cls, content: RecordDict) -> "Unmask":
        record = protocol.config(content, "unmask")
        survivors, bundles = _list(record, "survivors", int), _list(record, "bundles", bytes)
        if len(bundles) != len(survivors):
            raise Refused("survivors and bundles differ in number")
        return cls(_bytes(record, "session"), survivors, bundles)


@dataclass(frozen=True)
class Shares:
    """A node's shares, for each survivor those of b_u and of k_uv for the lost ones, joined."""

    session: bytes
    shares: list[bytes]

    def content(self) -> RecordDict:
        return RecordDict({SHARES: ConfigRecord({"session": self.session, "shares": self.shares})})

    @classmethod
    def read(cls, content: RecordDict, session: bytes, count: int, size: int) -> list[bytes]:
        """The ``count`` joined shares, each of ``size`` bytes, of a node in this ``session``."""
        record = protocol.config(content, SHARES)
        if _bytes(record, "session") != session:
            raise Refused("its shares are of another session")
        shares = _list(record, "shares", bytes)
        if len(shares) != count or any(len(each) != size for each in shares):
            raise Refused("its shares have a wrong number or length")
        return shares


def _bytes(record: ConfigRecord, key: str) -> bytes:
    value = record.get(key)
    if not isinstance(value, bytes):
        raise Refused(f"{key} is not of type bytes")
    return value


def _list(record: ConfigRecord, key: str, kind: type) -> list:
    value: Sequence | None = record.get(key)  # type: ignore[assignment]
    if not isinstance(value, list) or any(type(item) is not kind for item in value):
        raise Refused(f"{key} is no list of {kind.__name__}")
    return value
