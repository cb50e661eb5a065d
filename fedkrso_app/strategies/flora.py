"""FLoRA (arXiv:2409.05976): every client trains new factors in every round; their stack moves W.

    A = [p_1 A_1; …; p_c A_c]      B = [B_1 … B_c]      W ← W + s B A = W + s Σ p_n B_n A_n

Exact at any mixture of ranks, but the stack grows with the number of clients. Each client draws a new A from its own
stream in every round, and B starts at 0: short rounds train little but B.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedkrso_app.config import Settings, need, need_positive
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.core.products import truncated
from fedkrso_app.core.subspace import matrix
from fedkrso_app.records.schema import Role, Schema
from fedkrso_app.strategies.base import Arrays, Means
from fedkrso_app.strategies.factors import MovingLocal, Products
from fedkrso_app.strategies.lora import Lora

_LONGEST = 2**20  # components of an entry: a bound on what a node takes


@dataclass(frozen=True)
class FLoRASettings(Settings):
    table = "flora"
    learning_rate: float
    merge_rank: int

    def __post_init__(self) -> None:
        need_positive("flora.learning-rate", self.learning_rate)
        need(self.merge_rank >= 0, "flora.merge-rank", self.merge_rank, "0 (the whole stack) or above")


class FLoRALocal(MovingLocal):
    """Client half: at rest B = 0, so the model is W and the head."""

    def state(self) -> dict[str, np.ndarray]:
        return {"head": flatten(self.head.values())}

    def shared(self) -> list[Tensor]:
        return [matrix(layer) for layer in self.targets.values()] + [head.detach() for head in self.head.values()]

    def apply(self, arrays: Arrays) -> None:
        if "A" in arrays:
            self.move(arrays["A"], arrays["B"])
        if "head" in arrays:
            unflatten(arrays["head"], self.tensors["head"])

    @torch.no_grad()
    def begin(self, rank: int, rng: np.random.Generator) -> None:
        """A Kaiming-uniform (variance 1/(3n)), of this client and round; not from ``rng`` itself."""
        draws = np.random.Generator(rng.bit_generator.jumped(2))  # type: ignore[attr-defined]
        for A, _ in self.pairs:
            bound = A.shape[1] ** -0.5
            A[:rank] = torch.from_numpy(draws.uniform(-bound, bound, (rank, A.shape[1]))).to(A)
            A[rank:] = 0

    def learning_rate(self) -> float:
        return self.config.of(FLoRASettings).learning_rate


class FLoRA(Products):
    """Server half: the stack, or its best approximation of ``merge-rank``."""

    half = FLoRALocal
    settings = (Lora, FLoRASettings)
    arxiv = "2409.05976"
    learning_rate_key = "flora.learning-rate"
    role: ClassVar[Role] = "update"

    @property
    def entry(self) -> Schema:
        return Schema(self.factors(self.config.wire_dtype, "k"), limits={"k": _LONGEST})

    @property
    def weights_sizes(self) -> tuple[int, int]:
        return self.shapes.weights, self.shapes.head

    def stacked(self, clients: int) -> float:
        """Components of an entry that ``clients`` replies make, in the mean."""
        length, most = clients * self.mean_rank, self.config.of(FLoRASettings).merge_rank
        return min(length, most) if most else length

    def expected(self, clients: int) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]:
        return {"k": self.mean_rank}, {"k": self.stacked(clients)}, {}

    def paper_bytes(self) -> int:
        """4 (L + h) up, 4 (cL + h) down."""
        components = self.mean_rank + self.stacked(self.replies)
        return round(4 * (components * self.component + 2 * self.shapes.head))

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        A = np.concatenate([share * arrays["A"] for share, arrays in means.replies]).astype(np.float32)
        B = np.concatenate([arrays["B"] for _, arrays in means.replies])
        if most := self.config.of(FLoRASettings).merge_rank:
            A, B = truncated(A, B, self.sizes, most)
        return {"A": A, "B": B, "head": means.mean("head")}
