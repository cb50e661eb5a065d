"""The round, the same for every method: who is asked, what is sent, which replies count, bytes, the next entry."""

import functools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from fedkrso_app.config import ConfigError
from fedkrso_app.core.projection import stream
from fedkrso_app.federation.aggregate import aggregate
from fedkrso_app.federation.nodes import UNKNOWN_HISTORY, Nodes, sampled
from fedkrso_app.federation.replica import first_needed
from fedkrso_app.federation.transforms import Differences, Transform
from fedkrso_app.records import protocol, wire
from fedkrso_app.records.ledger import Entry, Ledger
from fedkrso_app.records.protocol import EVALUATE, TALLY, TRAIN, UPDATE, Figures, Instructions, Status
from fedkrso_app.records.schema import Schema, differences, superseded
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Method

logger = logging.getLogger("flwr")


class Host(Protocol):
    """What the rounds need of the server that they run on."""

    tally_schema: Schema  # what a client says of an evaluation; such arrays are added up

    def report(self, figures: dict[str, Any]) -> None:
        """Take note of a round's figures; ``tally`` is the sum of its clients' evaluations, if there are any."""

    def weights(self) -> Arrays | None:
        """All shared tensors at the newest version (:attr:`Method.weights`); None where the server has no model."""

    def score(self, tally: np.ndarray) -> tuple[float, float]:
        """Metric and loss. Raises ValueError for a tally that cannot be."""


