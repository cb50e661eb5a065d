"""The round, the same for every method: who is asked, what is sent, which replies count, bytes, the next entry."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.federation.nodes import AFRESH, Nodes, sampled
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Entry, Ledger, LedgerError
from fedkrso_app.records.wire import Refused, Schema
from fedkrso_app.strategies.base import Arrays, ServerMethod, Shapes

logger = logging.getLogger("flwr")


class FedTune(ServerMethod, Strategy):
    """A round: sample, send each node the ledger entries it lacks, average what fits, append one entry.

    Flower's ``start`` drives it. W itself is never an argument or a result of Flower's hooks: the ledger is the state,
    and whoever wants W (evaluation, export) replays it. ``report`` is called with each round's figures. ``run_id`` (16
    hex digits) is that of the run's folder, whichever Flower run goes on with it. ``weights``, where the server has a
    model, gives all trained tensors at the newest version as one vector. ``tally_size`` is the length of what a client
    says of an evaluation, and ``check_tally`` raises ValueError for one that cannot be; such vectors are added up, and
    reported with the round as ``tally``.
    """

    def __init__(
        self,
        config: Config,
        shapes: Shapes,
        ledger: Ledger,
        model_digest: str,
        run_id: str,
        report: Callable[[dict[str, Any]], None] = lambda figures: None,
        weights: Callable[[], np.ndarray] | None = None,
        tally_size: int = 0,
        check_tally: Callable[[np.ndarray], None] = lambda tally: None,
    ) -> None:
        self.config, self.shapes, self.ledger, self.report, self.weights = config, shapes, ledger, report, weights
        self.tally_schema, self.check_tally = Schema({"tally": ("float64", (tally_size,))}), check_tally
        self.run_id = run_id
        self.first_round = 1 + int(ledger.read(ledger.version).record["round"])  # later than 1 in a resumed run
        self.nodes = Nodes(model_digest, run_id, config.round_timeout, self._holds)

    # What Flower's loop calls

    def summary(self) -> None:
        c = self.config
        logger.info(
            "%s on %s, model %s: %d target layers with %d weights, head of %d; %g of the nodes a round, %d steps each",
            c.strategy, c.task, c.model, len(self.shapes.targets), sum(m * n for m, n in self.shapes.targets.values()),
            self.shapes.head, c.fraction_train, c.local_steps,
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
                    f"{self.nodes.expected} nodes are {most} a round; lower it, or start more nodes."
                )
        else:
            self.nodes.welcome(grid, again=True)
            self.nodes.wait_online(grid, least)
        self._figures = no_figures()
        nodes = self.nodes.sample(grid, fraction, self.config.seed, self.round)
        return self._ask("train", nodes, {"round": self.round, **self.instructions(self.round)})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.begin()
        answered: dict[int, dict[str, float]] = {}  # partition id -> figures
        self._to_evaluate = []
        self._newest = self.ledger.read(self.ledger.version).arrays if self.config.max_update_norm else {}
        for node, content, size in self._heard(replies):
            with self._refusing(node):
                answered[self.nodes.partitions[node]] = {**self._accept(content, node), "uplink-bytes": size}
                self._to_evaluate.append(node)
        self._close(answered)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        return self._ask("evaluate", self._to_evaluate, {}) if self.config.evaluate == "clients" else []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        tallies: dict[int, np.ndarray] = {}
        for node, content, size in self._heard(replies):
            if self.config.client_metrics:
                self._figures["per_client"][str(self.nodes.partitions[node])]["uplink_bytes"] += size
            with self._refusing(node):
                version, tally = self._check_version(content, node), content.get("tally")
                if not isinstance(tally, ArrayRecord):
                    raise Refused("record 'tally' is missing")
                sums = wire.unpack(tally, self.tally_schema)["tally"]
                try:
                    self.check_tally(sums)
                except ValueError as error:
                    raise Refused(f"tally: {error}") from None
                tallies[self.nodes.partitions[node]] = sums
                self.nodes.versions[node] = version
        if tallies:
            self._figures["tally"] = sum(tallies[partition] for partition in sorted(tallies))
        self._figures["seconds"] = time.monotonic() - self._started
        self.report(self._figures)
        return None

    # The parts of a round

    def _ask(self, kind: str, nodes: list[int], instructions: dict[str, Any]) -> list[Message]:
        """A message for each node; those that lack the same entries share one record."""
        content: dict[int, RecordDict] = {}
        messages = []
        for node in nodes:
            since = self.nodes.versions[node]
            if since not in content:
                content[since] = self.message_content(since, kind, instructions)
            messages.append(Message(content[since], node, kind, group_id=str(self.round)))
        sizes = {since: wire.measured_bytes(record) for since, record in content.items()}
        behind = [self.nodes.versions[node] for node in nodes]
        self._figures["downlink_bytes"] += sum(sizes[since] for since in behind)
        if missed := [since for since in behind if since < self.ledger.version - 1]:
            usual = wire.measured_bytes(self.message_content(self.ledger.version - 1, kind, instructions))
            self._figures["catchup_bytes"] += sum(sizes[since] - usual for since in missed)
        self._asked, self._training = list(zip(messages, nodes, strict=True)), kind == "train"
        return messages

    def _heard(self, replies: Iterable[Message]) -> Iterator[tuple[int, RecordDict, int]]:
        """The replies that are no errors: node, content, its bytes. Who failed or is silent is logged and counted."""
        heard: set[int] = set()
        nodes: dict[str, int] = {}
        for reply in replies:
            # Messages have their ids only now: the grid sends them when the first reply is asked for.
            nodes = nodes or {message.metadata.message_id: node for message, node in self._asked}
            node = nodes.get(reply.metadata.reply_to_message_id)
            if node is None or node in heard:
                logger.warning("a reply that nobody is waiting for was dropped")
                continue
            heard.add(node)
            if reply.has_error():
                reason = f"{reply.error.reason or 'no reason given'} (code {reply.error.code})"
                self._lost(node, "failed", f"failed: {reason.strip()}")
                continue
            size = wire.measured_bytes(reply.content)
            self._figures["uplink_bytes"] += size
            yield node, reply.content, size
        for _, node in self._asked:
            if node not in heard:
                self._lost(node, "failed", f"sent no reply within {self.config.round_timeout:g} s")
        self._asked = []

    def _lost(self, node: int, how: str, what: str) -> None:
        """Log what became of a reply; one to training is counted too, as ``how``."""
        logger.warning("partition %s %s", self.nodes.partitions[node], what)
        if self._training:
            self._figures[how] += 1

    @contextmanager
    def _refusing(self, node: int) -> Iterator[None]:
        try:
            yield
        except Refused as reason:
            self._lost(node, "refused", f"refused: {reason}")

    def message_content(self, since: int, kind: str, instructions: Mapping[str, Any]) -> RecordDict:
        """What a node at version ``since`` (-1: nothing) gets: the way to the newest version, and instructions."""
        content, version = self.way(max(since, -1)), self.ledger.version
        model: dict[str, Any] = {"run": self.run_id, "version": version, "stamp": self.ledger.stamp(version)}
        content[kind] = ConfigRecord({**model, **instructions, "afresh": since == AFRESH})
        return content

    def way(self, since: int) -> RecordDict:
        """The entries after ``since``, or the weights that they lead to where those are smaller."""
        newest = self.ledger.version
        first = since + 1 if self.incremental else max(since + 1, newest)
        content, size = RecordDict(), 0
        several = first < newest
        absolute = ("head", "head.scales") if several and "head" in self.ledger.read(newest).arrays else ()
        for version in range(first, newest + 1):
            arrays = dict(self.ledger.read(version).arrays)
            for name in absolute if version < newest else ():
                arrays.pop(name, None)  # only the newest counts
            content[f"entry-{version}"] = wire.pack(arrays)
            size += sum(value.nbytes for value in arrays.values())
            if self.weights and version > first and size > 4 * self.weights_size(self.config, self.shapes):
                return RecordDict({f"weights-{newest}": wire.pack({"weights": self.weights()})})
        return content

    def _holds(self, version: int, stamp: str) -> bool:
        """Whether a node that says it is at ``version`` has been there by this ledger's entries."""
        try:
            return version >= 0 and self.ledger.stamp(version) == stamp
        except LedgerError:
            return False

    def _accept(self, content: RecordDict, node: int) -> dict[str, float]:
        """Check one reply and fold it into the sums; returns its figures."""
        version = self._check_version(content, node)
        update, metrics = content.get("update"), content.get("metrics")
        if not isinstance(update, ArrayRecord) or not isinstance(metrics, MetricRecord):
            raise Refused("record 'update' or 'metrics' is missing")
        figures = {
            "num-examples": wire.number(metrics, "num-examples", int, 1, 2**31),
            "train-loss": wire.number(metrics, "train-loss", float, -1e30, 1e30),
            "train-seconds": wire.number(metrics, "train-seconds", float, 0, 1e9),
            "peak-bytes": wire.number(metrics, "peak-bytes", int, 0, 2**62),
        }
        arrays = wire.decode(wire.unpack(update, self.reply_schema(self.config, self.shapes)))
        self.check(arrays)
        if self.config.max_update_norm:
            norm = self._norm(arrays, self._newest)
            if norm > self.config.max_update_norm:
                raise Refused(
                    f"its update has norm {norm:.4g}, above max-update-norm = {self.config.max_update_norm:g}"
                )
        weight = figures["num-examples"] if self.config.weighting == "examples" else 1
        try:
            self.absorb(arrays, weight, self.nodes.partitions[node])  # type: ignore[arg-type]
        except OverflowError as error:
            hint = "; set weighting = 'uniform'" if weight > 1 else ""
            raise Refused(f"{error}{hint}") from None
        self.nodes.versions[node] = version
        return {**figures, "weight": weight}

    def _check_version(self, content: RecordDict, node: int) -> int:
        """The version that a reply was made at, if it is the newest; else :class:`Refused`."""
        status = content.get("status")
        if not isinstance(status, ConfigRecord):
            raise Refused("record 'status' is missing")
        version = wire.number(status, "version", int, -1, self.ledger.version)
        if status.get("need-sync"):
            self.nodes.versions[node] = version
            raise Refused(f"is at version {version} and asks to be brought up to date")
        if version != self.ledger.version:
            raise Refused(f"is at version {version}, expected {self.ledger.version}")
        return version

    def _norm(self, arrays: Arrays, newest: Arrays) -> float:
        """L2 norm of what a reply would move: of the difference to the newest entry where values are absolute."""
        differences = self.absolute if self.config.wire_dtype == "float32" else ()  # quantised, they come as such
        moved = [
            value - newest[name] if name in differences else value
            for name, value in arrays.items()
            # Of a server without a model the newest entry may be the empty one of version 0.
            if value.dtype == np.float32 and (name in newest or name not in differences)
        ]
        return math.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in moved))

    def _close(self, answered: dict[int, dict[str, float]]) -> None:
        """Publish the average if enough replies count."""
        total = int(sum(figures["weight"] for figures in answered.values()))
        loss = sum(answered[partition]["train-loss"] * answered[partition]["weight"] for partition in sorted(answered))
        figures = self._figures | {
            "round": self.round,
            "train_loss": loss / total if total else None,
            "clients": len(answered),
            "client_seconds": max((f["train-seconds"] for f in answered.values()), default=0.0),
            "client_peak_bytes": max((f["peak-bytes"] for f in answered.values()), default=0),
            "partitions": sorted(answered),
            "version": self.ledger.version,
        }
        if self.config.client_metrics:
            figures["per_client"] = {str(partition): _told(answered[partition]) for partition in sorted(answered)}
        figures["paper_bytes"] = self.paper_bytes() * (len(answered) + figures["refused"] + figures["failed"])
        problem = f"{len(answered)} good replies, min-replies = {self.config.min_replies}"
        if len(answered) >= self.config.min_replies:
            arrays = self.average(total)
            bad = [name for name, values in arrays.items() if not np.isfinite(values).all()]
            problem = f"the average of {bad[0]} is not finite" if bad else ""
        figures["seconds"] = time.monotonic() - self._started
        if problem:
            logger.warning("%s: nothing is published, the version stays %d", problem, self.ledger.version)
            self._to_evaluate = []
        else:
            figures["version"] += 1
            self.ledger.append(Entry(figures["version"], self.next_entry(arrays), figures))
        self._figures = figures


def _told(client: Mapping[str, float]) -> dict[str, float]:
    """A client's figures as a line of metrics.jsonl has them."""
    return {key.replace("-", "_"): value for key, value in client.items() if key != "weight"}


def no_figures() -> dict[str, Any]:
    """What a round is described by, before there was any."""
    counts = ("uplink_bytes", "downlink_bytes", "catchup_bytes", "paper_bytes", "clients", "refused", "failed")
    return {"round": 0, "version": 0, "train_loss": None, **dict.fromkeys(counts, 0), "partitions": [], "seconds": 0.0}
