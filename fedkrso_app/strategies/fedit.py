"""FedIT (arXiv:2305.05644): LoRA on the target layers; the means of A, of B and of the head, each by itself.

The mean of B times the mean of A is not the mean of the products: FedIT's average is biased, which is its known price.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedkrso_app.config import Settings
from fedkrso_app.core import lora
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.strategies.base import Arrays, Method
from fedkrso_app.strategies.lora import Lora, LoraLocal
from fedkrso_app.training.loop import Session


class FedITLocal(LoraLocal):
    """Client half: AdamW on the factors (without decay) and on the head."""

    def state(self) -> dict[str, np.ndarray]:
        return self.update()

    def update(self) -> dict[str, np.ndarray]:
        """All that is trained, as it is now."""
        return {name: flatten(tensors) for name, tensors in self.tensors.items()}

    def apply(self, arrays: Arrays) -> None:
        for name, values in arrays.items():
            unflatten(values, self.tensors[name])

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        yield Session(self.optimizers(self.factors, self.learning_rate()), self.update)

    def learning_rate(self) -> float:
        return self.config.of(Lora).learning_rate


class FedIT(Method):
    """Server half: one mean per factor."""

    half = FedITLocal
    settings: ClassVar[tuple[type[Settings], ...]] = (Lora,)
    arxiv = "2305.05644"
    learning_rate_key = "lora.learning-rate"
    rank_key = "lora.rank"

    @property
    def reply(self) -> Schema:
        return self._schema(self.config.wire_dtype)

    @property
    def entry(self) -> Schema:
        return self._schema(self.state_dtype())

    def _schema(self, dtype: str) -> Schema:
        rank = self.config.of(Lora).rank
        sizes = {"A": self.shapes.inputs(rank), "B": self.shapes.outputs(rank)}
        factors = {name: Field(dtype, (sizes[name],), "state") for name in self.half.factors}
        return Schema({**factors, "head": self.head_field()})

    def known_start(self) -> Arrays:
        rank = self.config.of(Lora).rank
        A = lora.initial_As(self.config.seed, self.shapes.targets, rank)
        start = {"A": flatten(A), "B": np.zeros(self.shapes.outputs(rank), np.float32)}
        return {name: start[name] for name in self.half.factors}

    def matrices(self, name: str, values: np.ndarray) -> list[Tensor]:
        """The factor ``name`` of each layer (A: r × n, B: m × r) in an array of the wire, float64."""
        rank = self.config.of(Lora).rank
        shapes = [(rank, n) if name == "A" else (m, rank) for m, n in self.shapes.targets.values()]
        parts = torch.from_numpy(values.astype(np.float64)).split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def paper_bytes(self) -> int:
        return 8 * sum(f.shape[0] for f in self.reply.travelling.fields.values())  # type: ignore[misc]
