"""Client-level DP: clips at the clients, noise on the exact sum.

A unit is all the data of one node. Its update, as differences to the start of the round, has a flat L2 norm of at most
``privacy.clip``: a node that is asked for k partitions gives each of them a k-th. With ``clients-per-node`` above 1
nodes simulate clients, and each partition is a unit of its own.

The server clips again, in integers, so that the bound holds whatever arrived, adds one Gaussian to every number that
the round can have, drawn by somebody or not, and divides by the number of replies. What follows is post-processing.

Under masks the server sees no sum without noise: each node adds a share of it (:func:`add_share`) before it seals.
"""

import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core import noise
from fedkrso_app.core.accounting import shown
from fedkrso_app.core.fixed_point import FixedPointMeans
from fedkrso_app.core.noise import NoiseStream
from fedkrso_app.federation.aggregate import Aggregate
from fedkrso_app.federation.nodes import Nodes, sampled
from fedkrso_app.federation.spending import Release, Spending
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Method
from fedkrso_app.strategies.privacy import Privacy, noise_over_clip
from fedkrso_app.strategies.secure import SecureSums

logger = logging.getLogger("flwr")

_CHUNK = 1 << 20  # numbers that get their noise at once
_FEW = 100  # clients per round, below which the noise is hardly ever small enough


class Spent(Exception):
    """The coming round would exceed ``privacy.max-epsilon``."""


class Released(Aggregate):
    """The sums of a round that asks these nodes (``asked``: id -> partitions) and gives them these ``instructions``.
    ``pay`` writes the release down."""

    def __init__(
        self,
        method: Method,
        round: int,
        start: Arrays,
        instructions: Mapping[str, Any],
        asked: Mapping[int, Sequence[int]],
        pay: Callable[[], None],
    ) -> None:
        super().__init__(method, round, (), start)
        self.own, self._pay = self.config.of(Privacy), pay
        self._shapes = method.layout(round, instructions)
        self._sums = FixedPointMeans({key: np.zeros(shape, np.int64) for key, shape in self._shapes.items()})
        self._clips = {p: share(self.config, len(some)) for some in asked.values() for p in some}

    def add(self, summands: Mapping[Any, np.ndarray], reply: Arrays, weight: int, partition: int) -> None:
        if strangers := {key for key, x in summands.items() if x.size} - self._shapes.keys():
            raise Refused(f"{next(iter(strangers))!r} is nothing that this round adds up")
        super().add(noise.clipped(summands, self._clips[partition]), reply, weight, partition)

    def open(self, grid: Any, figures: dict[str, Any]) -> None:
        """Pay for the round, then add the noise: whoever is interrupted in between has paid."""
        self._pay()
        stream, deviation = NoiseStream(self._key()), self.own.noise * self.own.clip * 2.0**noise.BITS
        for key in self._shapes:
            _add_noise(self._sums.steps(key).reshape(-1), stream, deviation)  # type: ignore[union-attr]

    def mean(self, key: Hashable) -> np.ndarray:
        """Of what has moved, and of methods that compute with values, the start beside it."""
        return self.moved(key, super().mean(key))

    def _key(self) -> bytes:
        """Of this release alone. It is nowhere but here, so nobody can take the noise off again."""
        return noise.key_for(self.own.randomness, self.config.seed, "client", self.round)


def release_of(
    round: int,
    config: Config,
    asked: Mapping[int, Sequence[int]],
    held: Mapping[int, Sequence[int]],
    spending: Spending,
) -> Release:
    """What a round is about to release that asks these nodes (``asked``: id -> partitions, of those that each one
    ``held``). Raises :class:`Spent`, before anything is sent, where it must not."""
    own, whole = config.of(Privacy), asked if simulated(config) else held
    release = Release(round, own.noise, own.clip, tuple(sorted({p for node in asked for p in whole[node]})))
    if own.max_epsilon and (total := spending.epsilon(release)) > own.max_epsilon:
        raise Spent(f"privacy.max-epsilon = {own.max_epsilon:g} would be exceeded in round {round} ({shown(total)})")
    return release


def add_share(vector: np.ndarray, config: Config, threshold: int, place: int, round: int) -> None:
    """Add to a node's ``vector`` (64-bit words in steps of 2^-36, in place) its share of the noise: any ``threshold``
    of which ``secagg.colluders`` are left out bring the whole. ``place``: of the node among those of the round."""
    own, honest = config.of(Privacy), threshold - config.of(SecureSums).colluders
    key = noise.key_for(own.randomness, config.seed, "share", round, place)
    _add_noise(vector.view("<i8"), NoiseStream(key), own.noise * own.clip * 2.0**noise.BITS / math.sqrt(honest))


def _add_noise(flat: np.ndarray, stream: NoiseStream, deviation: float) -> None:
    for first in range(0, flat.size, _CHUNK):
        part = flat[first : first + _CHUNK]
        part += stream.integers(part.size, deviation)


def simulated(config: Config) -> bool:
    """Whether a node's partitions are clients of their own, and no part of one."""
    return config.clients_per_node > 1


def share(config: Config, partitions: int) -> float:
    """The clip of each partition of a node that is asked for so many."""
    return config.of(Privacy).clip / (1 if simulated(config) else max(1, partitions))


def clipped(arrays: Arrays, clip: float, lost: bool = False) -> dict[str, np.ndarray]:
    """A client's update (differences) within ``clip``; zeros where it is ``lost``, its loss being no number: to say so
    would tell something about its data. Keys stay, since they are drawn without a look at it."""
    moved = {name: x for name, x in arrays.items() if np.issubdtype(x.dtype, np.floating)}
    short = {name: np.zeros_like(x) for name, x in moved.items()} if lost else noise.clipped(moved, clip)
    return {**arrays, **short}


def check_federation(nodes: Nodes, method: Method) -> None:
    """Say how large the noise is. Raises :class:`ConfigError` where δ promises nothing to one of so many."""
    config, own = method.config, method.config.of(Privacy)
    many = nodes.joined if simulated(config) else len(nodes.partitions)
    if own.delta * many >= 1:
        raise ConfigError(
            f"privacy.delta = {own.delta:g} promises nothing to one of {many} clients: it must be below 1/{many}."
        )
    n = min(many, sampled(config.fraction_train, nodes.joined))
    size = sum(math.prod(shape) for shape in method.layout(1, method.turns()[0]).values())
    text = "%d clients per round: the noise of the mean is %.3g times a full update"
    logger.log(logging.WARNING if n < _FEW else logging.INFO, text, n, noise_over_clip(own.noise, size, n))
