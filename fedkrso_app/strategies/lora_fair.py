"""LoRA-FAIR (arXiv:2411.14961): FedIT, with a correction of the mean of B towards the mean of the products.

    ΔB = argmin ‖Σ p_n B_n A_n − (B̄ + ΔB) Ā‖² + λ ‖ΔB‖²      B = B̄ + ΔB, A = Ā

The paper's measure is a cosine, which leaves ΔB's length open, and its server descends along gradients; this is the
least-squares form, solved exactly (:func:`core.products.ridge`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkrso_app.config import Settings, need, need_positive
from fedkrso_app.core.flat import flatten
from fedkrso_app.core.products import ridge
from fedkrso_app.strategies.base import Arrays, Means
from fedkrso_app.strategies.factors import bounded
from fedkrso_app.strategies.fedit import FedIT, FedITLocal
from fedkrso_app.strategies.lora import Lora


@dataclass(frozen=True)
class LoRAFAIRSettings(Settings):
    table = "lora-fair"
    learning_rate: float
    penalty: float  # λ, by the mean square of A's rows

    def __post_init__(self) -> None:
        need_positive("lora-fair.learning-rate", self.learning_rate)
        need(0 <= self.penalty < float("inf"), "lora-fair.penalty", self.penalty, "a number, 0 or above")


class LoRAFAIRLocal(FedITLocal):
    """Client half: FedIT's."""

    def learning_rate(self) -> float:
        return self.config.of(LoRAFAIRSettings).learning_rate


class LoRAFAIR(FedIT):
    """Server half: FedIT's means, and ΔB layer by layer."""

    half = LoRAFAIRLocal
    settings = (Lora, LoRAFAIRSettings)
    linear = False
    from_values = True
    arxiv = "2411.14961"
    learning_rate_key = "lora-fair.learning-rate"

    def check(self, arrays: Arrays, round: int) -> None:
        bounded(arrays["A"], arrays["B"])

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        entry: Mapping[str, Any] = super().conclude(means, round)
        shares, penalty = [share for share, _ in means.replies], self.config.of(LoRAFAIRSettings).penalty
        Bs, As = (
            zip(*(self.matrices(name, arrays[name]) for _, arrays in means.replies), strict=True) for name in ("B", "A")
        )
        added = [ridge(of_B, of_A, shares, penalty) for of_B, of_A in zip(Bs, As, strict=True)]
        return {**entry, "B": entry["B"] + flatten(added)}
