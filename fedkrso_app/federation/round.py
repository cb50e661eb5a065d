"""The round, the same for every method: who is asked, what is sent, which replies count, bytes, the next entry."""

import functools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedkrso_app.config import ConfigError
from fedkrso_app.federation import masked, masks, released
from fedkrso_app.federation.aggregate import Aggregate, Unopened
from fedkrso_app.federation.exchange import Exchange
from fedkrso_app.federation.nodes import Nodes, sampled
from fedkrso_app.federation.published import Published
from fedkrso_app.federation.spending import Spending
from fedkrso_app.federation.tallies import MaskedTallies, Tallies
from fedkrso_app.records.protocol import EVALUATE, TRAIN, Instructions
from fedkrso_app.records.schema import Schema
from fedkrso_app.strategies.privacy import Privacy

logger = logging.getLogger("flwr")


class Host(Protocol):
    """What the rounds need of the server that they run on."""

    tally_schema: Schema  # what a client says of an evaluation; such arrays are added up
    spending: Spending  # what the run has spent, where each client is protected

    def report(self, figures: dict[str, Any]) -> None:
        """Take note of a round's figures; ``tally`` is the sum of its clients' evaluations, if there are any."""

    def opening(self, round: int, kind: str, partitions: list[int]) -> None:
        """Put down, to stay, that the sum of these partitions is about to be opened, of updates or of tallies."""

    def opened(self) -> int:
        """The last round whose sum was, or may have been, opened; 0 if none was."""

    def score(self, tally: np.ndarray) -> tuple[float, float]:
        """Metric and loss. Raises ValueError for a tally that cannot be."""


