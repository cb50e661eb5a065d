"""One node's part of a run: what its process keeps between messages, joining, training, judging.

A node holds one partition or several, each of which is a client of its own: its rows, its stream of random numbers, its
reply.
"""

import functools
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict

from fedkrso_app import data
from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core.projection import probe, stream
from fedkrso_app.core.stacked import Group, Unstackable
from fedkrso_app.data import hub
from fedkrso_app.federation import evaluation
from fedkrso_app.federation.discretion import shown_to_server
from fedkrso_app.federation.replica import NeedSync, Replica
from fedkrso_app.federation.store import NodeStore
from fedkrso_app.federation.transforms import transforms
from fedkrso_app.records import protocol, wire
from fedkrso_app.records.ledger import Entry
from fedkrso_app.records.protocol import TALLY, Answer, Figures, Instructions, Question, Status
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies import make, parse
from fedkrso_app.strategies.base import Arrays, Shapes
from fedkrso_app.training import loop, model, threads, together
from fedkrso_app.training.device import device, peak_bytes, release, reset_peak

logger = logging.getLogger("flwr")

Reply = tuple[int, RecordDict | Exception]  # a partition's, or why there is none


class Workplace:
    """What a process keeps between messages: one warm replica, the task's examples and how they are split.

    ``folders`` (partition id, data-dir) are those of a node with files of its own: each is a partition as a whole.
    """

    def __init__(self, run: str, config: Config, partitions: int, folders: tuple[tuple[int, str], ...] = ()) -> None:
        self.config, self._partitions, self._folders = config, partitions, dict(folders)
        self.task = data.resolve(config)
        for partition, folder in folders[1:]:
            if (other := data.resolve(replace(config, data_dir=folder))) != self.task:
                raise ConfigError(
                    f"partition {partition}'s files in {folder} make another task than those in {config.data_dir} "
                    f"({_difference(other, self.task)}); give both the same columns and labels, or set the key labels."
                )
        self.model = self._load()
        self.method = make(config, Shapes.of(self.model))
        self.transforms = transforms(self.method)
        # A CPU is busy with one client's rows, and a pass pads them to the longest of all.
        most = 1 if device(config.device).type == "cpu" else 2**31
        self.at_once = most if config.batch_clients == "auto" else int(config.batch_clients)
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
        """The examples of one partition: its part of all, or all in its folder on a node that has files of its own."""
        folder = self._folders.get(partition, self.config.data_dir)
        examples = data.load(self.task, folder, split, self.config.holdout)
        return examples if self._folders else examples.select(self._shares(split)[partition])

    @functools.lru_cache(maxsize=2)  # noqa: B019  # there is one workplace at a time
    def _shares(self, split: str) -> list[Any]:
        c = self.config
        examples = data.load(self.task, c.data_dir, split, c.holdout)
        if split == "train" or c.partition == "iid":
            return data.partition(examples, self.task, self._partitions, c.partition, c.dirichlet_alpha, c.draw)
        train = data.load(self.task, c.data_dir, "train", c.holdout)
        return data.following(self._shares("train"), train, examples, self.task, c.draw)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def check(self, split: str, partitions: tuple[int, ...]) -> None:
        """See that the partitions' rows can be trained on, or judged by. Raises :class:`ConfigError`."""
        for folder in dict.fromkeys(self._folders.values()) or (self.config.data_dir,):
            data.check(self.task, folder, split, self.config.holdout, self.model.tokenizer)
        for partition in partitions:
            evaluation.trial(self.model, self.share(split, partition), self.task, self.config, split)

    def _load(self) -> model.LoadedModel:
        return model.of_run(self.config, self.task)

    def take(self, content: RecordDict, instructions: Instructions) -> None:
        """Keep what a message brings and advance to the version that it names. Raises :class:`NeedSync`."""
        schema = self.method.entry.travelling
        for name, record in content.array_records.items():
            kind, _, number = name.partition("-")
            if kind == "weights":
                arrays = wire.unpack(record, self.method.weights)
                parts = {name: [values] for name, values in arrays.items()}
                self.store.put_weights(int(number), instructions.stamp, parts)
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

    def train(self, partitions: Sequence[int], instructions: Instructions) -> Iterator[Reply]:
        """Train on the partitions' shares, as many in one pass as ``batch-clients`` says; each reply has an update."""
        rest = list(partitions)
        while len(rest) > 1 and self.at_once > 1:
            some, replies = rest[: self.at_once], []
            try:
                replies = self._train_together(some, instructions)
            except Unstackable as reason:
                logger.info("Clients train one after another: %s", reason)
                self.at_once = 1
            except (torch.OutOfMemoryError, MemoryError):
                self.at_once = len(some) // 2
                logger.warning("%d clients do not fit into memory: %d at once from now on", len(some), self.at_once)
                release(device(self.config.device))
            except Exception as error:  # of one of them, which alone must pay for it
                logger.warning("A pass of %d clients failed (%s); they train one after another", len(some), error)
                replies = list(_one_by_one(some, lambda partition: self._train(partition, instructions)))
            yield from replies
            rest = rest[len(replies) :]
        yield from _one_by_one(rest, lambda partition: self._train(partition, instructions))

    def _train(self, partition: int, instructions: Instructions) -> RecordDict:
        started, used = time.monotonic(), device(self.config.device)
        reset_peak(used)
        rng, batches = self._batches(partition, instructions)
        start = self.replica.local.state() if self.transforms else {}
        with self.replica.lend() as local:
            local.adopt(self._own(partition, instructions.round))
            with local.session(self._asked(partition, instructions), rng) as session:
                loss = loop.train(local.module, batches, session, self.config, rng)
                arrays = session.update()
        seconds = time.monotonic() - started
        return self._trained(partition, instructions, arrays, start, loss, seconds, peak_bytes(used))

    def _train_together(self, partitions: Sequence[int], instructions: Instructions) -> list[Reply]:
        c, group = self.config, Group(len(partitions))
        started, used = time.monotonic(), device(c.device)
        reset_peak(used)
        rngs, batches = zip(*(self._batches(partition, instructions) for partition in partitions), strict=True)
        start = self.replica.local.state() if self.transforms else {}
        updates: list[tuple[float, dict[str, np.ndarray]] | Exception] = []
        local = self.replica.computing()  # as it is: a pass trains stacks beside it
        with local.stacked(group) as (halves, stacks), ExitStack() as sessions:
            of_each = []
            for partition, half, rng in zip(partitions, halves, rngs, strict=True):
                half.adopt(self._own(partition, instructions.round))
                of_each.append(sessions.enter_context(half.session(self._asked(partition, instructions), rng)))
            padding = data.padding(self.task, self.model.tokenizer)
            losses = together.train(local.module, batches, of_each, group, stacks, c, rngs, padding)
            for own, session in zip(losses, of_each, strict=True):
                try:
                    updates.append((loop.mean_loss(own, c), session.update()))
                except Exception as error:
                    updates.append(error)
        seconds, peak = (time.monotonic() - started) / len(partitions), peak_bytes(used)
        replies: list[Reply] = []
        for partition, update in zip(partitions, updates, strict=True):
            if isinstance(update, Exception):
                replies.append((partition, update))
                continue
            loss, arrays = update
            replies.append((partition, self._trained(partition, instructions, arrays, start, loss, seconds, peak)))
        return replies

    def _batches(
        self, partition: int, instructions: Instructions
    ) -> tuple[np.random.Generator, Iterator[dict[str, torch.Tensor]]]:
        """A client's generator in this round, and the batches that it draws."""
        c, rng = self.config, stream(self.config.seed, "client", instructions.round, partition)
        examples = self.share("train", partition)
        return rng, data.batches(examples, self.task, self.model.tokenizer, c.batch_size, c.max_length, rng)

    def _trained(
        self,
        partition: int,
        instructions: Instructions,
        arrays: dict[str, np.ndarray],
        start: Arrays,
        loss: float,
        seconds: float,
        peak: int,
    ) -> RecordDict:
        """The reply with an update, once what of it is the partition's own is on this node's disk."""
        if own := {name: arrays.pop(name) for name in self.method.reply.named("personal")}:
            self.store.put_personal(partition, instructions.round, own)
        if own := {name: arrays.pop(name) for name in self.method.reply.named("memory")}:
            self.store.put_memory(partition, instructions.round, own)
        update = self._encoded(arrays, start, stream(self.config.seed, "reply", instructions.round, partition))
        figures = Figures(len(self.share("train", partition)), loss, seconds, peak)
        return protocol.trained(Status(instructions.version), update, figures)

    def _own(self, partition: int, round: int) -> Arrays:
        """What a partition keeps to itself, as it was before ``round``."""
        return {**self.store.personal(partition, before=round), **self.store.memory(partition, round)}

    @staticmethod
    def _asked(partition: int, instructions: Instructions) -> dict[str, Any]:
        """What a method tells one of its clients."""
        return {**instructions.method, "partition": partition}

    def _encoded(self, arrays: Arrays, start: Arrays, rounding: np.random.Generator) -> ArrayRecord:
        for transform in self.transforms:
            arrays = transform.update(arrays, start)
        return wire.pack(wire.encode(arrays, self.method.reply, rounding))

    def evaluate(self, partitions: Sequence[int], instructions: Instructions) -> Iterator[Reply]:
        """Judge the model, with each partition's own part of it, on that one's share of the validation rows."""
        return _one_by_one(partitions, lambda partition: self._evaluate(partition, instructions))

    def _evaluate(self, partition: int, instructions: Instructions) -> RecordDict:
        examples = self.share("validation", partition)
        if own := self.store.personal(partition):
            with self.replica.lend() as local:
                local.adopt(own)
                sums = evaluation.tally(local, examples, self.task, self.model.tokenizer)
        else:
            sums = evaluation.tally(self.replica.computing(), examples, self.task, self.model.tokenizer)
        return RecordDict({"status": Status(instructions.version).record(), TALLY: wire.pack({"tally": sums})})


