"""FedSVD (arXiv:2505.12805): clients train B alone; the server turns B̄·A into new factors by a decomposition.

    B̄ = Σ p_n B_n      U Σ Vᵀ = B̄ A      B = U Σ, A = Vᵀ

A is common to all clients, so the mean of B is exact. B̄ A has rank r at most, so the new factors have its product. A's
rows turn towards the main directions of the update and become orthonormal, within the span that they began with. The
start is that of FFA-LoRA.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkrso_app.config import Config, Settings, need, need_positive
from fedkrso_app.core import lora
from fedkrso_app.core.flat import flatten
from fedkrso_app.core.products import spectral
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.strategies.base import Arrays, Means
from fedkrso_app.strategies.fedit import FedIT, FedITLocal
from fedkrso_app.strategies.lora import Lora
from fedkrso_app.training.loop import Session
from fedkrso_app.training.model import LoadedModel
from fedkrso_app.training.shapes import Shapes


@dataclass(frozen=True)
class FedSVDSettings(Settings):
    table = "fedsvd"
    learning_rate: float
    period: int

    def __post_init__(self) -> None:
        need_positive("fedsvd.learning-rate", self.learning_rate)
        need(self.period >= 0, "fedsvd.period", self.period, "0 (never) or above")


class FedSVDLocal(FedITLocal):
    """Client half: A and B come with every entry; B and the head are trained."""

    factors = ("B",)

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        super().__init__(loaded, config)
        self.tensors = {"A": [A for A, _ in self.pairs], **self.tensors}

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        optimizers = self.optimizers(self.factors, self.config.of(FedSVDSettings).learning_rate)
        yield Session(optimizers, lambda: {name: flatten(self.tensors[name]) for name in ("B", "head")})


class FedSVD(FedIT):
    """Server half: the mean of B, and its factors anew with A of the newest entry."""

    half = FedSVDLocal
    settings = (Lora, FedSVDSettings)
    from_values = True
    arxiv = "2505.12805"
    learning_rate_key = "fedsvd.learning-rate"

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        rank = config.of(Lora).rank
        self.start = lora.initial_As(config.seed, shapes.targets, rank)
        self.A, self.version = flatten(self.start), 0  # of the newest entry

    @property
    def entry(self) -> Schema:
        A = Field(self.state_dtype(), (self.shapes.inputs(self.config.of(Lora).rank),), "state")
        return Schema({"A": A, **super().entry.fields})

    def paper_bytes(self) -> int:
        """4 (Q + h) up, 4 (L + h) down."""
        rank = self.config.of(Lora).rank
        return 8 * (self.shapes.outputs(rank) + self.shapes.head) + 4 * self.shapes.inputs(rank)

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        entry = {"A": self.A, **super().conclude(means, round)}
        period = self.config.of(FedSVDSettings).period
        if period == 0 or (self.version + 1) % period:
            return entry
        layers = zip(self.matrices("B", entry["B"]), self.matrices("A", self.A), self.start, strict=True)
        pairs = [spectral([B], [A], [1.0], len(A), spare) for B, A, spare in layers]
        return {**entry, "A": flatten(A for _, A in pairs), "B": flatten(B for B, _ in pairs)}

    def observe(self, version: int, arrays: Arrays) -> None:
        self.A, self.version = arrays.get("A", self.A), version
