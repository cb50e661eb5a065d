"""A simulated federation: what it costs beyond training, beside a plain Flower app.

    python -m benchmarks.simulation [--clients 100] [--rounds 5] [--steps 10] [--workers 2] [--clients-per-node 50]
                                    [--json]

FedKRSO and then the peer (benchmarks/peer.py), each in Flower's simulation engine with that many Ray workers, on the
embedded model and task, evaluated on the server after each round. The clock runs from the first message that a
worker handles, which is after Flower's and Python's start-up, to the end of the ServerApp. Per part, in seconds:

CPU          summed over all processes; depends little on the machine's other load
wall         share of the run: a worker's time divided by the number of workers; of the server's parts only the time
             in which workers wait for it. These add up to the whole run
÷ steps      wall divided by the limit: CPU seconds of all local steps (batches included) per worker

rebuild      the model at the requested version: Replica.advance; in the peer, building it and loading the state
train        the local steps
pack         encoding the reply's arrays
client, rest the rest of a ClientApp: choosing rows, checking the message, copying W^t, first set-up
aggregate    checking, counting and averaging the replies, and packing what is sent
evaluate     the model on the validation rows
transport    the remainder: Flower, Ray, queues, and waiting for the last client of a round
"""

import argparse
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.clocks import Interval, simulate
from benchmarks.models import show
from fedkrso_app.data.embedded import pretraining as embedded
from fedkrso_app.runs.compare import Settings, settings

APPS: dict[str, Any] = {
    "fedkrso": {
        "client": "fedkrso_app.client_app:app",
        "server": "fedkrso_app.server_app:app",
        "client_parts": {
            "fedkrso_app.federation.replica:Replica.advance": "rebuild",
            "fedkrso_app.training.loop:train": "train",
            "fedkrso_app.federation.workplace:Workplace._trained": "pack",
        },
        "server_parts": {
            "fedkrso_app.federation.exchange:Exchange.ask": "aggregate",
            "fedkrso_app.federation.aggregate:Aggregate.accept": "aggregate",
            "fedkrso_app.federation.round:Round._close": "aggregate",
            "fedkrso_app.training.metrics:tally": "evaluate",
        },
    },
    "peer": {
        "client": "benchmarks.peer:client",
        "server": "benchmarks.peer:server",
        "client_parts": {
            "benchmarks.peer:restore": "rebuild",
            "benchmarks.peer:fit": "train",
            "benchmarks.peer:pack": "pack",
        },
        "server_parts": {
            "flwr.serverapp.strategy:FedAvg.configure_train": "aggregate",
            "flwr.serverapp.strategy:FedAvg.aggregate_train": "aggregate",
            "fedkrso_app.training.metrics:tally": "evaluate",
        },
    },
}
IN_CLIENT, IN_SERVER = ("rebuild", "train", "pack"), ("aggregate", "evaluate")


def rows(
    config: Settings, clients: int, workers: int, each: int = 1, apps: Sequence[str] = tuple(APPS)
) -> list[dict[str, Any]]:
    """The table of each app, and last in each the whole run with its ratio to the first app's. ``each`` clients of
    FedKRSO are at a node; the peer has a node for each client."""
    result: list[dict[str, Any]] = []
    for app in apps:
        with tempfile.TemporaryDirectory() as folder:
            clocks = Path(folder) / "clocks"
            clocks.mkdir()
            held = each if app == "fedkrso" else 1
            here = config | {"output-dir": folder, "run-name": app, "clients-per-node": held}
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # no run meets what another has left behind
                seen = fresh.submit(
                    simulate, **APPS[app], settings=here, clients=clients // held, workers=workers, folder=clocks
                ).result()
        trained = sum(interval["part"] == "train" for interval in seen)
        if trained != clients * config["num-server-rounds"]:
            raise RuntimeError(f"{app}: {trained} of {clients * config['num-server-rounds']} clients trained")
        result += [{"app": app, **row} for row in account(seen, workers)]
    walls = {row["app"]: row["wall"] for row in result if row["part"] == "all"}
    return [
        row | {f"÷ {apps[0]}": walls[row["app"]] / walls[apps[0]] if row["part"] == "all" else ""} for row in result
    ]


def account(seen: Sequence[Interval], workers: int) -> list[dict[str, Any]]:
    """Where the time of a run went. Parts of one kind of process must not contain each other."""
    seen = [interval | {"seconds": interval["end"] - interval["start"]} for interval in seen]
    server = next(interval["process"] for interval in seen if interval["part"] == "server")
    handled = [interval for interval in seen if interval["part"] == "client"]
    began, ended = min(interval["start"] for interval in handled), max(interval["end"] for interval in seen)

    def total(part: str, kind: str) -> float:
        """Of the workers' intervals, or of the server's where the part is one of the server's."""
        return sum(i[kind] for i in seen if i["part"] == part and (i["process"] == server) == (part in IN_SERVER))

    def waiting(part: str) -> float:
        """Seconds of workers that do nothing while the server does ``part``."""
        mine = [i for i in seen if i["part"] == part and i["process"] == server and i["end"] > began]
        return sum(workers * (i["end"] - max(began, i["start"])) - sum(overlap(i, h) for h in handled) for i in mine)

    # On the server Flower's own threads work beside the averaging, and torch's work on the evaluation.
    cpu = {part: total(part, "thread" if part == "aggregate" else "cpu") for part in IN_CLIENT + IN_SERVER}
    cpu["client, rest"] = sum(i["cpu"] for i in handled) - sum(cpu[part] for part in IN_CLIENT)
    limit = cpu["train"] / workers
    wall = {part: total(part, "seconds") / workers for part in IN_CLIENT}
    wall["client, rest"] = sum(i["seconds"] for i in handled) / workers - sum(wall.values())
    wall |= {part: waiting(part) / workers for part in IN_SERVER}
    wall["transport"] = ended - began - sum(wall.values())
    wall["all"] = ended - began
    return [
        {"part": part, "CPU": cpu.get(part, ""), "wall": seconds, "÷ steps": seconds / limit}
        for part, seconds in wall.items()
    ]


def overlap(one: Interval, other: Interval) -> float:
    """Seconds that two intervals share."""
    return max(0.0, min(one["end"], other["end"]) - max(one["start"], other["start"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="local steps of one client in one round")
    parser.add_argument("--workers", type=int, default=2, help="Ray workers, of one core each")
    parser.add_argument("--clients-per-node", type=int, default=50, help="of FedKRSO; the peer has one")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    a = parser.parse_args()
    embedded.model_path()  # made now if it is not there yet
    config = settings(None, []) | {"num-server-rounds": a.rounds, "local-steps": a.steps}
    title = f"{a.clients} clients, {a.rounds} rounds of {a.steps} steps, {a.workers} workers"
    show(title, rows(config, a.clients, a.workers, a.clients_per_node), a.json)


if __name__ == "__main__":
    main()