class Round(Strategy):
    """A Flower strategy: sample, send each node the entries it lacks, aggregate what fits, append one entry.

    Flower's ``start`` drives it. W itself is never an argument or a result of Flower's hooks: the ledger is the state,
    and whoever wants W (evaluation, export) replays it.
    """

    def __init__(self, published: Published, nodes: Nodes, host: Host) -> None:
        self.published, self.nodes, self.host = published, nodes, host
        self.method, self.transforms, self.config = published.method, published.transforms, published.method.config
        unit = self.config.of(Privacy).unit
        self._by_example, self._by_client = unit == "example", unit == "client"
        done = int(self.published.record["round"])
        self._exchange = Exchange(done, self.published, nodes, self.config)
        self.first_round = 1 + done  # later than 1 in a resumed run
        if (opened := host.opened() if self.config.secure_aggregation else 0) > done:
            logger.warning(
                "Round %d was opened and has no entry: it is not done again, and the model will differ from that of a "
                "run without an interruption",
                opened,
            )
            self.first_round = 1 + opened

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
        if self._exchange.spent == self.nodes.expected and not self._exchange.figures["clients"]:
            raise released.Spent("privacy.max-epsilon would be exceeded for each client")
        self._exchange, self._grid = Exchange(self.round, self.published, self.nodes, self.config), grid
        asked = self.nodes.sample(grid, fraction, self.config.seed, self.round)
        try:
            self.begin(asked)
        except Unopened as reason:
            logger.warning("nobody is asked: %s", reason)
            asked = {}
        return self._exchange.ask(TRAIN, asked, self.method.instructions(self.round), self._sums.records)

    def begin(self, asked: Mapping[int, Sequence[int]]) -> None:
        """Make the sums of the round that asks these nodes (id -> partitions). Raises :class:`Unopened`, and
        :class:`released.Spent` where the round must not be."""
        start = self.published.state() if self.transforms or self.config.max_update_norm else {}
        given = self.method.instructions(self.round)
        self._sums = Aggregate(self.method, self.round, self.transforms, start)
        if self._by_client:
            spending, held = self.host.spending, self.nodes.partitions
            pay = functools.partial(spending.write, released.release_of(self.round, self.config, asked, held, spending))
            self._sums = released.Released(self.method, self.round, start, given, asked, pay)
        if self.config.secure_aggregation:
            roster, story = masked.roster_of(asked, self.nodes, self.config), self._story(given)

            def note(partitions: list[int]) -> None:
                if self._by_client:
                    pay()
                self.host.opening(self.round, TRAIN, partitions)

            self._sums = masked.Masked(self.method, self.round, self.transforms, start, roster, story, note, self.nodes)

    def _story(self, given: Mapping[str, Any]) -> str:
        """What all nodes are told, with what the method has ``given`` them."""
        version = self.published.version
        told = Instructions(self.nodes.run, version, self.published.ledger.stamp(version), method=given)
        return masks.story_of(told, self.published.history.digest, self.nodes.model, self.config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        accepted: dict[int, dict[str, float]] = {}  # partition id -> figures
        self._to_evaluate: dict[int, list[int]] = {}
        for node, partitions, content, size in self._exchange.received(replies, self._sums):
            with self._exchange.refusing(partitions):
                version = self._exchange.check_version(content, node, partitions)
                figures = self._sums.accept(content, node, partitions)
                self.nodes.found(node, version, partitions)
                accepted |= {partition: {**each, "uplink_bytes": size} for partition, each in figures.items()}
                self._to_evaluate.setdefault(node, []).extend(partitions)
        self._close(accepted)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any
    ) -> Iterable[Message]:
        if self.config.evaluate != "clients":
            return []
        asked = self._to_evaluate
        try:
            self._tallies = self._of_tallies(asked)
        except Unopened as reason:
            logger.warning("nobody judges the model: %s", reason)
            asked = self._to_evaluate = {}
        return self._exchange.ask(EVALUATE, asked, more=self._tallies.records)

    def _of_tallies(self, asked: Mapping[int, Sequence[int]]) -> Tallies:
        """The sums of an evaluation that asks these nodes (id -> partitions). Raises :class:`Unopened`."""
        self._tallies = Tallies(self.host.tally_schema, self.host.score)
        if not (asked and self.config.secure_aggregation):
            return self._tallies
        roster = masked.roster_of(asked, self.nodes, self.config)
        story = self._story({})
        note = functools.partial(self.host.opening, self.round, EVALUATE)
        return MaskedTallies(self._tallies, roster, self.published.version, story, self.nodes, self.config, note)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        for node, partitions, content, size in self._exchange.received(replies, self._sums):
            figures: dict[str, float] = {}
            with self._exchange.refusing(partitions):
                version = self._exchange.check_version(content, node, partitions)
                figures = self._tallies.accept(content, node, partitions)
                self.nodes.found(node, version, partitions)
            if self.config.client_metrics:
                own = self._exchange.figures["per_client"][str(partitions[0])]
                own.update(figures, uplink_bytes=own["uplink_bytes"] + size)
        if self.config.evaluate == "clients" and self._to_evaluate:
            try:
                self._tallies.close(self._grid, self.round, self._exchange.figures)
            except Unopened as reason:
                logger.warning("The model is not judged in round %d: %s", self.round, reason)
        self._exchange.figures["seconds"] = time.monotonic() - self._started
        self.host.report(self._exchange.figures)
        return None

    def _close(self, accepted: dict[int, dict[str, float]]) -> None:
        """Publish the next entry if enough replies count."""
        self._exchange.figures["clients"] = len(accepted)
        problem, arrays = f"{len(accepted)} good replies, min-replies = {self.config.min_replies}", {}
        if len(accepted) >= self.config.min_replies:
            try:
                self._sums.open(self._grid, self._exchange.figures)
                problem = ""
            except Unopened as reason:
                problem = str(reason)
        figures = self._exchange.figures | {
            "round": self.round,
            "train_loss": self._sums.loss,
            "client_seconds": max((f["train_seconds"] for f in accepted.values()), default=0.0),
            "client_peak_bytes": max((f["peak_bytes"] for f in accepted.values()), default=0),
            "partitions": sorted(accepted),
            "version": self.published.version,
        }
        if self._by_example:
            newest = self.published.record.get("epsilon", 0.0)
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
            logger.warning("%s: nothing is published, the version stays %d", problem, self.published.version)
            self._to_evaluate = {}
        else:
            figures["version"] += 1
            self.published.append(figures, arrays, self._sums.start)
        self._exchange.figures = figures
