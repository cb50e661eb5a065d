"""What the server and its nodes say to each other: every record and every key that travels, with its checks.

    query.join   Question        -> Answer            who a node is, and whether it can take part
    train        Instructions    -> Status, Figures, the update
    evaluate     Instructions    -> Status, the tally
    query.leave  the run's id    -> nothing           the run is over

Besides its instructions a train or evaluate message holds the ledger entries that the node lacks (``entry-<version>``),
or the weights that they lead to (``weights-<version>``). A node that holds several partitions is asked for some of them
and answers for each (:func:`together`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedkrso_app.records.wire import Refused, number

JOIN, LEAVE, TRAIN, EVALUATE = "query.join", "query.leave", "train", "evaluate"
UPDATE, TALLY = "update", "tally"  # the array records of the replies to train and evaluate
_VERSIONS = 2**31  # all are below


@dataclass(frozen=True)
class Question:
    """The server asks a node who it is. ``model`` is the digest of W^0 that it must have ("": any).

    ``commits`` are those of what the run reads from the hub, as ``name@commit`` by key ("model", "dataset").
    """

    model: str
    probe: str
    run: str
    commits: Mapping[str, str] = field(default_factory=dict)

    def content(self) -> RecordDict:
        record = ConfigRecord({"model": self.model, "probe": self.probe, "run": self.run})
        record.update({f"{key}-commit": commit for key, commit in self.commits.items()})
        return RecordDict({"join": record})

    @classmethod
    def read(cls, content: RecordDict) -> "Question":
        record = config(content, "join")
        asked = {key: _text(record, f"{key}-commit") for key in ("model", "dataset") if f"{key}-commit" in record}
        return cls(_text(record, "model"), _text(record, "probe"), _text(record, "run"), asked)


@dataclass(frozen=True)
class Answer:
    """A node says who it is and what it holds, or why it cannot take part (``error``)."""

    partitions: tuple[int, ...] = ()  # those that it holds; none: unknown
    total: int = 0  # of the federation's partitions; 0: unknown
    model: str = ""
    version: int = -1  # it holds nothing of the run
    stamp: str = ""  # of that version's entry
    error: str = ""
    dataset: str = ""  # the hub's, as name@commit, that it reads
    key: bytes = b""  # the public one of this node's masks, where updates travel under them
    signature: bytes = b""  # of that key, by the node's own

    def content(self) -> RecordDict:
        record = ConfigRecord({"partitions": list(self.partitions), "num-partitions": self.total})
        if self.error:
            record["error"] = self.error
        else:
            record.update({"model": self.model, "version": self.version, "stamp": self.stamp})
            record.update({"dataset-commit": self.dataset} if self.dataset else {})
            record.update(_signed(self.key, self.signature))
        return RecordDict({"join": record})

    @classmethod
    def read(cls, content: RecordDict) -> "Answer":
        record = config(content, "join")
        total = number(record, "num-partitions", int, 0, 2**31)
        partitions = _partitions(record, total)
        if "error" in record:
            return cls(partitions, total, error=_text(record, "error"))
        if not partitions:
            raise Refused("it names no partition")
        version = number(record, "version", int, -1, _VERSIONS)
        dataset = _text(record, "dataset-commit") if "dataset-commit" in record else ""
        stamp = _text(record, "stamp")
        signed = _key(record)
        return cls(partitions, total, _text(record, "model"), version, stamp, "", dataset, *signed)


@dataclass(frozen=True)
class Instructions:
    """What train and evaluate messages say beside the entries.

    ``method``: what the method adds for this round. ``partitions``: for which of a node's the message asks (none: for
    the one that it holds).
    """

    run: str
    version: int  # the reply must be made at this one
    stamp: str  # of that version's entry
    afresh: bool = False  # the node's files are not of this history: start without them
    round: int = 0  # of a train message
    method: Mapping[str, Any] = field(default_factory=dict)
    partitions: tuple[int, ...] = ()

    def record(self) -> ConfigRecord:
        record = ConfigRecord({"run": self.run, "version": self.version, "stamp": self.stamp, "afresh": self.afresh})
        record.update({"round": self.round} if self.round else {})
        record.update({"partitions": list(self.partitions)} if self.partitions else {})
        record.update(self.method)
        return record

    @classmethod
    def read(cls, content: RecordDict, kind: str) -> "Instructions":
        record = config(content, kind)
        known = ("run", "version", "stamp", "round", "afresh", "partitions")
        return cls(
            _text(record, "run"),
            number(record, "version", int, 0, _VERSIONS),
            _text(record, "stamp"),
            bool(record.get("afresh")),
            number(record, "round", int, 1, _VERSIONS) if kind == TRAIN else 0,
            {key: value for key, value in record.items() if key not in known},
            _partitions(record, 2**31) if "partitions" in record else (),
        )


@dataclass(frozen=True)
class Status:
    """At which version a reply was made; or that the node must be brought up to date from there first; or, with
    ``key``, that the one it joined with is lost and this is its new one."""

    version: int
    need_sync: bool = False
    key: bytes = b""
    signature: bytes = b""

    def record(self) -> ConfigRecord:
        record = ConfigRecord({"version": self.version})
        record.update({"need-sync": True} if self.need_sync else {})
        record.update(_signed(self.key, self.signature))
        return record

    @classmethod
    def read(cls, content: RecordDict, newest: int) -> "Status":
        record = config(content, "status")
        return cls(number(record, "version", int, -1, newest), bool(record.get("need-sync")), *_key(record))


@dataclass(frozen=True)
class Figures:
    """What a client says of its training: rows, mean loss, seconds, peak memory in bytes; where each of its rows is
    protected, no loss but the run's ε for them, rounded up."""

    num_examples: int
    train_loss: float | None
    train_seconds: float
    peak_bytes: int
    epsilon: float | None = None

    def known(self) -> dict[str, Any]:
        """What is said."""
        return {key: value for key, value in vars(self).items() if value is not None}

    def coarse(self) -> "Figures":
        """Those that may be told where rows or clients are protected: the time up to the next ten seconds, no loss and
        no memory, for they follow the rows."""
        return replace(self, train_loss=None, train_seconds=10.0 * math.ceil(self.train_seconds / 10), peak_bytes=0)

    def record(self) -> MetricRecord:
        return MetricRecord({key.replace("_", "-"): value for key, value in self.known().items()})

    @classmethod
    def read(cls, content: RecordDict, unit: str = "none") -> "Figures":
        """``unit``: what is protected, each "example" or each "client"."""
        record = content.get("metrics")
        if not isinstance(record, MetricRecord):
            raise Refused("record 'metrics' is missing")
        return cls(
            number(record, "num-examples", int, 1, 2**31),
            number(record, "train-loss", float, -1e30, 1e30) if unit == "none" else None,
            number(record, "train-seconds", float, 0, 1e9),
            number(record, "peak-bytes", int, 0, 2**62),
            number(record, "epsilon", float, 0, 1e9) if unit == "example" else None,
        )


