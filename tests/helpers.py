"""What tests share: the default settings, whole runs in this process, and what can be asked of a run afterwards."""

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import Message

from fedkrso_app import client_app, data, server_app
from fedkrso_app.federation import local
from fedkrso_app.federation.replica import Replica
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.runs.folder import Run
from fedkrso_app.strategies import STRATEGIES
from fedkrso_app.strategies.base import LocalMethod
from fedkrso_app.training import model

ROOT = Path(__file__).parent.parent
WORDS = [f"w{number}" for number in range(40)]


def default_config() -> dict:
    """The defaults as Flower hands them over: flat, tables joined by a dot."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    flat = {}
    for key, value in tables.items():
        flat |= {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


class Grid(local.LocalGrid):
    """The engine in this process, with what can go wrong.

    ``tamper(partition, message, reply)`` may change, replace or drop (None) the reply to a train or evaluate message;
    ``order`` rearranges the replies that arrive together. With ``devices``, every node has a disk of its own and every
    message meets a process that knows nothing, as in a deployment.
    """

    def __init__(
        self,
        run_config: dict,
        nodes: int,
        tamper: Callable[[int, Message, Message], Message | None] = lambda partition, message, reply: reply,
        order: Callable[[list], list] = list,
        run_id: int = 1,
        devices: bool = False,
    ) -> None:
        super().__init__(client_app.app, run_config, nodes, run_id)
        self.tamper, self.order = tamper, order
        self.disks = Path(os.environ["FEDKRSO_CACHE"]) if devices else None

    def pull_messages(self, ids):
        return self.order(super().pull_messages(list(ids)))

    def reply(self, message):
        partition = self.contexts[message.metadata.dst_node_id].node_config["partition-id"]
        if self.disks:
            os.environ["FEDKRSO_CACHE"] = f"{self.disks}-{partition}"  # the fixture puts it back
            client_app.workplace.cache_clear()
        reply = super().reply(message)
        asked = message.metadata.message_type in ("train", "evaluate")
        return self.tamper(partition, message, reply) if asked else reply


def play(run_config: dict, nodes: int = 4, prepare: Callable[[Grid], None] = lambda grid: None, **options) -> Run:
    """One whole run, on a grid with these ``options`` that ``prepare`` may change before; the folder it made."""
    client_app.workplace.cache_clear()
    grid = Grid(run_config, nodes, **options)
    prepare(grid)
    local.play(server_app.app, grid, run_config)
    return Run(server_app.run.resolved_path(run_config["output-dir"]) / run_config["run-name"])


def digest(run: Run) -> str:
    return json.loads((run.path / "result.json").read_text())["digest"]


def replica(run: Run, version: int | None = None) -> LocalMethod:
    """The method with its model at ``version``, from W^0 and the ledger alone."""
    config = run.config
    task = data.resolve(config)
    loaded = model.load(config.model, task.num_labels, config.seed, task.classes, on_device=config.on_device)
    strategy = STRATEGIES[config.strategy]
    method = strategy.local(loaded.module, loaded.targets, loaded.head, config)
    ledger = Ledger(run.ledger)
    Replica(method, ledger, strategy.incremental).advance(ledger.version if version is None else version)
    return method


def replayed(run: Run, version: int | None = None) -> str:
    """The digest of the weights that W^0 and the ledger lead to."""
    return model.state_digest(replica(run, version).plain_state())


def arrays_of(reply: Message) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in reply.content["update"].items()}
