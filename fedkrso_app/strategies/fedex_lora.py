"""FedEx-LoRA (arXiv:2410.09432): FedIT's means, and W takes what they miss of the mean of the products.

    Ā = Σ p_n A_n, B̄ = Σ p_n B_n      W ← W + s (Σ p_n B_n A_n − B̄ Ā)

So W + s B̄ Ā moves by the exact mean, and training continues from (Ā, B̄). The residual has rank (c − 1) r and travels as
that many components (:func:`core.products.residual`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkrso_app.config import Settings, need, need_positive
from fedkrso_app.core.products import residual, truncated
from fedkrso_app.records.schema import Schema
from fedkrso_app.strategies.base import Arrays, Means
from fedkrso_app.strategies.factors import MovingLocal, Products
from fedkrso_app.strategies.lora import Lora

_LONGEST = 2**20  # components of a residual: a bound on what a node takes


@dataclass(frozen=True)
class FedExLoRASettings(Settings):
    table = "fedex-lora"
    learning_rate: float
    residual_rank: int

    def __post_init__(self) -> None:
        need_positive("fedex-lora.learning-rate", self.learning_rate)
        rule = "-1 (all of the residual), 0 (nothing) or a rank"
        need(self.residual_rank >= -1, "fedex-lora.residual-rank", self.residual_rank, rule)


class FedExLoRALocal(MovingLocal):
    """Client half: LoRA on a W that entries move."""

    def apply(self, arrays: Arrays) -> None:
        super().apply(arrays)
        if "residual-A" in arrays:
            self.move(arrays["residual-A"], arrays["residual-B"])

    def learning_rate(self) -> float:
        return self.config.of(FedExLoRASettings).learning_rate


class FedExLoRA(Products):
    """Server half: means, which replace the factors, and the residual, which adds to W."""

    half = FedExLoRALocal
    settings = (Lora, FedExLoRASettings)
    ranked = False
    arxiv = "2410.09432"
    learning_rate_key = "fedex-lora.learning-rate"

    @property
    def entry(self) -> Schema:
        added = self.factors(self.config.wire_dtype, "k", "update")
        residuals = {f"residual-{name}": added[name] for name in ("A", "B")}
        return Schema({**super().entry.fields, **residuals}, limits={"k": _LONGEST})

    @property
    def weights_sizes(self) -> tuple[int, int]:
        return self.shapes.weights, self.lora.rank * self.component + self.shapes.head

    def components(self, clients: int) -> int:
        """Those of the residual that ``clients`` replies leave."""
        most, all_of_it = self.config.of(FedExLoRASettings).residual_rank, max(0, clients - 1) * self.lora.rank
        return all_of_it if most < 0 else min(most, all_of_it)

    def expected(self, clients: int) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]:
        return {}, {"k": self.components(clients)}, {}

    def paper_bytes(self) -> int:
        """4 (L + h) up, 4 (cL + h) down."""
        components = 2 * self.lora.rank + self.components(self.replies)
        return 4 * (components * self.component + 2 * self.shapes.head)

    def summands(self, arrays: Arrays) -> Mapping[Any, np.ndarray]:
        return arrays

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        As, Bs = (np.stack([arrays[name] for _, arrays in means.replies]) for name in ("A", "B"))
        A, B = residual(As, Bs, [share for share, _ in means.replies])
        if (most := self.config.of(FedExLoRASettings).residual_rank) >= 0:
            A, B = truncated(A, B, self.sizes, most)
        added = {"residual-A": A.astype(np.float32), "residual-B": B.astype(np.float32)}
        return {**super().conclude(means, round), **added}
