"""Run config -> folder -> rounds -> model."""

import logging
from contextlib import suppress

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkrso_app import data
from fedkrso_app.config import ConfigError
from fedkrso_app.federation.streaming import StreamingGrid
from fedkrso_app.runs import folder as run
from fedkrso_app.runs import tracking
from fedkrso_app.runs.server import Server
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.base import Shapes
from fedkrso_app.training import model
from fedkrso_app.training.activations import TrainingError

logger = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from its config to its model."""
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
        for split in ("train", "validation") if here else ():
            data.check(task, config.data_dir, split, config.holdout, loaded.tokenizer)
        method = make(config, Shapes.of(loaded))
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
