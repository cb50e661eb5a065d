"""HetLoRA (arXiv:2401.06432): clients of different ranks; factors padded with zeros, weighted by ‖B_n A_n‖, averaged.

A client of rank r takes the first r components. The mean of the factors is biased as FedIT's, and what small clients
lack pulls the other components towards zero. Clients here keep their rank: HetLoRA's pruning of ranks is left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkrso_app.config import Settings, choice, need_positive
from fedkrso_app.core.products import by_layer, squared_norm
from fedkrso_app.strategies.base import Arrays, Means
from fedkrso_app.strategies.factors import ComponentsLocal, Products
from fedkrso_app.strategies.lora import Lora


@dataclass(frozen=True)
class HetLoRASettings(Settings):
    table = "hetlora"
    learning_rate: float
    weights: str

    def __post_init__(self) -> None:
        need_positive("hetlora.learning-rate", self.learning_rate)
        choice("hetlora.weights", self.weights, ["norm", "config"])


class HetLoRALocal(ComponentsLocal):
    """Client half: LoRA at the client's rank."""

    def learning_rate(self) -> float:
        return self.config.of(HetLoRASettings).learning_rate


class HetLoRA(Products):
    """Server half. A client's norm weighs its factors without a bound, so one that sends large ones has its way."""

    half = HetLoRALocal
    settings = (Lora, HetLoRASettings)
    arxiv = "2401.06432"
    learning_rate_key = "hetlora.learning-rate"

    def summands(self, arrays: Arrays) -> Mapping[Any, np.ndarray]:
        return {**{name: self.padded(arrays[name]) for name in ("A", "B")}, "head": arrays["head"]}

    def padded(self, values: np.ndarray) -> np.ndarray:
        return np.pad(values, ((0, self.lora.most - len(values)), (0, 0)))

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        entry = super().conclude(means, round)
        if self.config.of(HetLoRASettings).weights == "config":
            return entry
        weights = np.array([share * self.norm(arrays) for share, arrays in means.replies])
        if not weights.any():  # no B has moved
            return entry
        for name in ("A", "B"):
            parts = [self.padded(arrays[name]) for _, arrays in means.replies]
            weighted = (weight * part.astype(np.float64) for weight, part in zip(weights, parts, strict=True))
            entry[name] = (sum(weighted) / weights.sum()).astype(np.float32)
        return entry

    def norm(self, arrays: Arrays) -> float:
        """‖B_n A_n‖_F over all layers."""
        return math.sqrt(sum(squared_norm(A, B) for A, B in by_layer(arrays["A"], arrays["B"], self.sizes)))
