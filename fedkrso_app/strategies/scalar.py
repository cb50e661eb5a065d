"""What zeroth-order methods share: settings, what is moved along directions, and a head that may have gradients.

Entries hold scalars and say, in a few bytes, which directions they belong to. A node draws those again, so that every
copy of the model moves by the same bits; the next scalar is measured there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedkrso_app.config import Config, ConfigError, Settings, choice, need, need_positive
from fedkrso_app.core.directions import move, move_vector
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.core.subspace import matrix
from fedkrso_app.core.zeroth import ZerothOrder
from fedkrso_app.records.schema import Field
from fedkrso_app.strategies.base import Arrays, Local, Method
from fedkrso_app.training.loop import head_optimizer
from fedkrso_app.training.model import LoadedModel

SCALE = np.float32(2**14)  # scalars are averaged on a grid of 1.5e-11, which is coarse for 1e-6


@dataclass(frozen=True)
class Zeroth(Settings):
    """Zeroth-order steps, and what becomes of the head beside them."""

    table = "zeroth"
    epsilon: float
    directions: str
    rank: int  # of one direction of a layer
    head: str
    head_learning_rate: float

    def __post_init__(self) -> None:
        need_positive("zeroth.epsilon", self.epsilon)
        choice("zeroth.directions", self.directions, ["low-rank", "dense"])
        need(self.rank >= 1, "zeroth.rank", self.rank, "at least 1")
        choice("zeroth.head", self.head, ["first-order", "zeroth", "frozen"])
        need_positive("zeroth.head-learning-rate", self.head_learning_rate)

    @property
    def drawn_rank(self) -> int:
        """That of :mod:`core.directions`, where 0 stands for dense directions."""
        return self.rank if self.directions == "low-rank" else 0

    @property
    def sends_head(self) -> bool:
        return self.head == "first-order"


class ScalarLocal(Local):
    """Client half: ``layers`` are moved along low-rank directions, ``others`` (no matrices) along dense ones."""

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        super().__init__(loaded, config)
        self.zeroth = config.of(Zeroth)
        self.layers: Mapping[str, nn.Module] = self.targets
        self.others: dict[str, nn.Parameter] = dict(self.head) if self.zeroth.head == "zeroth" else {}

    def state(self) -> dict[str, np.ndarray]:
        return {"head": flatten(self.head.values())} if self.zeroth.sends_head else {}

    def move(self, seeds: Sequence[int], scalars: Sequence[float]) -> None:
        """Move the model by Σ s_k z_k, in this order."""
        for name in self.layers:
            with self.moving(name) as W:
                move(W, seeds, scalars, name, self.zeroth.drawn_rank)
        for name, other in self.others.items():
            move_vector(other, seeds, scalars, name, self.zeroth.drawn_rank)

    def take_head(self, arrays: Arrays) -> None:
        """Copy the head of an entry, if it has one."""
        if "head" in arrays:
            unflatten(arrays["head"], self.head.values())

    @contextmanager
    def steps(
        self, rate: float, seeds: Callable[[int], Sequence[int]], signs: bool = False
    ) -> Iterator[tuple[ZerothOrder, list[torch.optim.Optimizer]]]:
        """The zeroth-order optimizer of a session, and all of its optimizers: the head's gradient comes first."""
        own, at_rest = self.zeroth, self.config.at_rest
        steps = ZerothOrder(self.layers, self.others, rate, own.epsilon, own.drawn_rank, seeds, signs, at_rest)
        first = [head_optimizer(self.head, own.head_learning_rate)] if own.sends_head else []
        with steps.beside():
            yield steps, [*first, steps]

    def optimized(self) -> list[nn.Parameter]:
        return [*self.others.values(), *(self.head.values() if self.zeroth.sends_head else ())]

    def shared(self) -> list[Tensor]:
        return [matrix(layer) for layer in self.layers.values()] + super().shared()


class ScalarMethod(Method):
    """Server half of the methods whose entries hold scalars."""

    rank_key = "zeroth.rank"
    zeroth_order = True

    @classmethod
    def check_settings(cls, config: Config) -> None:
        if config.of(Zeroth).directions == "dense" and config.at_rest:
            raise ConfigError(
                "zeroth.directions = 'dense' needs compute-dtype = 'float32', compute-weights = 'float' and "
                "weights-at-rest = false: otherwise the steps stay beside the weights, which only low-rank ones can."
            )

    @property
    def zeroth(self) -> Zeroth:
        return self.config.of(Zeroth)

    @property
    def head(self) -> dict[str, Field]:
        """The head's field, where it travels."""
        return {"head": self.head_field()} if self.zeroth.sends_head else {}

    @property
    def weights_sizes(self) -> tuple[int, int]:
        return self.shapes.weights, self.shapes.head if self.zeroth.head != "frozen" else 0

    def paper_head(self) -> int:
        """Bytes of the head, both ways."""
        return 8 * self.shapes.head if self.zeroth.sends_head else 0
