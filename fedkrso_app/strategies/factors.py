"""What LoRA methods share whose server computes with every client's factors: the layout by component, other ranks.

A and B travel by component (:mod:`core.products`): A is R × Σn, B is R × Σm. A client of a smaller rank trains and
sends the first rows. Components that are zero in both factors have no gradient and stay zero, so one model serves every
rank.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedkrso_app.config import Config, ConfigError, Settings
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.core.products import by_component, by_layer
from fedkrso_app.core.subspace import matrix
from fedkrso_app.records.schema import Field, Role, Schema
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Means, Method
from fedkrso_app.strategies.lora import Lora, LoraLocal
from fedkrso_app.training.loop import Session
from fedkrso_app.training.shapes import Shapes

LARGEST = 1e6  # of a factor's values; sound ones are far below 1


def bounded(*arrays: np.ndarray) -> None:
    """Raise :class:`Refused` where values are so large that products of factors may not be finite."""
    largest = max(float(np.abs(values).max(initial=0.0)) for values in arrays)
    if largest > LARGEST:
        raise Refused(f"values up to {largest:g} are too large: products of factors must stay finite")


class ComponentsLocal(LoraLocal):
    """Client half: AdamW on the factors of the client's rank (without decay) and on the head."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """m and n of every layer."""
        return [(B.shape[0], A.shape[1]) for A, B in self.pairs]

    def state(self) -> dict[str, np.ndarray]:
        return self.components(self.config.of(Lora).most)

    def components(self, rank: int) -> dict[str, np.ndarray]:
        """The first ``rank`` components, and the head."""
        A, B = by_component(self.pairs, rank)
        return {"A": A, "B": B, "head": flatten(self.head.values())}

    @torch.no_grad()
    def apply(self, arrays: Arrays) -> None:
        if "A" in arrays:
            layers = by_layer(arrays["A"], arrays["B"], self.sizes)
            for (A, B), (new_A, new_B) in zip(self.pairs, layers, strict=True):
                A.copy_(new_A)
                B.copy_(new_B)
        if "head" in arrays:
            unflatten(arrays["head"], self.tensors["head"])

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        settings = self.config.of(Lora)
        rank = settings.of(instructions["partition"]) if "partition" in instructions else settings.most
        self.begin(rank, rng)
        yield Session(self.optimizers(self.factors, self.learning_rate()), lambda: self.components(rank))

    @torch.no_grad()
    def begin(self, rank: int, rng: np.random.Generator) -> None:
        """Make the factors those that training begins with: the first ``rank`` components, and zeros."""
        for A, B in self.pairs:
            A[rank:] = 0
            B[:, rank:] = 0

    @abstractmethod
    def learning_rate(self) -> float: ...


class MovingLocal(ComponentsLocal):
    """Client half where entries move W itself by products of factors."""

    def shared(self) -> list[Tensor]:
        return [matrix(layer) for layer in self.targets.values()] + super().shared()

    @torch.no_grad()
    def move(self, A: np.ndarray, B: np.ndarray) -> None:
        """W ← W + (alpha / rank) · B·A in every layer, one product over all components."""
        settings = self.config.of(Lora)
        for name, (A_l, B_l) in zip(self.targets, by_layer(A, B, self.sizes), strict=True):
            with self.moving(name) as W:
                W.addmm_(B_l.to(W), A_l.to(W), alpha=settings.alpha / settings.rank)


class Products(Method):
    """Server half. It keeps a round's replies, and goes through them in the order of the partitions."""

    settings: ClassVar[tuple[type[Settings], ...]] = (Lora,)
    linear = False
    from_values = True
    ranked = True
    rank_key = "lora.rank"
    role: ClassVar[Role] = "state"  # of the factors

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.lora, self.sizes = config.of(Lora), list(shapes.targets.values())
        width = min(min(size) for size in self.sizes)
        if self.lora.most >= width:
            raise ConfigError(
                f"lora.ranks = {self.lora.ranks!r} is impossible: each must be below {width}, the narrowest layer's "
                "width."
            )

    def factors(self, dtype: str, components: int | str, role: Role | None = None) -> dict[str, Field]:
        """The fields of A and B with so many ``components``, and of the head."""
        A = Field(dtype, (components, self.shapes.inputs(1)), role or self.role)
        return {"A": A, "B": replace(A, shape=(components, self.shapes.outputs(1))), "head": self.head_field()}

    @property
    def reply(self) -> Schema:
        components = "k" if self.lora.ranks else self.lora.rank
        return Schema(self.factors(self.config.wire_dtype, components), limits={"k": self.lora.most})

    def reply_of(self, partition: int) -> Schema:
        return Schema(self.factors(self.config.wire_dtype, self.lora.of(partition)))

    @property
    def entry(self) -> Schema:
        return Schema(self.factors(self.state_dtype(), self.lora.most))

    def expected(self, clients: int) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]:
        """The mean rank of the clients up."""
        return {"k": self.mean_rank}, {}, {}

    @property
    def mean_rank(self) -> float:
        return sum(self.lora.each) / len(self.lora.each)

    @property
    def component(self) -> int:
        """Σn + Σm, the size of one component of all layers."""
        return self.shapes.inputs(1) + self.shapes.outputs(1)

    def paper_bytes(self) -> int:
        """4 (L + h) each way, up at the mean rank."""
        return round(4 * ((self.mean_rank + self.lora.most) * self.component + 2 * self.shapes.head))

    def check(self, arrays: Arrays, round: int) -> None:
        bounded(arrays["A"], arrays["B"])

    def summands(self, arrays: Arrays) -> Mapping[Any, np.ndarray]:
        return {"head": arrays["head"]}

    def layers(self, means: Means) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor], list[float]]]:
        """Of each layer every client's B and A, and the shares of the weight."""
        shares = [share for share, _ in means.replies]
        clients = [list(by_layer(arrays["A"], arrays["B"], self.sizes)) for _, arrays in means.replies]
        for pairs in zip(*clients, strict=True):
            yield [B for _, B in pairs], [A for A, _ in pairs], shares
