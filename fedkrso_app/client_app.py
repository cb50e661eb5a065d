"""Message -> replica at W^t -> local update -> reply."""

import functools
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkrso_app import data
from fedkrso_app.config import Config, ConfigError, parse
from fedkrso_app.core.projection import probe, stream
from fedkrso_app.federation import evaluation
from fedkrso_app.federation.replica import NeedSync, NodeStore, Replica
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Entry
from fedkrso_app.strategies import STRATEGIES
from fedkrso_app.strategies.base import Shapes
from fedkrso_app.training import model

app = ClientApp()


class Workplace:
    """What a process keeps between messages: one warm replica, the task's examples and how they are shared out."""

    def __init__(self, run: str, config: Config, partitions: int) -> None:
        self.config, self._partitions = config, partitions
        self.task = data.resolve(config)
        self.model = self._load()
        self.strategy = STRATEGIES[config.strategy]
        self.shapes = Shapes.of(self.model.module, self.model.targets, self.model.head)
        self.store = NodeStore(run) if self.strategy.incremental else NodeStore(run, keep=2)

    @functools.cached_property
    def replica(self) -> Replica:
        method = self.strategy.local(self.model.module, self.model.targets, self.model.head, self.config)
        return Replica(method, self.store.entries, self.strategy.incremental, self.store)

    @functools.cached_property
    def digest(self) -> str:
        """Of W^0: it takes a second for a large model, and only a node that joins is asked for it."""
        return (self._load() if "replica" in self.__dict__ else self.model).digest()

    def share(self, split: str, partition: int) -> Any:
        """The examples of one partition: its part of all, or all of a node that has files of its own."""
        examples = data.load(self.task, self.config.data_dir, split, self.config.holdout)
        return examples.select(self._shares(split)[partition]) if self._partitions else examples

    @functools.lru_cache(maxsize=2)  # noqa: B019  # there is one workplace at a time
    def _shares(self, split: str) -> list[Any]:
        c = self.config
        examples = data.load(self.task, c.data_dir, split, c.holdout)
        scheme = c.partition if split == "train" else "iid"
        return data.partition(examples, self.task, self._partitions, scheme, c.dirichlet_alpha, c.seed)

    def _load(self) -> model.LoadedModel:
        c = self.config
        return model.load(c.model, self.task.num_labels, c.seed, self.task.classes, on_device=c.on_device)

    def take(self, content: RecordDict, instructions: ConfigRecord) -> None:
        """Keep what a message brings and advance to the version that it names. Raises :class:`NeedSync`."""
        version = wire.number(instructions, "version", int, 0, 2**31)
        for name, record in content.array_records.items():
            kind, _, number = name.partition("-")
            if kind == "weights":
                values = wire.unpack(record, self.strategy.weights_schema(self.config, self.shapes))["weights"]
                self.store.put_weights(int(number), str(instructions["stamp"]), values)
            else:
                schema = self.strategy.entry_schema(self.config, self.shapes)
                # A server without a model leaves version 0 to the seed: an entry without arrays.
                self.store.put(Entry(int(number), wire.unpack(record, schema) if record else {}))
        try:
            self.replica.advance(version)
        except NeedSync:
            raise
        except BaseException:
            workplace.cache_clear()  # some layers may have moved already
            raise
        # "": another process has put newer weights in its place
        if self.store.stamp(version) not in ("", instructions["stamp"]):
            self.forget()
            raise NeedSync("the files of this node are not those of the server's run")

    def forget(self) -> None:
        """Be as if this node had never had a part in the run: its files are of another history."""
        self.store.clear()
        workplace.cache_clear()
        if "replica" in self.__dict__:
            self.replica.version = -1


@functools.lru_cache(maxsize=1)
def workplace(run: str, config: Config, partitions: int) -> Workplace:
    return Workplace(run, config, partitions)


def identity(context: Context) -> tuple[int, int]:
    """This node's partition id and the number of partitions. Raises ConfigError where they are not set."""
    node = context.node_config
    if "partition-id" not in node or "num-partitions" not in node:
        raise ConfigError("this node has no partition-id or num-partitions; set both in the SuperNode's --node-config.")
    partition, partitions = int(node["partition-id"]), int(node["num-partitions"])
    if not 0 <= partition < partitions:
        raise ConfigError(f"partition-id = {partition} is not below num-partitions = {partitions}.")
    return partition, partitions


