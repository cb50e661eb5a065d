"""FedMeZO (arXiv:2402.05926): FedIT whose factors are trained by zeroth-order steps, from losses alone.

The directions are each client's own, since the factors themselves travel. While B = 0 the loss does not depend on A,
and a step of A would be noise: the first round moves B alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkrso_app.config import Config, Settings, need_positive
from fedkrso_app.core.projection import beside
from fedkrso_app.core.zeroth import ZerothOrder
from fedkrso_app.records.schema import Schema
from fedkrso_app.strategies.fedit import FedIT, FedITLocal
from fedkrso_app.strategies.lora import Lora
from fedkrso_app.strategies.scalar import Zeroth
from fedkrso_app.training.loop import Session, head_optimizer
from fedkrso_app.training.model import LoadedModel


@dataclass(frozen=True)
class FedMeZOSettings(Settings):
    table = "fedmezo"
    learning_rate: float

    def __post_init__(self) -> None:
        need_positive("fedmezo.learning-rate", self.learning_rate)


class FedMeZOLocal(FedITLocal):
    """Client half: one direction per step, over the factors (and the head, if it is trained alike)."""

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        super().__init__(loaded, config)
        if config.of(Zeroth).head == "frozen":
            del self.tensors["head"]

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        zeroth, rate = self.config.of(Zeroth), self.config.of(FedMeZOSettings).learning_rate
        choices = beside(rng)
        names = ["A", "B"] if any(B.any() for B in self.tensors["B"] if not B.is_meta) else ["B"]
        names += ["head"] if zeroth.head == "zeroth" else []
        moved = {f"{name}/{i}": tensor.detach() for name in names for i, tensor in enumerate(self.tensors[name])}
        draw = lambda j: [int(choices.integers(2**64, dtype=np.uint64))]  # noqa: E731
        steps = ZerothOrder({}, moved, rate, zeroth.epsilon, zeroth.drawn_rank, draw)
        first = [head_optimizer(self.head, zeroth.head_learning_rate)] if zeroth.sends_head else []
        yield Session([*first, steps], self.state, from_losses=True)


class FedMeZO(FedIT):
    """Server half: that of FedIT; a head that is frozen stays at home."""

    half = FedMeZOLocal
    settings = (Lora, Zeroth, FedMeZOSettings)
    arxiv = "2402.05926"
    learning_rate_key = "fedmezo.learning-rate"
    zeroth_order = True

    def _schema(self, dtype: str) -> Schema:
        whole = super()._schema(dtype)
        return whole if self.config.of(Zeroth).head != "frozen" else whole.only(self.half.factors)
