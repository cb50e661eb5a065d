"""One run through Flower's simulation engine (Ray), with clocks in all of its processes.

The apps run unchanged; in each process, clocks are put around some of their functions from outside. Each process writes
the intervals that its clocks measured to a file of its own.
"""

import functools
import importlib
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

# part, process, start and end (of the machine's monotonic clock), CPU seconds of the process and of the thread
Interval = dict[str, Any]


class Timed:
    """An app, "module:attribute", with clocks around the functions ``parts`` ("module:dotted name" -> the part that it
    belongs to); they write to ``folder``. Travels to the workers by name, so that each process sets its clocks once."""

    def __init__(self, app: str, parts: Mapping[str, str], folder: Path, settings: Mapping[str, Any]) -> None:
        self.app, self.parts, self.folder, self.settings = app, dict(parts), folder, dict(settings)

    def call(self, part: str, first: Any, context: Context) -> Any:
        """The app, called as Flower would, with the run config that Flower's Python interface leaves empty."""
        for function, name in self.parts.items():
            _set_clock(function, name, self.folder)
        module, name = self.app.split(":")
        app = getattr(importlib.import_module(module), name)
        context = Context(context.run_id, context.node_id, context.node_config, context.state, self.settings)
        return _timed(app, part, self.folder)(first, context)

    def __call__(self, message: Message, context: Context) -> Message:
        return self.call("client", message, context)


@functools.cache
def _set_clock(function: str, part: str, folder: Path) -> None:
    module, path = function.split(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, _timed(getattr(owner, name), part, folder))


def _timed(call: Any, part: str, folder: Path) -> Any:
    @functools.wraps(call)
    def clocked(*args: Any, **kwargs: Any) -> Any:
        start, cpu, thread = time.monotonic(), time.process_time(), time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            seen = {
                "part": part,
                "process": os.getpid(),
                "start": start,
                "end": time.monotonic(),
                "cpu": time.process_time() - cpu,
                "thread": time.thread_time() - thread,
            }
            with open(folder / f"{os.getpid()}.jsonl", "a") as file:
                file.write(json.dumps(seen) + "\n")

    return clocked


def simulate(
    client: str,
    server: str,
    client_parts: Mapping[str, str],
    server_parts: Mapping[str, str],
    settings: Mapping[str, Any],
    clients: int,
    workers: int,
    folder: Path,
) -> list[Interval]:
    """Run the two apps with ``clients`` nodes on ``workers`` processes of one core each; what the clocks saw."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    timed_client = Timed(client, client_parts, folder, settings)
    timed_server = Timed(server, server_parts, folder, settings)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < clients:  # a plain FedAvg begins with those that are there
            time.sleep(0.05)
        timed_server.call("server", grid, context)

    run_simulation(
        app,
        timed_client,  # type: ignore[arg-type]  # a ClientApp is what can be called with a message and a context
        clients,
        backend_config={"init_args": {"num_cpus": workers}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
