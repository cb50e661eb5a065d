"""What a node's process keeps between messages, and its work: training its partitions, and judging.

A node holds one partition or several, each of which is a client of its own: its rows, its stream of random numbers, its
reply.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict

from fedkrso_app import data
from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core.projection import stream
from fedkrso_app.core.stacked import Group, Unstackable
from fedkrso_app.federation import evaluation, released
from fedkrso_app.federation.device_memory import settled
from fedkrso_app.federation.private import ExampleLevel
from fedkrso_app.federation.replica import NeedSync, Replica
from fedkrso_app.federation.store import NodeStore
from fedkrso_app.federation.transforms import transforms
from fedkrso_app.records import protocol, wire
from fedkrso_app.records.history import History
from fedkrso_app.records.ledger import Entry
from fedkrso_app.records.protocol import TALLY, Figures, Instructions, Status
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies import make
from fedkrso_app.strategies.base import Arrays
from fedkrso_app.strategies.privacy import Privacy
from fedkrso_app.strategies.secure import narrow
from fedkrso_app.training import few_bits, graphs, loop, model, static, together
from fedkrso_app.training.device import device, peak_bytes, release, reset_peak
from fedkrso_app.training.shapes import Shapes

logger = logging.getLogger("flwr")


@dataclass(frozen=True)
class Summed:
    """What a partition adds to the sum of its node, where updates leave that under masks."""

    summands: Arrays
    weight: int
    figures: Figures
    rounding: np.random.Generator


Reply = tuple[int, RecordDict | Summed | Exception]  # a partition's, or why there is none


class Workplace:
    """What a process keeps between messages: one warm replica, the task's examples and how they are split.

    ``folders`` (partition id, data-dir) are those of a node with files of its own: each is a partition as a whole.
    """

    def __init__(self, run: str, config: Config, partitions: int, folders: tuple[tuple[int, str], ...] = ()) -> None:
        self._partitions, self._folders = partitions, dict(folders)
        self.task = data.resolve(config)
        config = self.config = settled(config, self.task)
        for partition, folder in folders[1:]:
            if (other := data.resolve(replace(config, data_dir=folder))) != self.task:
                raise ConfigError(
                    f"partition {partition}'s files in {folder} make another task than those in {config.data_dir} "
                    f"({_difference(other, self.task)}); give both the same columns and labels, or set the key labels."
                )
        few_bits.check(config)
        self.model = self._load()
        self.method = make(config, Shapes.of(self.model))
        self.transforms = transforms(self.method)
        self.at_once = together.at_once(config, device(config.device).type)
        self.recorder = graphs.recorder(config)
        span = self.method.entry.span
        self.store = NodeStore(run, keep=span + 1) if span else NodeStore(run)
        by_example = config.of(Privacy).unit == "example"
        self.private = ExampleLevel(self, run, self._folders) if by_example else None
        self.by_client = config.of(Privacy).unit == "client"
        self.at_once = 1 if by_example else self.at_once  # coins, clips and noise are each client's own

    @functools.cached_property
    def replica(self) -> Replica:
        return Replica(self.method.local(self.model), self.store.entries, self.method.entry.span, self.store)

    @functools.cached_property
    def digest(self) -> str:
        """Of W^0: it takes a second for a large model, and only a node that joins is asked for it."""
        return (self._load() if "replica" in self.__dict__ else self.model).digest()

    @functools.lru_cache(maxsize=1024)  # noqa: B019  # the same object each time, which the tokens of its rows go by
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
        history = History(schema, self.store.history()) if self.config.secure_aggregation else None
        for name, record in content.array_records.items():
            kind, _, number = name.partition("-")
            if kind == "weights" and history:
                raise Refused("under masks a node is brought up to date by entries, which all of them can compare")
            if kind == "weights":
                arrays = wire.unpack(record, self.method.weights)
                parts = {name: [values] for name, values in arrays.items()}
                self.store.put_weights(int(number), instructions.stamp, parts)
            else:
                version = int(number)
                expected = schema if version else schema.start
                expected = expected if version == instructions.version else expected.older
                # A server without a model leaves version 0 to the seed: an entry without arrays.
                arrays = wire.unpack(record, expected) if record else {}
                self.store.put(Entry(version, arrays))
                if history:
                    self._follow(history, version, arrays)
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

    def _follow(self, history: History, version: int, arrays: Arrays) -> None:
        """Take note of an entry in the node's ``history``. Raises :class:`NeedSync` where that has a gap."""
        try:
            history.follow(version, arrays)
        except ValueError:
            self.forget()
            raise NeedSync("this node's files do not say what its model was made of") from None
        self.store.put_history(history.record)

    def history(self, version: int) -> str:
        """The digest of all that the model at ``version`` was made of. Raises :class:`NeedSync` if it is not known."""
        history = History(self.method.entry.travelling, self.store.history())
        if history.version != version:
            self.forget()
            raise NeedSync("this node's files do not say what its model was made of")
        return history.digest

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

    def _train(self, partition: int, instructions: Instructions) -> RecordDict | Summed:
        started, used = time.monotonic(), device(self.config.device)
        reset_peak(used)
        rng, batches = self._batches(partition, instructions)
        start = self.replica.local.state() if self.transforms else {}
        with self.replica.lend() as local:
            local.adopt(self._own(partition, instructions.round))
            with local.session(self._asked(partition, instructions), rng) as session:
                loss = epsilon = None
                if self.private:
                    epsilon = self.private.train(partition, instructions.round, local, session, rng)
                elif (losses := self._recorded(local.module, [batches], [session], Group(1), [], [rng])) is None:
                    loss = self._loss(loop.train, local.module, batches, session, self.config, rng)
                else:
                    loss = self._loss(loop.mean_loss, losses[0], self.config)
                arrays = session.update()
        seconds = time.monotonic() - started
        return self._trained(partition, instructions, arrays, start, loss, seconds, peak_bytes(used), epsilon)

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
            losses = self._recorded(local.module, batches, of_each, group, stacks, rngs)
            if losses is None:
                padding = data.padding(self.task, self.model.tokenizer)
                losses = together.train(local.module, batches, of_each, group, stacks, c, rngs, padding)
            for own, session in zip(losses, of_each, strict=True):
                try:
                    updates.append((self._loss(loop.mean_loss, own, c), session.update()))
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

    def _recorded(
        self, module: Any, batches: Any, sessions: Any, group: Group, stacks: Any, rngs: Any
    ) -> torch.Tensor | None:
        """The losses of steps that are recorded and repeated; None, and nothing done, where they are not."""
        given = module, batches, sessions, group, stacks, self.config, rngs, self.task, self.model.tokenizer
        return static.attempt(self.recorder, *given)

    def _loss(self, measure: Callable[..., float], *given: Any) -> float:
        """What ``measure`` finds; NaN for a loss that is not finite where nobody may know that."""
        try:
            return measure(*given)
        except loop.NotFinite as error:
            if not self.by_client:
                raise
            logger.warning("%s; zeros are sent", error)
            return math.nan

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
        loss: float | None,
        seconds: float,
        peak: int,
        epsilon: float | None = None,
    ) -> RecordDict | Summed:
        """The reply with an update, once what of it is the partition's own is on this node's disk."""
        lost = loss is not None and math.isnan(loss)  # then nothing is kept, and zeros are sent
        if (own := {name: arrays.pop(name) for name in self.method.reply.named("personal")}) and not lost:
            self.store.put_personal(partition, instructions.round, own)
        if (own := {name: arrays.pop(name) for name in self.method.reply.named("memory")}) and not lost:
            self.store.put_memory(partition, instructions.round, own)
        rounding = stream(self.config.seed, "reply", instructions.round, partition)
        figures = Figures(len(self.share("train", partition)), loss, seconds, peak, epsilon)
        figures = figures.coarse() if self.private or self.by_client else figures
        for transform in self.transforms:
            arrays = transform.update(arrays, start)
        clip = released.share(self.config, len(instructions.partitions))
        if self.by_client:
            arrays = released.clipped(arrays, clip, lost)
        if self.config.secure_aggregation:
            weight = figures.num_examples if self.config.weighting == "examples" else 1
            return Summed(self._summands(arrays, start, rounding, clip), weight, figures, rounding)
        update = wire.pack(wire.encode(arrays, self.method.reply, rounding))
        return protocol.trained(Status(instructions.version), update, figures)

    def _own(self, partition: int, round: int) -> Arrays:
        """What a partition keeps to itself, as it was before ``round``."""
        return {**self.store.personal(partition, before=round), **self.store.memory(partition, round)}

    def _asked(self, partition: int, instructions: Instructions) -> dict[str, Any]:
        """What a method tells one of its clients, and how a session reads the client's labels."""
        return {**instructions.method, "partition": partition, "labels": functools.partial(self._labels, partition)}

    def _labels(self, partition: int) -> np.ndarray:
        return np.asarray(self.share("train", partition)[self.task.label])

    def _summands(self, arrays: Arrays, start: Arrays, rounding: np.random.Generator, clip: float) -> Arrays:
        """What a server would make of the reply and add up: at 64 bits the same, rounded as the reply would be, and at
        fewer the differences as they are, for those are rounded once."""
        schema = self.method.reply
        if not narrow(self.config):
            arrays = wire.decode(wire.encode(arrays, schema, rounding))
            for transform in reversed(self.transforms) if not self.by_client else ():
                arrays = transform.reply(arrays, start)
        summands = self.method.summands(schema.filled(arrays))
        return released.clipped(summands, clip) if self.by_client else summands

    def evaluate(self, partitions: Sequence[int], instructions: Instructions) -> Iterator[Reply]:
        """Judge the model, with each partition's own part of it, on that one's share of the validation rows."""
        return _one_by_one(partitions, lambda partition: self._evaluate(partition, instructions))

    def _evaluate(self, partition: int, instructions: Instructions) -> RecordDict:
        examples = self.share("validation", partition)
        with self.replica.judged(self.store.personal(partition)) as local:
            sums = evaluation.tally(local, examples, self.task, self.model.tokenizer)
        return RecordDict({"status": Status(instructions.version).record(), TALLY: wire.pack({"tally": sums})})


def _difference(task: data.Task, other: data.Task) -> str:
    """The first field in which two tasks differ, with both values."""
    name = next(name for name in vars(task) if getattr(task, name) != getattr(other, name))
    return f"{name}: {getattr(task, name)!r}, not {getattr(other, name)!r}"


@functools.lru_cache(maxsize=1)
def workplace(run: str, config: Config, partitions: int, folders: tuple[tuple[int, str], ...] = ()) -> Workplace:
    return Workplace(run, config, partitions, folders)


def _one_by_one(partitions: Sequence[int], work: Callable[[int], RecordDict | Summed]) -> Iterator[Reply]:
    for partition in partitions:
        try:
            yield partition, work(partition)
        except Exception as error:
            yield partition, error
