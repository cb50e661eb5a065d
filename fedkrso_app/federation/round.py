"""The round, the same for every method: who is asked, what is sent, which replies count, bytes, the next entry."""

import functools
import logging
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
from fedkrso_app.federation import budget, masked, masks, released
from fedkrso_app.federation.aggregate import Aggregate, Unopened
from fedkrso_app.federation.nodes import UNKNOWN_HISTORY, Nodes, sampled
from fedkrso_app.federation.replica import first_needed
from fedkrso_app.federation.spending import Spending
from fedkrso_app.federation.transforms import Transform
from fedkrso_app.records import protocol, wire
from fedkrso_app.records.history import History
from fedkrso_app.records.ledger import Entry, Ledger
from fedkrso_app.records.protocol import EVALUATE, TALLY, TRAIN, Instructions, Status
from fedkrso_app.records.schema import Schema, superseded
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Method
from fedkrso_app.strategies.privacy import Privacy

logger = logging.getLogger("flwr")


class Host(Protocol):
    """What the rounds need of the server that they run on."""

    tally_schema: Schema  # what a client says of an evaluation; such arrays are added up
    spending: Spending  # what the run has spent, where each client is protected

    def report(self, figures: dict[str, Any]) -> None:
        """Take note of a round's figures; ``tally`` is the sum of its clients' evaluations, if there are any."""

    def opening(self, round: int, partitions: list[int]) -> None:
        """Put down, to stay, that the sum of these partitions is about to be opened."""

    def opened(self) -> int:
        """The last round whose sum was, or may have been, opened; 0 if none was."""

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
        unit = self.config.of(Privacy).unit
        self._by_example, self._by_client = unit == "example", unit == "client"
        self._figures, self._spent = no_figures(), 0  # clients that declined by the run's bound on ε
        done = int(ledger.read(ledger.version).record["round"])
        self.first_round = 1 + done  # later than 1 in a resumed run
        if (opened := host.opened() if self.config.secure_aggregation else 0) > done:
            logger.warning(
                "Round %d was opened and has no entry: it is not done again, and the model will differ from that of a "
                "run without an interruption",
                opened,
            )
            self.first_round = 1 + opened
        self.span = method.entry.span
        self._history = History(method.entry.travelling)
        for version in ledger.versions() if self.config.secure_aggregation else ():
            self._history.follow(version, ledger.read(version).arrays)
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
            if self.config.secure_aggregation:
                masked.check_federation(self.nodes, self.config)
            if self._by_client:
                released.check_federation(self.nodes, self.method)
        else:
            self.nodes.welcome(grid, again=True)
            self.nodes.wait_online(grid, least)
        if self._spent and self._spent == self.nodes.expected and not self._figures["clients"]:
            raise released.Spent("privacy.max-epsilon would be exceeded for each client")
        self._figures, self._grid, self._spent = no_figures(), grid, 0
        asked = self.nodes.sample(grid, fraction, self.config.seed, self.round)
        try:
            self.begin(asked)
        except Unopened as reason:
            logger.warning("nobody is asked: %s", reason)
            asked = {}
        return self._ask(TRAIN, asked, self.round, self.method.instructions(self.round))

    def begin(self, asked: Mapping[int, Sequence[int]]) -> None:
        """Make the sums of the round that asks these nodes (id -> partitions). Raises :class:`Unopened`, and
        :class:`released.Spent` where the round must not be."""
        start = self._newest_state() if self.transforms or self.config.max_update_norm else {}
        given = self.method.instructions(self.round)
        self._sums = Aggregate(self.method, self.round, self.transforms, start)
        if self._by_client:
            spending, held = self.host.spending, self.nodes.partitions
            pay = functools.partial(spending.write, released.release_of(self.round, self.config, asked, held, spending))
            self._sums = released.Released(self.method, self.round, start, given, asked, pay)
        if self.config.secure_aggregation:
            version = self.ledger.version
            told = Instructions(self.nodes.run, version, self.ledger.stamp(version), round=self.round, method=given)
            roster = masked.roster_of(asked, self.nodes, self.config)
            story = masks.story_of(told, self._history.digest, self.nodes.model, self.config)

            def note(partitions: list[int]) -> None:
                if self._by_client:
                    pay()
                self.host.opening(self.round, partitions)

            self._sums = masked.Masked(self.method, self.round, self.transforms, start, roster, story, note, self.nodes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        accepted: dict[int, dict[str, float]] = {}  # partition id -> figures
        self._to_evaluate: dict[int, list[int]] = {}
        for node, partitions, content, size in self._received(replies):
            with self._refusing(partitions):
                version = self._check_version(content, node, partitions)
                figures = self._sums.accept(content, node, partitions)
                self.nodes.found(node, version, partitions)
                accepted |= {partition: {**each, "uplink_bytes": size} for partition, each in figures.items()}
                self._to_evaluate.setdefault(node, []).extend(partitions)
        self._close(accepted)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        return self._ask(EVALUATE, self._to_evaluate) if self.config.evaluate == "clients" else []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        tallies: dict[int, np.ndarray] = {}
        scores: dict[int, float] = {}
        for node, (partition,), content, size in self._received(replies):
            figures: dict[str, float] = {}
            with self._refusing([partition]):
                version = self._check_version(content, node, [partition])
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
            more = self._sums.records if kind == TRAIN else {}
            return RecordDict({**entries(since), kind: told.record(), **more})

        messages = []
        for node, partitions in asked.items():
            alone = len(self.nodes.partitions[node]) == 1
            text = content(self.nodes.versions[node], () if alone else tuple(partitions))
            messages.append(Message(text, node, kind, group_id=str(self.round)))
        behind = [self.nodes.alone[node, partition] for node, partitions in asked.items() for partition in partitions]
        if self.config.secure_aggregation:  # where a node is one
            behind = [self.nodes.versions[node] for node in asked]
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
            smaller = self.span is None and version > first and size > self.method.weights_bytes
            if smaller and not self.config.secure_aggregation:  # nodes compare entries there
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

    def _received(self, replies: Iterable[Message]) -> Iterator[tuple[int, Sequence[int], RecordDict, int]]:
        """The replies that are no errors, partition by partition unless they are under masks: node, partitions,
        content, its bytes. Errors and silence are logged and counted."""
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
                self._without(partitions, "failed", f"failed: {reason.strip()}")
            else:
                for some, content in self._sums.apart(reply.content, partitions):
                    if reason_given := protocol.reason_of_failure(content):
                        self._without(some, "failed", f"failed: {reason_given}")
                        continue
                    size = wire.measured_bytes(content)
                    self._figures["uplink_bytes"] += size
                    yield node, some, content, size
        silent = waiting.values() if told else [asked for _, asked in self._asked]
        for _, partitions in silent:
            self._without(partitions, "failed", f"sent no reply within {self.config.round_timeout:g} s")
        self._asked = []

    def _without(self, partitions: Sequence[int], counter: str, reason: str) -> None:
        """Log why a reply does not count; in training it is counted, as ``refused`` or ``failed``."""
        self._spent += len(partitions) * (budget.OF_THE_RUN in reason)
        for partition in partitions:
            logger.warning("partition %s %s", partition, reason)
            if self._training:
                self._figures[counter] += 1

    @contextmanager
    def _refusing(self, partitions: Sequence[int]) -> Iterator[None]:
        try:
            yield
        except Refused as reason:
            self._without(partitions, "refused", f"refused: {reason}")

    def _check_version(self, content: RecordDict, node: int, partitions: Sequence[int]) -> int:
        """The version that a reply was made at, if it is the newest; else :class:`Refused`."""
        status = Status.read(content, self.ledger.version)
        if status.key:
            self.nodes.keys[node] = status.key, status.signature
            raise Refused("has lost its key for masks and made a new one: it takes part in the next round")
        if status.need_sync:
            self.nodes.found(node, status.version, partitions)
            raise Refused(f"is at version {status.version} and asks to be brought up to date")
        if status.version != self.ledger.version:
            raise Refused(f"is at version {status.version}, expected {self.ledger.version}")
        return status.version

    def _close(self, accepted: dict[int, dict[str, float]]) -> None:
        """Publish the next entry if enough replies count."""
        self._figures["clients"] = len(accepted)
        problem, arrays = f"{len(accepted)} good replies, min-replies = {self.config.min_replies}", {}
        if len(accepted) >= self.config.min_replies:
            try:
                self._sums.open(self._grid, self._figures)
                problem = ""
            except Unopened as reason:
                problem = str(reason)
        figures = self._figures | {
            "round": self.round,
            "train_loss": self._sums.loss,
            "client_seconds": max((f["train_seconds"] for f in accepted.values()), default=0.0),
            "client_peak_bytes": max((f["peak_bytes"] for f in accepted.values()), default=0),
            "partitions": sorted(accepted),
            "version": self.ledger.version,
        }
        if self._by_example:
            newest = self.ledger.read(self.ledger.version).record.get("epsilon", 0.0)
            figures["epsilon"] = max([newest, *(figures["epsilon"] for figures in accepted.values())])
        if self._by_client:
            figures["epsilon"] = self.host.spending.epsilon()
        if self.config.client_metrics:
            shown = {p: {key: value for key, value in f.items() if key != "weight"} for p, f in accepted.items()}
            figures["per_client"] = {str(partition): shown[partition] for partition in sorted(shown)}
        figures["paper_bytes"] = self.method.paper_bytes() * (len(accepted) + figures["refused"] + figures["failed"])
        if not problem:
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
            arrays = transform.mean(arrays, self._sums.start)
        stored = wire.encode(arrays, schema, stream(self.config.seed, "broadcast", self.round))
        self.ledger.append(Entry(version, stored, figures))
        if self.config.secure_aggregation:
            self._history.follow(version, stored)
        self.method.observe(version, schema.filled(wire.decode(stored)))
        self.method.replies = figures["clients"]


def no_figures() -> dict[str, Any]:
    """What a round is described by, before there was any."""
    counts = ("uplink_bytes", "downlink_bytes", "catchup_bytes", "paper_bytes", "clients", "refused", "failed")
    return {"round": 0, "version": 0, "train_loss": None, **dict.fromkeys(counts, 0), "partitions": [], "seconds": 0.0}