def _difference(task: data.Task, other: data.Task) -> str:
    """The first field in which two tasks differ, with both values."""
    name = next(name for name in vars(task) if getattr(task, name) != getattr(other, name))
    return f"{name}: {getattr(task, name)!r}, not {getattr(other, name)!r}"


@functools.lru_cache(maxsize=1)
def workplace(run: str, config: Config, partitions: int, folders: tuple[tuple[int, str], ...] = ()) -> Workplace:
    return Workplace(run, config, partitions, folders)


def identity(node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """The ids of a node's partitions, ascending, and how many the federation has. Raises ConfigError where they are not
    set or cannot be.

    Node j of N holds ``clients-per-node`` = C of N·C, from C·j on; or those that its own node config names.
    """
    if not isinstance(share := node_config.get("share-errors", False), bool):
        raise ConfigError(f"share-errors = {share!r} is neither true nor false; write it without quotes.")
    if "num-partitions" not in node_config or not ("partition-id" in node_config or "partitions" in node_config):
        raise ConfigError(
            "this node has no partition-id (or partitions='0-4') and num-partitions; set them in the SuperNode's "
            "--node-config."
        )
    total = int(node_config["num-partitions"])
    if "partitions" in node_config:
        text = str(node_config["partitions"])
        if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
            raise ConfigError(f"partitions = {text!r} is no list of partition ids; write for instance '0-4' or '0,3'.")
        pairs = [(int(first), int(last or first)) for first, _, last in (p.partition("-") for p in text.split(","))]
        ids = sorted(id for first, last in pairs for id in range(first, min(last, total) + 1))
        if len(set(ids)) < len(ids) or any(last < first for first, last in pairs):
            raise ConfigError(f"partitions = {text!r} names a partition twice or none; write for instance '0-4'.")
        held = tuple(ids)
    else:
        each, node = int(run_config.get("clients-per-node", 1)), int(node_config["partition-id"])
        held, total = tuple(range(each * node, each * (node + 1))), each * total
    if not 0 <= held[-1] < total:
        raise ConfigError(f"partition {held[-1]} is not below the federation's {total} (num-partitions).")
    return held, total


def workplace_of(context: Any, run: str, held: tuple[int, ...], total: int) -> Workplace:
    """That of a node with its :func:`identity`. A ``data-dir`` of its own wins over the run's, and is its own share as
    a whole."""
    config = hub.at(parse(context.run_config), NodeStore(run).commits())
    threads.hold(config.torch_threads)
    if "data-dir" not in context.node_config:
        return workplace(run, config, total)
    folder = str(context.node_config["data-dir"])
    if len(held) > 1 and "{partition}" not in folder:
        raise ConfigError(
            f"this node holds {len(held)} partitions and one data-dir = {folder!r}; write {{partition}} into it where "
            "the folders of the partitions differ."
        )
    folders = tuple((partition, folder.replace("{partition}", str(partition))) for partition in held)
    return workplace(run, replace(config, data_dir=folders[0][1]), total, folders)


def join(message: Message, context: Any) -> Answer:
    """Say who this node is and what it holds, once its settings, data and model are known to be good."""
    asked, answer = Question.read(message.content), Answer()
    try:
        held, total = identity(context.node_config, context.run_config)
        answer = Answer(held, total)
        NodeStore(asked.run).pin(asked.commits)
        place = workplace_of(context, asked.run, held, total)
        place.check("train", held)
        if place.config.evaluate == "clients":
            try:
                place.check("validation", held)
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
        return replace(answer, error=shown_to_server(error, context.node_config))


def leave(message: Message, context: Any) -> None:
    """Remove this run's files: it is over."""
    run = str(message.content.config_records["leave"]["run"])
    if released := NodeStore(run).clear():
        logger.info("What partitions keep of the model to themselves is in %s", released)


def up_to_date(
    message: Message, context: Any, work: Callable[[Workplace, Sequence[int], Instructions], Iterator[Reply]]
) -> RecordDict:
    """Bring W to the version that a train or evaluate message names and do the ``work`` of its partitions there; or ask
    to be brought up to date."""
    instructions = Instructions.read(message.content, message.metadata.message_type)
    held, total = identity(context.node_config, context.run_config)
    place = workplace_of(context, instructions.run, held, total)
    partitions = instructions.partitions or held
    if strangers := set(partitions) - set(held):
        raise Refused(f"this node does not hold partition {min(strangers)}")
    if instructions.afresh and place.store.version >= 0:  # the server has found that these files are not its run's
        place.forget()
        place = workplace_of(context, instructions.run, held, total)
    try:
        place.take(message.content, instructions)
    except NeedSync:
        return RecordDict({"status": Status(place.replica.version, need_sync=True).record()})
    replies = {}
    for partition, reply in work(place, partitions, instructions):
        if isinstance(reply, Exception):
            if len(partitions) == 1:
                raise reply
            logger.error("partition %d failed", partition, exc_info=reply)
            reply = protocol.failed(shown_to_server(reply, context.node_config))
        replies[partition] = reply
    return protocol.together(replies)


def _one_by_one(partitions: Sequence[int], work: Callable[[int], RecordDict]) -> Iterator[Reply]:
    for partition in partitions:
        try:
            yield partition, work(partition)
        except Exception as error:
            yield partition, error
