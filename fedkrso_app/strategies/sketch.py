"""Train in full, project afterwards: Ferret (arXiv:2409.06277), and SEPARATE (OpenReview:8HuLgtjqOD, ICLR
2025) done federated.

    Server, round t                                Client n
    a root seed                             ->     AdamW on the whole weights: Δ_n = W_n − W^t, per layer
                                                   Ferret:   γ_k = c ⟨Δ_n, z_k⟩ along K directions, some of them
                                                   SEPARATE: U = Δ_n + E_n; B = U Qᵀ; E_n ← (1−β) E_n + β (U − B Q)
    the mean of all γ, or of all B          <-     send γ or B, and the head
    W^{t+1} = W^t + Σ_k γ̄_k z_k, or W^t + B̄ Q

FedKRSO projects inside every step and adapts there; these say what that is worth at the same bytes.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkrso_app.config import Settings, choice, need, need_positive
from fedkrso_app.core.directions import move, seeds_of
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.core.projection import beside, layer_key, philox
from fedkrso_app.core.sketch import coefficients, rows, shares
from fedkrso_app.core.subspace import matrix
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Local, Means, Method
from fedkrso_app.training.loop import Session, head_optimizer

_SCALE = np.float32(2**14)  # coefficients are averaged on a grid of 1.5e-11, which is coarse for 1e-6


@dataclass(frozen=True)
class FerretSettings(Settings):
    table = "ferret"
    learning_rate: float
    directions: int  # K, of each layer
    rank: int
    scale: str

    def __post_init__(self) -> None:
        need_positive("ferret.learning-rate", self.learning_rate)
        need(2 <= self.directions <= 65535, "ferret.directions", self.directions, "between 2 and 65535")
        need(self.rank >= 1, "ferret.rank", self.rank, "at least 1")
        choice("ferret.scale", self.scale, ["contractive", "unbiased"])


@dataclass(frozen=True)
class SeparateSettings(Settings):
    table = "separate"
    learning_rate: float
    rank: int  # R
    feedback: float  # β

    def __post_init__(self) -> None:
        need_positive("separate.learning-rate", self.learning_rate)
        need(self.rank >= 1, "separate.rank", self.rank, "at least 1")
        need(0 <= self.feedback <= 1, "separate.feedback", self.feedback, "between 0 (none) and 1")


class SketchLocal(Local):
    """Client half: AdamW on the weights of the target layers (without decay) and on the head."""

    dense = True

    def state(self) -> dict[str, np.ndarray]:
        return {"head": flatten(self.head.values())}

    def apply(self, arrays: Arrays) -> None:
        if "root" in arrays:
            self.add(int(arrays["root"][0]), arrays)
        if "head" in arrays:
            unflatten(arrays["head"], self.head.values())

    @abstractmethod
    def add(self, root: int, arrays: Arrays) -> None:
        """Move the layers by what an entry holds of the mean update."""

    @abstractmethod
    def projected(
        self, root: int, updates: Mapping[str, Tensor], choices: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """The arrays that are left of ``updates`` (target -> Δ, m × n)."""

    @abstractmethod
    def rate(self) -> float:
        """The learning rate."""

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        choices = beside(rng)
        before = {name: matrix(layer).clone() for name, layer in self.targets.items()}

        def update() -> dict[str, np.ndarray]:
            updates = {name: matrix(layer) - before[name] for name, layer in self.targets.items()}
            root = int(np.frombuffer(instructions["root"], "<u8")[0])
            return {**self.projected(root, updates, choices), "head": flatten(self.head.values())}

        adamw = torch.optim.AdamW(self.weights(), lr=self.rate(), weight_decay=0.0)
        yield Session([adamw, head_optimizer(self.head, self.rate())], update)

    def weights(self) -> list[nn.Parameter]:
        return [layer.get_parameter("weight") for layer in self.targets.values()]

    def optimized(self) -> list[nn.Parameter]:
        return [*self.weights(), *self.head.values()]


class FerretLocal(SketchLocal):
    """Client half: coefficients along K directions per layer, more of them where the update is long."""

    def rate(self) -> float:
        return self.config.of(FerretSettings).learning_rate

    def add(self, root: int, arrays: Arrays) -> None:
        settings = self.config.of(FerretSettings)
        seeds = seeds_of(root, settings.directions)
        for (name, layer), table in zip(
            self.targets.items(), arrays["table"].reshape(-1, settings.directions), strict=True
        ):
            used = np.flatnonzero(table).tolist()
            move(matrix(layer), [seeds[k] for k in used], table[used].tolist(), name, settings.rank)

    def projected(
        self, root: int, updates: Mapping[str, Tensor], choices: np.random.Generator
    ) -> dict[str, np.ndarray]:
        settings = self.config.of(FerretSettings)
        K, seeds = settings.directions, seeds_of(root, settings.directions)
        counts = shares([float(torch.linalg.vector_norm(delta)) for delta in updates.values()], K)
        chosen = [np.sort(choices.choice(K, size=count, replace=False)) for count in counts]
        values = [
            coefficients(delta, [seeds[k] for k in of_layer.tolist()], name, settings.rank, settings.scale)
            for (name, delta), of_layer in zip(updates.items(), chosen, strict=True)
        ]
        return {
            "counts": np.array(counts, np.uint16),
            "indices": np.concatenate(chosen).astype(np.uint16),
            "scalars": flatten(values),
        }


class SeparateLocal(SketchLocal):
    """Client half: the update and what earlier rounds left out, onto R orthonormal rows per layer."""

    residual: np.ndarray | None = None  # E of the partition at work; None: zero

    def rate(self) -> float:
        return self.config.of(SeparateSettings).learning_rate

    def adopt(self, own: Arrays) -> None:
        self.residual = own.get("residual")

    def add(self, root: int, arrays: Arrays) -> None:
        sizes = [len(matrix(layer)) * self.config.of(SeparateSettings).rank for layer in self.targets.values()]
        parts = torch.from_numpy(np.array(arrays["rows"])).split(sizes)
        with torch.no_grad():
            for (name, layer), B in zip(self.targets.items(), parts, strict=True):
                W = matrix(layer)
                W.addmm_(B.view(len(W), -1).to(W), self.rows_of(root, name, W))

    def rows_of(self, root: int, name: str, W: Tensor) -> Tensor:
        return rows(root, name, self.config.of(SeparateSettings).rank, W.shape[1]).to(W)

    def projected(
        self, root: int, updates: Mapping[str, Tensor], choices: np.random.Generator
    ) -> dict[str, np.ndarray]:
        beta = self.config.of(SeparateSettings).feedback
        sizes = [delta.numel() for delta in updates.values()]
        kept = [None] * len(sizes) if self.residual is None else torch.from_numpy(self.residual.copy()).split(sizes)
        sent, left = [], []
        for (name, delta), flat in zip(updates.items(), kept, strict=True):
            E = torch.zeros_like(delta) if flat is None else flat.view_as(delta).to(delta)
            U, Q = delta + E, self.rows_of(root, name, delta)
            sent.append(U @ Q.T)
            left.append((1 - beta) * E + beta * (U - sent[-1] @ Q))
        return {"rows": flatten(sent), **({"residual": flatten(left)} if beta else {})}


class Sketch(Method):
    """Server half: the mean of the coefficients."""

    @property
    def weights_sizes(self) -> tuple[int, int]:
        return self.shapes.weights, self.shapes.head

    def root(self, round: int) -> np.ndarray:
        return philox(self.config.seed, layer_key(f"sketch/{round}")).random_raw(1)

    def instructions(self, round: int) -> dict[str, Any]:
        return {"root": self.root(round).astype("<u8").tobytes()}


class Ferret(Sketch):
    """Server half of Ferret: a direction that a client did not choose counts as zero."""

    half = FerretLocal
    settings = (FerretSettings,)
    arxiv = "2409.06277"
    learning_rate_key = "ferret.learning-rate"
    rank_key = "ferret.rank"

    @property
    def table(self) -> tuple[int, int]:
        """Layers and directions of each."""
        return len(self.shapes.targets), self.config.of(FerretSettings).directions

    @property
    def reply(self) -> Schema:
        layers, K = self.table
        fields = {
            "counts": Field("uint16", (layers,), "key"),
            "indices": Field("uint16", ("s",), "key"),
            "scalars": Field(self.config.wire_dtype, ("s",)),
            "head": self.head_field(),
        }
        return Schema(fields, limits={"s": layers * K})

    @property
    def entry(self) -> Schema:
        layers, K = self.table
        table = Field(self.config.wire_dtype, (layers * K,))
        return Schema({"root": Field("uint64", (1,), "key"), "table": table, "head": self.head_field()})

    def paper_bytes(self) -> int:
        layers, K = self.table
        return 8 * (layers * K + self.shapes.head)

    def expected(self, clients: int) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]:
        """As many as can be: how long the updates of the layers are shows only in training."""
        return {"s": self.reply.limits["s"]}, {}, {}

    def check(self, arrays: Arrays, round: int) -> None:
        K = self.table[1]
        counts, indices = arrays["counts"].astype(np.int64), arrays["indices"]
        if counts.sum() != len(indices):
            raise Refused(f"{len(indices)} coefficients, of which its counts name {counts.sum()}")
        if (indices >= K).any():
            raise Refused(f"direction {int(indices.max())} is not below ferret.directions = {K}")
        if len(set(self.places(arrays))) < len(indices):
            raise Refused("a direction occurs twice in a layer")

    def places(self, arrays: Arrays) -> list[int]:
        """Where each coefficient of a reply belongs in the table, row by row."""
        layers, K = self.table
        return (np.repeat(np.arange(layers), arrays["counts"]) * K + arrays["indices"]).tolist()

    def summands(self, arrays: Arrays) -> Mapping[Any, np.ndarray]:
        scaled = (arrays["scalars"] * _SCALE)[:, None]
        return {**dict(zip(self.places(arrays), scaled, strict=True)), "head": arrays["head"]}

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        layers, K = self.table
        table = [means.mean(place)[0] / _SCALE if place in means else 0.0 for place in range(layers * K)]
        return {"root": self.root(round), "table": np.array(table, np.float32), "head": means.mean("head")}


class Separate(Sketch):
    """Server half of SEPARATE."""

    half = SeparateLocal
    settings = (SeparateSettings,)
    openreview = "8HuLgtjqOD"
    learning_rate_key = "separate.learning-rate"
    rank_key = "separate.rank"

    @property
    def reply(self) -> Schema:
        residual = Field("float32", (self.shapes.weights,), "memory")
        own = {"residual": residual} if self.config.of(SeparateSettings).feedback else {}
        return Schema({"rows": self.rows, "head": self.head_field(), **own})

    @property
    def entry(self) -> Schema:
        return Schema({"root": Field("uint64", (1,), "key"), "rows": self.rows, "head": self.head_field()})

    @property
    def rows(self) -> Field:
        return Field(self.config.wire_dtype, (self.shapes.outputs(self.config.of(SeparateSettings).rank),))

    def paper_bytes(self) -> int:
        return 8 * (self.shapes.outputs(self.config.of(SeparateSettings).rank) + self.shapes.head)

    def client_bytes(self, lengths: Mapping[str, float]) -> int:
        """E, where there is one."""
        return 4 * self.shapes.weights if self.config.of(SeparateSettings).feedback else 0

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        return {"root": self.root(round), **super().conclude(means, round)}
