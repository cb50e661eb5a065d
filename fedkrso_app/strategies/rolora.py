"""RoLoRA (arXiv:2502.01755): clients train B in one round and A in the next; the mean of the products is exact.

    Σ p_n B_n A = (Σ p_n B_n) A   while A is frozen   Σ p_n B A_n = B (Σ p_n A_n)   while B is frozen

Versions decide whose turn it is, so a round that publishes nothing is followed by another of its kind. B comes first:
with B = 0 the gradient of A is zero. The head is trained and averaged in every round.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkrso_app.config import Config, Settings, need_positive
from fedkrso_app.core.flat import flatten
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays
from fedkrso_app.strategies.fedit import FedIT, FedITLocal
from fedkrso_app.strategies.lora import Lora
from fedkrso_app.training.loop import Session
from fedkrso_app.training.shapes import Shapes


@dataclass(frozen=True)
class RoLoRASettings(Settings):
    table = "rolora"
    learning_rate: float
    a_factor: float  # A's learning rate by B's

    def __post_init__(self) -> None:
        need_positive("rolora.learning-rate", self.learning_rate)
        need_positive("rolora.a-factor", self.a_factor)


class RoLoRALocal(FedITLocal):
    """Client half: AdamW on the factor whose turn it is, and on the head."""

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        own, factor = self.config.of(RoLoRASettings), instructions["factor"]
        rate = own.learning_rate * (own.a_factor if factor == "A" else 1)
        names = (factor, "head")
        optimizers = self.optimizers([factor], rate)
        for group in optimizers[1].param_groups:
            group["lr"] = own.learning_rate
        yield Session(optimizers, lambda: {name: flatten(self.tensors[name]) for name in names})


class RoLoRA(FedIT):
    """Server half: the mean of one factor. Entries bring A and B in turn, so the newest two make any node current."""

    half = RoLoRALocal
    settings = (Lora, RoLoRASettings)
    arxiv = "2502.01755"
    learning_rate_key = "rolora.learning-rate"

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.version = 0  # the newest

    @property
    def factor(self) -> str:
        """Whose turn it is."""
        return "A" if self.version % 2 else "B"

    def _schema(self, dtype: str) -> Schema:
        both = super()._schema(dtype).fields
        in_turn = {name: Field(dtype, both[name].shape, "state", optional=True, every=2) for name in ("B", "A")}
        return Schema({**in_turn, "head": self.head_field()})

    def paper_bytes(self) -> int:
        """4 (Q + h) or 4 (A# + h) each way: the mean of both turns."""
        rank = self.config.of(Lora).rank
        return 4 * (self.shapes.outputs(rank) + self.shapes.inputs(rank) + 2 * self.shapes.head)

    def instructions(self, round: int) -> dict[str, Any]:
        return {"factor": self.factor}

    def turns(self) -> Sequence[Mapping[str, Any]]:
        return [{"factor": "B"}, {"factor": "A"}]

    def check(self, arrays: Arrays, round: int) -> None:
        if set(arrays) != {self.factor, "head"}:
            raise Refused(f"it holds {', '.join(sorted(arrays))}, expected {self.factor} and head")

    def layout(self, round: int, instructions: Mapping[str, Any]) -> Mapping[Hashable, tuple[int, ...]]:
        fields = self.reply.fields
        return {name: fields[name].shape for name in (instructions["factor"], "head")}  # type: ignore[misc]

    def observe(self, version: int, arrays: Arrays) -> None:
        self.version = version
