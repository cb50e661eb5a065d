"""Run config -> folder -> rounds -> model."""

import logging
import os
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.x509 import load_pem_x509_certificate
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkrso_app import data
from fedkrso_app.config import ConfigError, resolved_path
from fedkrso_app.data import hub
from fedkrso_app.federation import evaluation
from fedkrso_app.federation.streaming import StreamingGrid
from fedkrso_app.runs import folder as run
from fedkrso_app.runs import tracking
from fedkrso_app.runs.server import Server
from fedkrso_app.strategies import make, parse, privacy
from fedkrso_app.training import model, threads
from fedkrso_app.training.activations import TrainingError
from fedkrso_app.training.shapes import Shapes

logger = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from its config to its model."""
    warn_before_expiry()
    try:
        config = asked = parse(context.run_config)
        tracking.check(config.tracker)
        privacy.warn(config)
        threads.hold(config.torch_threads)
        here = config.evaluate == "server"  # otherwise there need be no data and no weights on the server
        look = here or bool(config.data_dir or config.dataset)
        resumed = run.Run(resolved_path(config.resume)).commits if config.resume else None
        config = hub.pinned(config, data_needed=look) if resumed is None else hub.at(config, resumed)
        if here:  # before what may be a large dataset is downloaded
            model.check(config.model, data.tasks.declared(config).num_labels)
        task = data.resolve(config, look=look)
        # What is wrong with data or model is found here, before any client starts.
        for split in ("train", "validation") if here else ():
            data.load(task, config.data_dir, split, config.holdout)
        loaded = model.of_run(config.of_server, task, weights=here)
        for split in ("train", "validation") if here else ():
            data.check(task, config.data_dir, split, config.holdout, loaded.tokenizer)
            evaluation.trial(loaded, data.load(task, config.data_dir, split, config.holdout), task, config, split)
        method = make(config, Shapes.of(loaded))
        digest = loaded.digest() if here else ""
        folder = run.resume(asked, digest) if asked.resume else run.create(asked, digest, hub.commits(config))
        folder.lock()
    except (ConfigError, OSError) as error:
        logger.error("The run cannot start: %s", error)
        raise
    logger.info("Run directory: %s", folder.path)
    try:
        folder.set_status("running")
        with tracking.started(config, folder, task.metric) as track:
            Server(config, task, loaded, method, folder, track).play(StreamingGrid(grid))
    except BaseException as error:
        reason = str(error) if isinstance(error, ConfigError | TrainingError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # on a full disk the words below are all there is
            folder.set_status(f"failed: {reason}")
        logger.error("The run failed: %s", reason)
        logger.error("Run directory: %s (continue it by --run-config \"resume='%s'\")", folder.path, folder.path)
        raise
    finally:
        folder.unlock()
    logger.info("Run directory: %s", folder.path)


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
                "The certificate %s is valid until %s UTC: renew it with deploy/keys.sh.", file, f"{end:%F %R}"
            )
