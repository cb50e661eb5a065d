"""One node's part of a run: what its process keeps between messages, joining, training, judging."""

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict

from fedkrso_app import data
from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core.projection import probe, stream
from fedkrso_app.data import hub
from fedkrso_app.federation import evaluation
from fedkrso_app.federation.discretion import told
from fedkrso_app.federation.replica import NeedSync, Replica
from fedkrso_app.federation.store import NodeStore
from fedkrso_app.federation.transforms import transforms
from fedkrso_app.records import protocol, wire
from fedkrso_app.records.ledger import Entry
from fedkrso_app.records.protocol import TALLY, Answer, Figures, Instructions, Question, Status
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.base import Arrays, Shapes
from fedkrso_app.training import loop, model, threads
from fedkrso_app.training.device import device, peak_bytes, reset_peak

logger = logging.getLogger("flwr")


class Workplace:
    """What a process keeps between messages: one warm replica, the task's examples and how they are split."""

    def __init__(self, run: str, config: Config, partitions: int) -> None:
        self.config, self._partitions = config, partitions
        self.task = data.resolve(config)
        self.model = self._load()
        self.method = make(config, Shapes.of(self.model))
        self.transforms = transforms(self.method)
        span = self.method.entry.span
        self.store = NodeStore(run, keep=span + 1) if span else NodeStore(run)

    @functools.cached_property
    def replica(self) -> Replica:
        return Replica(self.method.local(self.model), self.store.entries, self.method.entry.span, self.store)

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
        if split == "train" or c.partition == "iid":
            return data.partition(examples, self.task, self._partitions, c.partition, c.dirichlet_alpha, c.seed)
        train = data.load(self.task, c.data_dir, "train", c.holdout)
        return data.following(self._shares("train"), train, examples, self.task, c.seed)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def check(self, split: str, partition: int) -> None:
        """See that a partition's rows can be trained on, or judged by. Raises :class:`ConfigError`."""
        data.check(self.task, self.config.data_dir, split, self.config.holdout, self.model.tokenizer)
        evaluation.trial(self.model, self.share(split, partition), self.task, self.config, split)

    def _load(self) -> model.LoadedModel:
        c = self.config
        return model.load(
            c.model, self.task.num_labels, c.seed, self.task.classes, device=c.weights_device, head=c.head
        )

    def take(self, content: RecordDict, instructions: Instructions) -> None:
        """Keep what a message brings and advance to the version that it names. Raises :class:`NeedSync`."""
        schema = self.method.entry.travelling
        for name, record in content.array_records.items():
            kind, _, number = name.partition("-")
            if kind == "weights":
                whole = Schema({"weights": Field("float32", (self.method.weights_size,), "state")})
                self.store.put_weights(int(number), instructions.stamp, wire.unpack(record, whole)["weights"])
            else:
                version = int(number)
                expected = schema if version else schema.start
                expected = expected if version == instructions.version else expected.older
                # A server without a model leaves version 0 to the seed: an entry without arrays.
                self.store.put(Entry(version, wire.unpack(record, expected) if record else {}))
        try:
            self.replica.advance(instructions.version)
        except NeedSync:
            raise
        except BaseException:
            workplace.cache_clear()  # some layers may have moved already
            raise
        # "": another process has put newer weights in its place
        if self.store.stamp(instructions.version) not in ("", instructions.stamp):
            self.forget()
            raise NeedSync("the files of this node are not those of the server's run")

    def forget(self) -> None:
        """Be as if this node had never taken part in the run: its files are of another history."""
        self.store.forget()
        workplace.cache_clear()
        if "replica" in self.__dict__:
            self.replica.version = -1

    def train(self, partition: int, instructions: Instructions, started: float) -> RecordDict:
        """Train on a partition's share; the reply has the update. ``started``: when the message came (monotonic)."""
        examples, c = self.share("train", partition), self.config
        rng = stream(c.seed, "client", instructions.round, partition)
        batches = data.batches(examples, self.task, self.model.tokenizer, c.batch_size, c.max_length, rng)
        used = device(c.device)
        reset_peak(used)
        start = self.replica.local.state() if self.transforms else {}
        with self.replica.lend() as local:
            local.adopt(self.store.personal(partition, before=instructions.round))
            with local.session(instructions.method, rng) as session:
                loss = loop.train(local.module, batches, session, c, rng)
                arrays = session.update()
        if own := {name: arrays.pop(name) for name in self.method.reply.named("personal", "client")}:
            self.store.put_personal(partition, instructions.round, own)
        update = self._encoded(arrays, start, stream(c.seed, "reply", instructions.round, partition))
        seconds = time.monotonic() - started
        figures = Figures(len(examples), loss, seconds, peak_bytes(used))
        return protocol.trained(Status(instructions.version), update, figures)

    def _encoded(self, arrays: Arrays, start: Arrays, rounding: np.random.Generator) -> ArrayRecord:
        for transform in self.transforms:
            arrays = transform.update(arrays, start)
        return wire.pack(wire.encode(arrays, self.method.reply, rounding))

    def evaluate(self, partition: int, instructions: Instructions) -> RecordDict:
        """Judge the model, with the partition's own part of it, on its share of the validation rows."""
        examples = self.share("validation", partition)
        if own := self.store.personal(partition):
            with self.replica.lend() as local:
                local.adopt(own)
                sums = evaluation.tally(local, examples, self.task, self.model.tokenizer)
        else:
            sums = evaluation.tally(self.replica.computing(), examples, self.task, self.model.tokenizer)
        return RecordDict({"status": Status(instructions.version).record(), TALLY: wire.pack({"tally": sums})})


