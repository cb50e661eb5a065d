"""The server of a run beside its rounds: ledger, model, evaluation, figures, and the model at the end."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from fedkrso_app import data
from fedkrso_app.config import Config
from fedkrso_app.core.projection import stream
from fedkrso_app.data import hub
from fedkrso_app.federation import evaluation
from fedkrso_app.federation.exchange import no_figures
from fedkrso_app.federation.nodes import Nodes
from fedkrso_app.federation.published import Published
from fedkrso_app.federation.released import Spent
from fedkrso_app.federation.replica import Replica
from fedkrso_app.federation.round import Round
from fedkrso_app.federation.spending import Spending
from fedkrso_app.federation.streaming import StreamingGrid
from fedkrso_app.federation.transforms import transforms
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Entry, Ledger
from fedkrso_app.runs import card
from fedkrso_app.runs.folder import Run
from fedkrso_app.runs.summary import closing_table, line
from fedkrso_app.strategies.base import Arrays, Method
from fedkrso_app.strategies.privacy import Privacy
from fedkrso_app.training import metrics, model
from fedkrso_app.training.activations import TrainingError

logger = logging.getLogger("flwr")


class Server:
    """What :class:`Round` needs of its server, and the run from the first round that is left to its model.

    ``track`` is called with each round's figures.
    """

    def __init__(
        self,
        config: Config,
        task: data.Task,
        loaded: model.LoadedModel,
        method: Method,
        folder: Run,
        track: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config, self.task, self.loaded, self.method, self.folder = config, task, loaded, method, folder
        self.track = track
        span = method.entry.span
        self.ledger = Ledger(folder.ledger, keep=span and span + 1)
        self.tally_schema = evaluation.tally_schema(task)
        self.spending = Spending(folder.path / "privacy.jsonl", config.of(Privacy).delta)
        self.replica = None
        if config.evaluate == "server":
            half = method.local(loaded)
            half.config = config.of_server
            self.replica = Replica(half, self.ledger, span)
        for entry in self.ledger.recovered():
            self._follow(entry)
        if self.ledger.version < 0:
            start = self.replica.local.state() if self.replica else {}
            rounding = stream(config.seed, "broadcast", 0)
            entry = Entry(0, wire.encode(start, method.entry.start, rounding), no_figures())
            self.ledger.append(entry)
            self._follow(entry)
        info, commits = folder.info, hub.commits(config)
        self.nodes = Nodes(info["model_digest"], info["id"], config.round_timeout, self.ledger, commits)

    def _follow(self, entry: Entry) -> None:
        """Show an entry of before the first round of this process to whoever keeps up with them."""
        arrays = wire.decode(entry.arrays)
        self.method.observe(entry.version, self.method.entry.filled(arrays))
        if self.replica:
            self.replica.follow(entry.version, arrays)

    def opening(self, round: int, kind: str, partitions: list[int]) -> None:
        self.folder.add_opening(round, kind, partitions)

    def opened(self) -> int:
        return self.folder.opened

    def weights(self) -> Arrays | None:
        if not self.replica:
            return None
        self.replica.advance(self.ledger.version)
        return self.replica.state()

    def score(self, tally: np.ndarray) -> tuple[float, float]:
        metrics.check(tally, self.task.metric, self.task.num_labels)
        return metrics.result(self.task.metric, tally)

    def report(self, figures: dict[str, Any]) -> None:
        figures = dict(figures)
        tally = self._tally(self.ledger.version) if self.replica else figures.pop("tally", None)
        if tally is not None:
            figures["metric"], figures["eval_loss"] = metrics.result(self.task.metric, tally)
            if self.task.language:
                figures["perplexity"] = metrics.perplexity(figures["eval_loss"])
        if not self.replica:
            self.folder.know_model(self.nodes.model)
        self.folder.add_metrics(figures)
        self.track(figures)
        logger.info("%s", line(figures, self.config, self.task.metric))

    @functools.lru_cache(maxsize=1)  # noqa: B019  # there is one server at a time
    def _tally(self, version: int) -> np.ndarray:
        assert self.replica
        self.replica.advance(version)
        validation = data.load(self.task, self.config.data_dir, "validation", self.config.holdout)
        return evaluation.tally(self.replica.computing(), validation, self.task, self.loaded.tokenizer)

    def play(self, grid: StreamingGrid) -> None:
        """All rounds that are left, then the model."""
        kept = Ledger(self.folder.path / "server")
        published = Published(self.method, transforms(self.method), self.ledger, kept, self.weights)
        round = Round(published, self.nodes, self)
        newest = published.record
        if newest["round"] not in [figures["round"] for figures in self.folder.metrics()]:  # else a resumed run has it
            self.report(newest)
        rounds = max(0, self.config.num_server_rounds - round.first_round + 1)
        with ours_only(logger):
            try:
                round.start(grid, ArrayRecord(), rounds, self.config.round_timeout)  # type: ignore[arg-type]
            except Spent as reason:
                logger.warning("%s; the run ends here", reason)
                rounds = rounds if self.ledger.version == 0 else 0  # what there is, is the model
        if rounds and self.ledger.version == newest["version"]:
            raise TrainingError(f"none of {rounds} rounds published anything; the warnings above say why")
        self.nodes.dismiss(grid)
        digest = None
        if self.replica:
            self.replica.advance(self.ledger.version)
            state = self.replica.local.plain_state()
            model.export(self.loaded, state, self.folder.model)
            card.write(self.folder, self.task, self.folder.metrics()[-1]["round"], self.folder.model)
            digest = model.state_digest(state)
        self.folder.complete(digest)
        logger.info("%s", closing_table(self.folder, self.task.metric))


@contextmanager
def ours_only(logger: logging.Logger) -> Iterator[None]:
    """Without what Flower's loop logs by itself: its records are empty here, since the ledger is the state."""

    def wanted(record: logging.LogRecord) -> bool:
        return record.funcName not in ("start", "log_strategy_start_info") or record.levelno > logging.INFO

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
