"""Message -> replica at W^t -> local update -> reply."""

import functools
import resource
import time
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkrso_app import data, model, wire
from fedkrso_app.config import Config, ConfigError, parse
from fedkrso_app.core.projection import probe, stream
from fedkrso_app.ledger import Entry, Ledger
from fedkrso_app.replica import NeedSync, Replica, entries_folder
from fedkrso_app.strategies import STRATEGIES
from fedkrso_app.strategies.base import Shapes

app = ClientApp()


class Workplace:
    """What a process keeps between messages: one warm replica, the task's examples and how they are shared out."""

    def __init__(self, run_id: int, config: Config, partitions: int) -> None:
        self.config = config
        self.task = data.resolve(config)
        self.examples = data.load(self.task, config.data_dir, "train", config.holdout)
        self.shares = data.partition(
            self.examples, self.task, partitions, config.partition, config.dirichlet_alpha, config.seed
        )
        self.model = model.load(config.model, self.task.num_labels, config.seed, self.task.classes)
        self.strategy = STRATEGIES[config.strategy]
        self.shapes = Shapes.of(self.model.module, self.model.targets, self.model.head)
        method = self.strategy.local(self.model.module, self.model.targets, self.model.head, config)
        self.replica = Replica(method, Ledger(entries_folder(run_id)), self.strategy.incremental)


@functools.lru_cache(maxsize=1)
def workplace(run_id: int, config: Config, partitions: int) -> Workplace:
    return Workplace(run_id, config, partitions)


def here(context: Context) -> tuple[Workplace, int, int]:
    """The workplace of this node, its partition id, and the number of partitions."""
    config, node = parse(context.run_config), context.node_config
    if "partition-id" not in node or "num-partitions" not in node:
        raise ConfigError("this node has no partition-id or num-partitions; set both in the SuperNode's --node-config.")
    if "data-dir" in node:
        config = replace(config, data_dir=str(node["data-dir"]))
    partition, partitions = int(node["partition-id"]), int(node["num-partitions"])
    if not 0 <= partition < partitions:
        raise ConfigError(f"partition-id = {partition} is not below num-partitions = {partitions}.")
    return workplace(context.run_id, config, partitions), partition, partitions


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Say who this node is, once its settings, data and model are known to be good."""
    asked, answer = message.content.config_records["join"], ConfigRecord()
    try:
        place, partition, partitions = here(context)
        if asked["probe"] != probe():
            raise ConfigError(
                f"numpy draws other projections than the server's ({probe()}); install the server's numpy."
            )
        if asked["model"] != place.model.digest:
            classes = ", ".join(place.task.classes)
            labels = f" or label names ({classes}), which the key labels settles for all" if classes else ""
            raise ConfigError(f"model = {place.config.model!r} has other weights than the server's{labels}.")
        answer.update({"partition-id": partition, "num-partitions": partitions})
    except ConfigError as error:
        answer["error"] = str(error)
    return Message(RecordDict({"join": answer}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Bring W to the version the message names, train on this node's share, reply with the update."""
    started = time.monotonic()
    place, partition, _ = here(context)
    instructions = message.content.config_records["train"]
    round = wire.number(instructions, "round", int, 1, 2**31)
    version = wire.number(instructions, "version", int, 0, 2**31)
    schema = place.strategy.entry_schema(place.config, place.shapes)
    for name, record in message.content.array_records.items():
        place.replica.store.put(Entry(int(name.removeprefix("entry-")), wire.unpack(record, schema)))
    try:
        place.replica.advance(version)
    except NeedSync:
        status = ConfigRecord({"version": place.replica.version, "need-sync": True})
        return Message(RecordDict({"status": status}), reply_to=message)
    examples = place.examples.select(place.shares[partition])
    rng = stream(place.config.seed, "client", round, partition)
    batches = data.batches(
        examples, place.task, place.model.tokenizer, place.config.batch_size, place.config.max_length, rng
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with place.replica.lend() as method:
        arrays, loss = method.train(batches, instructions, rng)
        update: ArrayRecord = wire.pack(arrays)
    metrics = MetricRecord(
        {
            "num-examples": len(examples),
            "train-loss": loss,
            "train-seconds": time.monotonic() - started,
            "peak-bytes": peak_bytes(),
        }
    )
    status = ConfigRecord({"version": version})
    return Message(RecordDict({"status": status, "update": update, "metrics": metrics}), reply_to=message)


def peak_bytes() -> int:
    """Peak memory: of the GPU in this message, or of this process since it began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