@functools.lru_cache(maxsize=1)
def workplace(run: str, config: Config, partitions: int) -> Workplace:
    return Workplace(run, config, partitions)


def identity(node_config: Mapping[str, Any]) -> tuple[int, int]:
    """A node's partition id and the number of partitions. Raises ConfigError where they are not set."""
    if "partition-id" not in node_config or "num-partitions" not in node_config:
        raise ConfigError("this node has no partition-id or num-partitions; set both in the SuperNode's --node-config.")
    partition, partitions = int(node_config["partition-id"]), int(node_config["num-partitions"])
    if not 0 <= partition < partitions:
        raise ConfigError(f"partition-id = {partition} is not below num-partitions = {partitions}.")
    if not isinstance(share := node_config.get("share-errors", False), bool):
        raise ConfigError(f"share-errors = {share!r} is neither true nor false; write it without quotes.")
    return partition, partitions


def workplace_of(context: Any, run: str) -> Workplace:
    """That of a node. A ``data-dir`` of its own wins over the run's, and is its own share as a whole."""
    config, partitions = hub.at(parse(context.run_config), NodeStore(run).commits()), identity(context.node_config)[1]
    threads.hold(config.torch_threads)
    if "data-dir" in context.node_config:
        config, partitions = replace(config, data_dir=str(context.node_config["data-dir"])), 0
    return workplace(run, config, partitions)


def join(message: Message, context: Any) -> Answer:
    """Say who this node is and what it holds, once its settings, data and model are known to be good."""
    asked, answer = Question.read(message.content), Answer()
    try:
        partition, partitions = identity(context.node_config)
        answer = Answer(partition, partitions)
        NodeStore(asked.run).pin(asked.commits)
        place = workplace_of(context, asked.run)
        place.check("train", partition)
        if place.config.evaluate == "clients":
            try:
                place.check("validation", partition)
            except ConfigError as error:
                raise ConfigError(f"evaluate = 'clients' reads validation rows here, and {error}") from None
        if asked.probe != probe():
            raise ConfigError(
                f"numpy generates different projections than the server's ({probe()}); install the server's numpy."
            )
        if asked.model not in ("", place.digest):
            classes = ", ".join(place.task.classes)
            labels = f" or label names ({classes}), which the key labels settles for all" if classes else ""
            raise ConfigError(f"model = {place.config.model!r} has other weights than the server's{labels}.")
        version = place.store.version
        dataset = "" if "data-dir" in context.node_config else hub.rows_of(place.config)
        return replace(answer, model=place.digest, version=version, stamp=place.store.stamp(version), dataset=dataset)
    except ConfigError as error:
        return replace(answer, error=told(error, context.node_config))


def leave(message: Message, context: Any) -> None:
    """Remove this run's files: it is over."""
    run = str(message.content.config_records["leave"]["run"])
    if released := NodeStore(run).clear():
        logger.info("What partitions keep of the model to themselves is in %s", released)


def up_to_date(
    message: Message, context: Any, work: Callable[[Workplace, int, Instructions], RecordDict]
) -> RecordDict:
    """Bring W to the version that a train or evaluate message names and do the ``work`` there; or ask to be brought up
    to date."""
    instructions = Instructions.read(message.content, message.metadata.message_type)
    partition, place = identity(context.node_config)[0], workplace_of(context, instructions.run)
    if instructions.afresh and place.store.version >= 0:  # the server has found that these files are not its run's
        place.forget()
        place = workplace_of(context, instructions.run)
    try:
        place.take(message.content, instructions)
    except NeedSync:
        return RecordDict({"status": Status(place.replica.version, need_sync=True).record()})
    return work(place, partition, instructions)
