"""Run config -> strategy -> start -> save."""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.x509 import load_pem_x509_certificate
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedkrso_app import card, data, evaluation, metrics, model, run, tracking
from fedkrso_app.config import Config, ConfigError, parse
from fedkrso_app.ledger import Entry, Ledger
from fedkrso_app.replica import Replica
from fedkrso_app.strategies import STRATEGIES
from fedkrso_app.strategies.base import Shapes
from fedkrso_app.strategies.round import no_figures
from fedkrso_app.streaming import StreamingGrid
from fedkrso_app.train import TrainingError

logger = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from its config to its model."""
    warn_before_expiry()
    try:
        config = parse(context.run_config)
        tracking.check(config.tracker)
        here = config.evaluate == "server"  # otherwise there need be no data and no weights on the server
        task = data.resolve(config, look=here or bool(config.data_dir or config.dataset))
        # What is wrong with data or model is found here, before any client starts.
        for split in ("train", "validation") if here else ():
            data.load(task, config.data_dir, split, config.holdout)
        loaded = model.load(
            config.model, task.num_labels, config.seed, task.classes, weights=here, on_device=config.on_device
        )
        shapes = Shapes.of(loaded.module, loaded.targets, loaded.head)
        STRATEGIES[config.strategy].check_rank(config, shapes)
        digest = loaded.digest() if here else ""
        folder = run.resume(config, digest) if config.resume else run.create(config, digest)
        folder.lock()
    except (ConfigError, OSError) as error:
        logger.error("The run cannot start: %s", error)
        raise
    logger.info("Run directory: %s", folder.path)
    try:
        folder.set_status("running")
        with tracking.started(config, folder, task.metric) as track:
            play(config, task, loaded, shapes, folder, StreamingGrid(grid), track)
    except BaseException as error:
        reason = str(error) if isinstance(error, ConfigError | TrainingError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # on a full disk the words below are all there is
            folder.set_status(f"failed: {reason}")
        logger.error("The run failed: %s", reason)
        logger.error("Run directory: %s (go on with it by --run-config \"resume='%s'\")", folder.path, folder.path)
        raise
    finally:
        folder.unlock()
    logger.info("Run directory: %s", folder.path)


def play(
    config: Config,
    task: data.Task,
    loaded: model.LoadedModel,
    shapes: Shapes,
    folder: run.Run,
    grid: StreamingGrid,
    track: Callable[[dict[str, Any]], None],
) -> None:
    """All rounds that are left, then the model. ``track`` is told of each round's figures."""
    strategy_class = STRATEGIES[config.strategy]
    ledger = Ledger(folder.ledger, keep=None if strategy_class.incremental else 2)
    ledger.recover()
    replica = None
    if config.evaluate == "server":
        method = strategy_class.local(loaded.module, loaded.targets, loaded.head, config)
        replica = Replica(method, ledger, strategy_class.incremental)
    if ledger.version < 0:
        start = strategy_class.encode_entry(replica.method.initial(), config, shapes, 0) if replica else {}
        ledger.append(Entry(0, start, no_figures()))

    def weights() -> np.ndarray:
        assert replica
        replica.advance(ledger.version)
        return replica.state()

    @functools.lru_cache(maxsize=1)
    def tally(version: int) -> np.ndarray:
        assert replica
        replica.advance(version)
        validation = data.load(task, config.data_dir, "validation", config.holdout)
        return evaluation.tally(replica, validation, task, loaded.tokenizer)

    def report(figures: dict[str, Any]) -> None:
        figures = dict(figures)
        sums = tally(ledger.version) if replica else figures.pop("tally", None)
        if sums is not None:
            figures["metric"], figures["eval_loss"] = metrics.result(task.metric, sums)
            if task.language:
                figures["perplexity"] = metrics.perplexity(figures["eval_loss"])
        if not replica:
            folder.know_model(strategy.nodes.model)
        folder.add_metrics(figures)
        track(figures)
        logger.info("%s", run.line(figures, config, task.metric))

    strategy = strategy_class(
        config,
        shapes,
        ledger,
        folder.info["model_digest"],
        folder.info["id"],
        report,
        weights if replica else None,
        2 + metrics.moments_size(task.num_labels),
        functools.partial(metrics.check, num_labels=task.num_labels),
    )
    newest = dict(ledger.read(ledger.version).record)
    if newest["round"] not in [figures["round"] for figures in folder.metrics()]:  # else a resumed run has its line
        report(newest)
    rounds = max(0, config.num_server_rounds - strategy.first_round + 1)
    with ours_only(logger):
        strategy.start(grid, ArrayRecord(), rounds, config.round_timeout)  # type: ignore[arg-type]
    if rounds and ledger.version == newest["version"]:
        raise TrainingError(f"none of {rounds} rounds published anything; the warnings above say why")
    strategy.nodes.dismiss(grid)
    digest = None
    if replica:
        replica.advance(ledger.version)
        state = replica.method.plain_state()
        model.export(loaded, state, folder.model)
        card.write(folder, task, folder.metrics()[-1]["round"], folder.model)
        digest = model.state_digest(state)
    folder.complete(digest)
    logger.info("%s", run.closing_table(folder, task.metric))


def warn_before_expiry() -> None:
    """Warn of each certificate in ``FEDKRSO_CERTIFICATE`` (files; deploy/superlink.sh sets it) with a week or less."""
    for file in filter(None, os.environ.get("FEDKRSO_CERTIFICATE", "").split(os.pathsep)):
        try:
            end = load_pem_x509_certificate(Path(file).read_bytes()).not_valid_after_utc
        except (OSError, ValueError) as error:
            logger.warning("The certificate %s cannot be read: %s", file, error)
            continue
        if end - datetime.now(UTC) <= timedelta(days=7):
            logger.warning(
                "The certificate %s is valid until %s UTC: renew it by deploy/keys.sh.", file, f"{end:%F %R}"
            )


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
