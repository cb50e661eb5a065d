"""Example-level DP at a node: what a round costs is written down, then the round is trained, then ε is told.

:mod:`training.per_example` has the loop and :mod:`federation.budget` the node's book. The node decides, not the server:
``max-epsilon`` in its node config bounds ε over all runs on its rows (:mod:`federation.policy`).
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedkrso_app.core.accounting import shown
from fedkrso_app.core.noise import NoiseStream, key_for
from fedkrso_app.core.projection import stream
from fedkrso_app.data.batching import batch, lengths
from fedkrso_app.federation import budget
from fedkrso_app.federation.budget import Event
from fedkrso_app.strategies.base import Local
from fedkrso_app.strategies.privacy import Privacy
from fedkrso_app.training import per_example
from fedkrso_app.training.loop import Session
from fedkrso_app.training.per_example import Mechanism

logger = logging.getLogger("flwr")


class ExampleLevel:
    """What a node needs for it; ``place`` is the node's :class:`Workplace`."""

    def __init__(self, place: Any, run: str, folders: Mapping[int, str]) -> None:
        self.place, self.run, self.folders = place, run, folders
        self.config, self.own = place.config, place.config.of(Privacy)
        self.most = 0.0  # the node's bound on ε
        self._digests: dict[int, str] = {}
        self._looked = False  # at the model, which is the same for all partitions

    def check(self, partitions: tuple[int, ...]) -> None:
        """See, before round 1, that each partition may train one round, and that its rows have gradients of their own.

        Raises :class:`ConfigError`.
        """
        for partition in partitions:
            event = self._event(partition, 1)
            budget.check(event, budget.known(self._book(partition)), self.own.delta, self.most, self.own.max_epsilon)
        if self._looked:
            return
        instructions = {**self.place.method.turns()[0], "partition": partitions[0]}
        rng = stream(self.config.seed, "client", 1, partitions[0])
        with self.place.replica.lend() as local, local.session(instructions, rng) as session:
            read = self._reader(partitions[0])
            per_example.check(local.module, read, len(self.place.share("train", partitions[0])), session, self.config)
        self._looked = True

    def train(self, partition: int, round: int, local: Local, session: Session, rng: np.random.Generator) -> float:
        """The steps of ``session``; ε of the run for this partition's rows, as it is told.

        Raises :class:`ConfigError`, before anything is trained, where the node's bound would be exceeded.
        """
        event = self._event(partition, round)
        spent = budget.spend(self._book(partition), event, self.own.delta, self.most, self.own.max_epsilon)
        logger.info("partition %d: epsilon of this run is %s at delta = %g", partition, shown(spent), self.own.delta)
        mechanism = Mechanism(event.rows, self._batch, self.own.clip, self.own.noise, self._stream(partition, round))
        characters = lengths(self.place.share("train", partition), self.place.task)
        read = self._reader(partition)
        per_example.train(local.module, read, session, self.config, rng, mechanism, characters)
        return budget.reported(spent)

    def _book(self, partition: int) -> Path:
        own = bool(self.folders or self.most)
        return budget.book() if own else budget.book_of_run(self.run, partition)

    @property
    def _batch(self) -> int:
        """B."""
        return self.config.batch_size * self.config.gradient_accumulation

    def _event(self, partition: int, round: int) -> Event:
        examples = self.place.share("train", partition)
        if partition not in self._digests:
            self._digests[partition] = budget.digest(examples)
        rows, steps = len(examples), self.config.local_steps
        rate = min(1.0, self._batch / rows)
        facts = {"noise": self.own.noise, "clip": self.own.clip, "rate": rate, "steps": steps}
        return Event(self.run, round, self._digests[partition], self._folder(partition), rows, **facts)

    def _folder(self, partition: int) -> str:
        """Where the rows are, whatever the settings make of them: of data that is not the node's own, with the
        partition."""
        folder = self.folders.get(partition, self.config.data_dir)
        where = str(Path(folder).expanduser().resolve()) if folder else self.config.dataset or self.config.task
        return where if partition in self.folders else f"{where.partition('@')[0]}#{partition}"

    def _stream(self, partition: int, round: int) -> NoiseStream:
        """Coins and noise of one client's round."""
        return NoiseStream(key_for(self.own.randomness, self.config.seed, "example", round, partition))

    def _reader(self, partition: int) -> Any:
        examples, c = self.place.share("train", partition), self.config
        return lambda rows: batch(examples, rows, self.place.task, self.place.model.tokenizer, c.max_length)