def trained(status: Status, update: ArrayRecord, figures: Figures) -> RecordDict:
    """The reply to a train message."""
    return RecordDict({"status": status.record(), UPDATE: update, "metrics": figures.record()})


def failed(reason: str) -> RecordDict:
    """The reply of a partition that could not be trained or judged while others of its node could."""
    return RecordDict({"failed": ConfigRecord({"reason": reason})})


def together(replies: Mapping[int, RecordDict]) -> RecordDict:
    """The replies of a node's partitions (partition id -> reply) as one: of one alone, the reply itself."""
    if len(replies) == 1:
        return next(iter(replies.values()))
    content = RecordDict()
    for partition, reply in replies.items():
        for name, record in reply.items():
            content[name if name == "status" else f"{name}-{partition}"] = record
    return content


def apart(content: RecordDict, partitions: Sequence[int]) -> Iterator[tuple[int, RecordDict]]:
    """The replies that :func:`together` made one, each as if its partition had answered alone."""
    if len(partitions) == 1:
        yield partitions[0], content
        return
    common = {"status": content["status"]} if "status" in content else {}
    for partition in partitions:
        own = {name: f"{name}-{partition}" for name in (UPDATE, "metrics", TALLY, "failed")}
        yield partition, RecordDict(common | {name: content[key] for name, key in own.items() if key in content})


def reason_of_failure(content: RecordDict) -> str | None:
    """What :func:`failed` was told; None of any other reply."""
    return _text(config(content, "failed"), "reason") if "failed" in content else None


def arrays(content: RecordDict, name: str) -> ArrayRecord:
    """The array record ``name``. Raises :class:`Refused` if it is missing."""
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        raise Refused(f"record {name!r} is missing")
    return record


def config(content: RecordDict, name: str) -> ConfigRecord:
    """The config record ``name``. Raises :class:`Refused` if it is missing."""
    record = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise Refused(f"record {name!r} is missing")
    return record


def _text(record: ConfigRecord, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise Refused(f"{key} = {value!r} is not of type str")
    return value


def _partitions(record: ConfigRecord, total: int) -> tuple[int, ...]:
    """Partition ids below ``total``, each once."""
    given = record.get("partitions")
    ids = tuple(id for id in given if type(id) is int and 0 <= id < total) if isinstance(given, list) else ()
    if not isinstance(given, list) or len(set(ids)) < len(given):
        raise Refused(f"partitions = {given!r} is no list of partition ids below {total}, each once")
    return ids


def _signed(key: bytes, signature: bytes) -> dict[str, bytes]:
    return {"key": key, "signature": signature} if key else {}


def _key(record: ConfigRecord) -> tuple[bytes, bytes]:
    """The key for masks and the signature on it; b"" where there are none."""
    key, signature = record.get("key", b""), record.get("signature", b"")
    if not isinstance(key, bytes) or not isinstance(signature, bytes) or len(key) not in (0, 32):
        raise Refused("its key is none")
    return key, signature
