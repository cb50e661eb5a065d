"""What the rounds of a run have published: its entries, what a method keeps beside them, and what a node lacks."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedkrso_app.core.projection import stream
from fedkrso_app.federation.replica import first_needed
from fedkrso_app.federation.transforms import Transform
from fedkrso_app.records import wire
from fedkrso_app.records.history import History
from fedkrso_app.records.ledger import Entry, Ledger
from fedkrso_app.records.schema import superseded
from fedkrso_app.strategies.base import Arrays, Method


class Published:
    """The ``ledger`` of a run of ``method``, which has seen all entries that there are, and ``kept``, its arrays of
    role "server". ``weights`` gives all shared tensors at the newest version; None where the server has no model."""

    def __init__(
        self,
        method: Method,
        transforms: Sequence[Transform],
        ledger: Ledger,
        kept: Ledger,
        weights: Callable[[], Arrays | None],
    ) -> None:
        self.method, self.transforms, self.ledger, self.kept, self.weights = method, transforms, ledger, kept, weights
        self.masked = method.config.secure_aggregation
        self.history = History(method.entry.travelling)
        for version in ledger.versions() if self.masked else ():
            self.history.follow(version, ledger.read(version).arrays)
        method.replies = int(self.record["clients"])
        if self.version > 0 and method.entry.named("server"):
            method.kept = dict(kept.read(self.version).arrays)

    @property
    def version(self) -> int:
        """The newest."""
        return self.ledger.version

    @property
    def record(self) -> dict[str, Any]:
        """The figures of the round that ended with the newest entry."""
        return dict(self.ledger.read(self.version).record)

    def catch_up(self, since: int) -> RecordDict:
        """What leads from version ``since`` (-1: nothing) to the newest: entries, or the weights where those are
        smaller."""
        newest, schema = self.version, self.method.entry
        first = first_needed(since, newest, schema.span)
        names = [self.ledger.names(version) for version in range(first, newest + 1)]
        content, size = RecordDict(), 0
        for version, dropped in zip(range(first, newest + 1), superseded(names, schema), strict=True):
            entry = self.ledger.read(version).arrays
            arrays = {name: value for name, value in entry.items() if name not in dropped}
            content[f"entry-{version}"] = wire.pack(arrays)
            size += sum(value.nbytes for value in arrays.values())
            smaller = schema.span is None and version > first and size > self.method.weights_bytes
            if smaller and not self.masked:  # nodes compare entries there
                weights = self.weights()
                if weights is not None:
                    return RecordDict({f"weights-{newest}": wire.pack(weights)})
        return content

    def state(self) -> dict[str, np.ndarray]:
        """The arrays of role "state" at the newest version; where the server began without a model, those that the
        seed gives."""
        state: dict[str, np.ndarray] = {}
        names = self.method.entry.named("state")
        every = max((self.method.entry.fields[name].every for name in names), default=0)
        for version in self.ledger.versions()[-every:] if every else ():
            arrays = wire.decode(self.ledger.read(version).arrays)
            state |= {name: arrays[name] for name in names if name in arrays}
        if missing := self.method.entry.start.travelling.fields.keys() - state.keys():
            state |= {name: array for name, array in self.method.known_start().items() if name in missing}
        return self.method.entry.filled(state)

    def append(self, figures: dict[str, Any], arrays: dict[str, np.ndarray], start: Arrays) -> None:
        """Publish the next entry, of a round that began at ``start``. What the method keeps is on disk before: an entry
        never leads beyond it."""
        version, schema, config = figures["version"], self.method.entry, self.method.config
        own = {name: arrays.pop(name) for name in schema.named("server") if name in arrays}
        if own:
            self.kept.discard(version)  # of a round that was interrupted here and is done again
            self.kept.put(Entry(version, own))
            for older in self.kept.versions()[:-2]:
                self.kept.discard(older)
            self.method.kept = own
        for transform in reversed(self.transforms):
            arrays = transform.mean(arrays, start)
        stored = wire.encode(arrays, schema, stream(config.seed, "broadcast", figures["round"]))
        self.ledger.append(Entry(version, stored, figures))
        if self.masked:
            self.history.follow(version, stored)
        self.method.observe(version, schema.filled(wire.decode(stored)))
        self.method.replies = figures["clients"]