class Round(Strategy):
    """A Flower strategy: sample, send each node the entries it lacks, aggregate what fits, append one entry.

    Flower's ``start`` drives it. W itself is never an argument or a result of Flower's hooks: the ledger is the state,
    and whoever wants W (evaluation, export) replays it. ``kept`` holds the method's arrays of role "server"; the method
    has seen all entries that there are.
    """

    def __init__(
        self, method: Method, transforms: Sequence[Transform], ledger: Ledger, kept: Ledger, nodes: Nodes, host: Host
    ) -> None:
        self.method, self.transforms, self.ledger, self.kept = method, transforms, ledger, kept
        self.config, self.nodes, self.host = method.config, nodes, host
        self.first_round = 1 + int(ledger.read(ledger.version).record["round"])  # later than 1 in a resumed run
        self.span = method.entry.span
        method.replies = int(ledger.read(ledger.version).record["clients"])
        if ledger.version > 0 and method.entry.named("server"):
            method.kept = dict(kept.read(ledger.version).arrays)

    # What Flower's loop calls

    def summary(self) -> None:
        c, shapes = self.config, self.method.shapes
        logger.info(
            "%s on %s, model %s: %d target layers with %d weights, head of %d; %g %% of clients per round, %d steps",
            c.strategy, c.task, c.model, len(shapes.targets), shapes.weights,
            shapes.head, 100 * c.fraction_train, c.local_steps,
        )  # fmt: skip

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        self.round = self.first_round + server_round - 1
        self._started = time.monotonic()
        fraction, least = self.config.fraction_train, self.config.min_replies
        if server_round == 1:
            self.nodes.wait_for_all(grid)
            if (most := sampled(fraction, self.nodes.expected)) < least:
                raise ConfigError(
                    f"min-replies = {least} is out of reach: fraction-train = {fraction:g} of "
                    f"{self.nodes.expected} clients are {most} per round; lower it, or start more nodes."
                )
        else:
            self.nodes.welcome(grid, again=True)
            self.nodes.wait_online(grid, least)
        self._figures = no_figures()
        asked = self.nodes.sample(grid, fraction, self.config.seed, self.round)
        return self._ask(TRAIN, asked, self.round, self.method.instructions(self.round))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self._sums = aggregate(self.method)
        self._start = self._newest_state() if self.transforms or self.config.max_update_norm else {}
        accepted: dict[int, dict[str, float]] = {}  # partition id -> figures
        self._to_evaluate: dict[int, list[int]] = {}
        for node, partition, content, size in self._received(replies):
            with self._refusing(partition):
                accepted[partition] = {**self._accept(content, node, partition), "uplink_bytes": size}
                self._to_evaluate.setdefault(node, []).append(partition)
        self._close(accepted)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        return self._ask(EVALUATE, self._to_evaluate) if self.config.evaluate == "clients" else []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        tallies: dict[int, np.ndarray] = {}
        scores: dict[int, float] = {}
        for node, partition, content, size in self._received(replies):
            figures: dict[str, float] = {}
            with self._refusing(partition):
                version = self._check_version(content, node, partition)
                tally = wire.unpack(protocol.arrays(content, TALLY), self.host.tally_schema)["tally"]
                try:
                    figures = dict(zip(("metric", "eval_loss"), self.host.score(tally), strict=True))
                except ValueError as error:
                    raise Refused(f"tally: {error}") from None
                tallies[partition], scores[partition] = tally, figures["metric"]
                self.nodes.found(node, version, [partition])
            if self.config.client_metrics:
                own = self._figures["per_client"][str(partition)]
                own.update(figures, uplink_bytes=own["uplink_bytes"] + size)
        if tallies:
            self._figures["tally"] = sum(tallies[partition] for partition in sorted(tallies))
            own = np.array([scores[partition] for partition in sorted(scores)])
            self._figures["client_metric"] = {
                "mean": own.mean(), "sd": own.std(ddof=1) if len(own) > 1 else 0.0, "min": own.min(), "max": own.max()
            }  # fmt: skip
        self._figures["seconds"] = time.monotonic() - self._started
        self.host.report(self._figures)
        return None

    # What is sent

    def _ask(
        self,
        kind: str,
        asked: Mapping[int, Sequence[int]],
        round: int = 0,
        method: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[Message]:
        """A message for each node of ``asked`` (node id -> partition ids); those that lack the same entries share them.

        Bytes are those of messages to each partition by itself.
        """
        version = self.ledger.version
        stamp = self.ledger.stamp(version)

        @functools.cache
        def entries(since: int) -> RecordDict:
            return self.catch_up(max(since, -1))

        @functools.cache
        def content(since: int, partitions: tuple[int, ...] = ()) -> RecordDict:
            afresh = since == UNKNOWN_HISTORY
            told = Instructions(self.nodes.run, version, stamp, afresh, round, method, partitions)
            return RecordDict({**entries(since), kind: told.record()})

        messages = []
        for node, partitions in asked.items():
            alone = len(self.nodes.partitions[node]) == 1
            text = content(self.nodes.versions[node], () if alone else tuple(partitions))
            messages.append(Message(text, node, kind, group_id=str(self.round)))
        behind = [self.nodes.alone[node, partition] for node, partitions in asked.items() for partition in partitions]
        sizes = {since: wire.measured_bytes(content(since)) for since in dict.fromkeys(behind)}
        self._figures["downlink_bytes"] += sum(sizes[since] for since in behind)
        if missed := [since for since in behind if since < version - 1]:
            usual = wire.measured_bytes(content(version - 1))
            self._figures["catchup_bytes"] += sum(sizes[since] - usual for since in missed)
        self._asked = list(zip(messages, asked.items(), strict=True))
        self._training = kind == TRAIN
        return messages

    def catch_up(self, since: int) -> RecordDict:
        """What leads from version ``since`` (-1: nothing) to the newest: entries, or the weights where those are
        smaller."""
        newest, schema = self.ledger.version, self.method.entry
        first = first_needed(since, newest, self.span)
        names = [self.ledger.names(version) for version in range(first, newest + 1)]
        content, size = RecordDict(), 0
        for version, dropped in zip(range(first, newest + 1), superseded(names, schema), strict=True):
            entry = self.ledger.read(version).arrays
            arrays = {name: value for name, value in entry.items() if name not in dropped}
            content[f"entry-{version}"] = wire.pack(arrays)
            size += sum(value.nbytes for value in arrays.values())
            if self.span is None and version > first and size > self.method.weights_bytes:
                weights = self.host.weights()
                if weights is not None:
                    return RecordDict({f"weights-{newest}": wire.pack(weights)})
        return content

    def _newest_state(self) -> dict[str, np.ndarray]:
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

    # What comes back

    def _received(self, replies: Iterable[Message]) -> Iterator[tuple[int, int, RecordDict, int]]:
        """The replies that are no errors, partition by partition: node, partition, content, its bytes. Errors and
        silence are logged and counted."""
        waiting: dict[str, tuple[int, Sequence[int]]] = {}
        told = False
        for reply in replies:
            # Messages have their ids only now: the grid sends them when the first reply is asked for.
            if not told:
                waiting, told = {message.metadata.message_id: asked for message, asked in self._asked}, True
            node, partitions = waiting.pop(reply.metadata.reply_to_message_id, (0, ()))
            if not partitions:
                logger.warning("a reply that nobody is waiting for was dropped")
            elif reply.has_error():
                reason = f"{reply.error.reason or 'no reason given'} (code {reply.error.code})"
                for partition in partitions:
                    self._without(partition, "failed", f"failed: {reason.strip()}")
            else:
                for partition, content in protocol.apart(reply.content, partitions):
                    if reason_given := protocol.reason_of_failure(content):
                        self._without(partition, "failed", f"failed: {reason_given}")
                        continue
                    size = wire.measured_bytes(content)
                    self._figures["uplink_bytes"] += size
                    yield node, partition, content, size
        silent = waiting.values() if told else [asked for _, asked in self._asked]
        for partition in [partition for _, partitions in silent for partition in partitions]:
            self._without(partition, "failed", f"sent no reply within {self.config.round_timeout:g} s")
        self._asked = []

    def _without(self, partition: int, counter: str, reason: str) -> None:
        """Log why a reply does not count; in training it is counted, as ``refused`` or ``failed``."""
        logger.warning("partition %s %s", partition, reason)
        if self._training:
            self._figures[counter] += 1

    @contextmanager
    def _refusing(self, partition: int) -> Iterator[None]:
        try:
            yield
        except Refused as reason:
            self._without(partition, "refused", f"refused: {reason}")

    def _check_version(self, content: RecordDict, node: int, partition: int) -> int:
        """The version that a reply was made at, if it is the newest; else :class:`Refused`."""
        status = Status.read(content, self.ledger.version)
        if status.need_sync:
            self.nodes.found(node, status.version, [partition])
            raise Refused(f"is at version {status.version} and asks to be brought up to date")
        if status.version != self.ledger.version:
            raise Refused(f"is at version {status.version}, expected {self.ledger.version}")
        return status.version

    def _accept(self, content: RecordDict, node: int, partition: int) -> dict[str, float]:
        """Check one reply and add it to the sums; returns its figures."""
        version = self._check_version(content, node, partition)
        update, figures = protocol.arrays(content, UPDATE), Figures.read(content)
        schema = self.method.reply_of(partition)
        arrays = schema.filled(wire.decode(wire.unpack(update, schema.travelling)))
        self.method.check(arrays, self.round)
        if self.config.max_update_norm:
            norm = self._norm(arrays)
            if norm > self.config.max_update_norm:
                raise Refused(
                    f"its update has norm {norm:.4g}, above max-update-norm = {self.config.max_update_norm:g}"
                )
        for transform in reversed(self.transforms):
            arrays = dict(transform.reply(arrays, self._start))
        weight = figures.num_examples if self.config.weighting == "examples" else 1
        try:
            self._sums.add(self.method.summands(arrays), arrays, weight, partition)
        except OverflowError as error:
            hint = "; set weighting = 'uniform'" if weight > 1 else ""
            raise Refused(f"{error}{hint}") from None
        self.nodes.found(node, version, [partition])
        return {**vars(figures), "weight": weight}

    def _norm(self, arrays: Arrays) -> float:
        """L2 norm of what a reply would move: its updates, and the differences of its states to the newest ones."""
        schema, moved = self.method.reply.only(arrays), arrays
        if not any(isinstance(transform, Differences) for transform in self.transforms):
            # A server that began without a model knows no states in round 1.
            known = [name for name in arrays if name not in schema.named("state") or name in self._start]
            moved = differences({name: arrays[name] for name in known}, self._start, schema)
        floats = [value for value in moved.values() if value.dtype == np.float32]
        return math.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in floats))

    def _close(self, accepted: dict[int, dict[str, float]]) -> None:
        """Publish the next entry if enough replies count."""
        total = int(sum(figures["weight"] for figures in accepted.values()))
        loss = sum(accepted[partition]["train_loss"] * accepted[partition]["weight"] for partition in sorted(accepted))
        figures = self._figures | {
            "round": self.round,
            "train_loss": loss / total if total else None,
            "clients": len(accepted),
            "client_seconds": max((f["train_seconds"] for f in accepted.values()), default=0.0),
            "client_peak_bytes": max((f["peak_bytes"] for f in accepted.values()), default=0),
            "partitions": sorted(accepted),
            "version": self.ledger.version,
        }
        if self.config.client_metrics:
            shown = {p: {key: value for key, value in f.items() if key != "weight"} for p, f in accepted.items()}
            figures["per_client"] = {str(partition): shown[partition] for partition in sorted(shown)}
        figures["paper_bytes"] = self.method.paper_bytes() * (len(accepted) + figures["refused"] + figures["failed"])
        problem, arrays = f"{len(accepted)} good replies, min-replies = {self.config.min_replies}", {}
        if len(accepted) >= self.config.min_replies:
            arrays = self.method.conclude(self._sums, self.round)
            bad = [name for name, values in arrays.items() if not np.isfinite(values).all()]
            problem = f"the average of {bad[0]} is not finite" if bad else ""
        figures["seconds"] = time.monotonic() - self._started
        if problem:
            logger.warning("%s: nothing is published, the version stays %d", problem, self.ledger.version)
            self._to_evaluate = {}
        else:
            figures["version"] += 1
            self._publish(figures, arrays)
        self._figures = figures

    def _publish(self, figures: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Append the next entry. What the method keeps is on disk before: an entry never leads beyond it."""
        version, schema = figures["version"], self.method.entry
        own = {name: arrays.pop(name) for name in schema.named("server") if name in arrays}
        if own:
            self.kept.discard(version)  # of a round that was interrupted here and is done again
            self.kept.put(Entry(version, own))
            for older in self.kept.versions()[:-2]:
                self.kept.discard(older)
            self.method.kept = own
        for transform in reversed(self.transforms):
            arrays = transform.mean(arrays, self._start)
        stored = wire.encode(arrays, schema, stream(self.config.seed, "broadcast", self.round))
        self.ledger.append(Entry(version, stored, figures))
        self.method.observe(version, schema.filled(wire.decode(stored)))
        self.method.replies = figures["clients"]


def no_figures() -> dict[str, Any]:
    """What a round is described by, before there was any."""
    counts = ("uplink_bytes", "downlink_bytes", "catchup_bytes", "paper_bytes", "clients", "refused", "failed")
    return {"round": 0, "version": 0, "train_loss": None, **dict.fromkeys(counts, 0), "partitions": [], "seconds": 0.0}
