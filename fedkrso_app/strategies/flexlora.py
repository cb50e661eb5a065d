"""FlexLoRA (arXiv:2402.11505): the mean of the products, decomposed to the common rank; clients of any rank.

    W̄ = Σ p_n B_n A_n = U Σ Vᵀ      B = U_R Σ_R, A = V_Rᵀ

Components come by falling singular value, so the first r are W̄'s best approximation of rank r: a client of rank r takes
those. A's rows are orthonormal; W̄'s missing components have B = 0 and can train.
"""

from dataclasses import dataclass

import numpy as np

from fedkrso_app.config import Settings, need_positive
from fedkrso_app.core import lora
from fedkrso_app.core.products import by_component, spectral
from fedkrso_app.strategies.base import Means
from fedkrso_app.strategies.factors import ComponentsLocal, Products
from fedkrso_app.strategies.lora import Lora


@dataclass(frozen=True)
class FlexLoRASettings(Settings):
    table = "flexlora"
    learning_rate: float

    def __post_init__(self) -> None:
        need_positive("flexlora.learning-rate", self.learning_rate)


class FlexLoRALocal(ComponentsLocal):
    """Client half: LoRA at the client's rank."""

    def learning_rate(self) -> float:
        return self.config.of(FlexLoRASettings).learning_rate


class FlexLoRA(Products):
    """Server half: stack, QR, QR, and the decomposition of a small matrix, layer by layer."""

    half = FlexLoRALocal
    settings = (Lora, FlexLoRASettings)
    arxiv = "2402.11505"
    learning_rate_key = "flexlora.learning-rate"

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        R = self.lora.most
        spare = lora.initial_As(self.config.seed, self.shapes.targets, R)
        layers = zip(self.layers(means), spare, strict=True)
        pairs = [spectral(Bs, As, shares, R, rows)[::-1] for (Bs, As, shares), rows in layers]
        A, B = by_component(pairs, R)
        return {"A": A, "B": B, "head": means.mean("head")}