def here(context: Context, run: str) -> Workplace:
    """The workplace of this node. A ``data-dir`` of its own wins over the run's, and is its own share as a whole."""
    config, partitions = parse(context.run_config), identity(context)[1]
    if "data-dir" in context.node_config:
        config, partitions = replace(config, data_dir=str(context.node_config["data-dir"])), 0
    return workplace(run, config, partitions)


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Say who this node is and what it holds, once its settings, data and model are known to be good."""
    asked, answer = message.content.config_records["join"], ConfigRecord({"partition-id": -1})
    try:
        partition, partitions = identity(context)
        answer.update({"partition-id": partition, "num-partitions": partitions})
        place = here(context, str(asked["run"]))
        place.share("train", partition)
        if place.config.evaluate == "clients":
            try:
                place.share("validation", partition)
            except ConfigError as error:
                raise ConfigError(f"evaluate = 'clients' reads validation rows here, and {error}") from None
        if asked["probe"] != probe():
            raise ConfigError(
                f"numpy draws other projections than the server's ({probe()}); install the server's numpy."
            )
        if asked["model"] not in ("", place.digest):
            classes = ", ".join(place.task.classes)
            labels = f" or label names ({classes}), which the key labels settles for all" if classes else ""
            raise ConfigError(f"model = {place.config.model!r} has other weights than the server's{labels}.")
        version = place.store.version
        answer.update({"model": place.digest, "version": version, "stamp": place.store.stamp(version)})
    except ConfigError as error:
        answer["error"] = str(error)
    return Message(RecordDict({"join": answer}), reply_to=message)


@app.query("leave")
def leave(message: Message, context: Context) -> Message:
    """Remove this run's files: it is over."""
    NodeStore(str(message.content.config_records["leave"]["run"])).clear()
    return Message(RecordDict(), reply_to=message)


def answered(message: Message, context: Context, work: Callable[[Workplace, int], dict[str, Any]]) -> Message:
    """Bring W to the version the message names and reply with the records that ``work`` makes there, given this
    node's workplace and partition; or ask to be brought up to date."""
    instructions = message.content.config_records[message.metadata.message_type]
    partition, place = identity(context)[0], here(context, str(instructions["run"]))
    if instructions["afresh"] and place.store.version >= 0:  # the server has found that these files are not its run's
        place.forget()
        place = here(context, str(instructions["run"]))
    try:
        place.take(message.content, instructions)
    except NeedSync:
        status, records = ConfigRecord({"version": place.replica.version, "need-sync": True}), {}
    else:
        status, records = ConfigRecord({"version": instructions["version"]}), work(place, partition)
    return Message(RecordDict({"status": status, **records}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this node's share; the reply holds the update."""
    started = time.monotonic()
    instructions = message.content.config_records["train"]
    round = wire.number(instructions, "round", int, 1, 2**31)

    def work(place: Workplace, partition: int) -> dict[str, Any]:
        examples = place.share("train", partition)
        c, rng = place.config, stream(place.config.seed, "client", round, partition)
        batches = data.batches(examples, place.task, place.model.tokenizer, c.batch_size, c.max_length, rng)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = place.replica.method.initial() if c.wire_dtype != "float32" else {}
        with place.replica.lend() as method:
            arrays, loss = method.train(batches, instructions, rng)
        rounding = stream(c.seed, "reply", round, partition)
        update = wire.pack(place.strategy.encode_reply(arrays, start, c, place.shapes, rounding))
        seconds, peak = time.monotonic() - started, peak_bytes()
        figures = MetricRecord(
            {"num-examples": len(examples), "train-loss": loss, "train-seconds": seconds, "peak-bytes": peak}
        )
        return {"update": update, "metrics": figures}

    return answered(message, context, work)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Judge the model on this node's share of the validation rows."""

    def work(place: Workplace, partition: int) -> dict[str, Any]:
        examples = place.share("validation", partition)
        sums = evaluation.tally(place.replica, examples, place.task, place.model.tokenizer)
        return {"tally": wire.pack({"tally": sums})}

    return answered(message, context, work)


def peak_bytes() -> int:
    """Peak memory: of the GPU in this message, or of this process since it began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
