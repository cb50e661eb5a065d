"""FR-LoRA (OpenReview:e0rQRMUhs7, ICLR 2025) and FeDeRA (arXiv:2404.18848): LoRA from the principal part of W^0 on.

With (A*, B*) from the largest r singular values of each target's W^0, and s = alpha / r,

    start    W ← W^0 − s B* A*, factors (A*, B*): the model is what it was
    FR-LoRA  every round begins at (A*, B*); W ← W + s (B̄ Ā − B* A*): the rank of what is learned grows with the rounds
    FeDeRA   FedIT from there: the factors continue, W stays

FR-LoRA's factors travel as differences to (A*, B*), which is what they add: small numbers, and 0 moves nothing. Its
(A*, B*) come with ledger entry 0, since no two mathematical libraries agree on an SVD to the bit; without a model on
the server each node computes them, as FeDeRA's nodes always do.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkrso_app.config import Config, Settings, need_positive
from fedkrso_app.core import lora
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.core.subspace import matrix
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.strategies.base import Arrays
from fedkrso_app.strategies.fedit import FedIT, FedITLocal
from fedkrso_app.strategies.lora import Lora
from fedkrso_app.training.loop import Session
from fedkrso_app.training.model import LoadedModel


@dataclass(frozen=True)
class FRLoraSettings(Settings):
    table = "fr-lora"
    learning_rate: float

    def __post_init__(self) -> None:
        need_positive("fr-lora.learning-rate", self.learning_rate)


@dataclass(frozen=True)
class FeDeRASettings(Settings):
    table = "federa"
    learning_rate: float

    def __post_init__(self) -> None:
        need_positive("federa.learning-rate", self.learning_rate)


class PrincipalLocal(FedITLocal):
    """FedIT's client half with a start of its own."""

    @property
    def scale(self) -> float:
        """s."""
        return self.config.of(Lora).alpha / self.config.of(Lora).rank

    def principal(self) -> dict[str, list[Tensor]]:
        """A* and B* of all targets; W must be W^0."""
        rank = self.config.of(Lora).rank
        pairs = [lora.principal(matrix(layer), rank, self.scale) for layer in self.targets.values()]
        return {"A": [A for A, _ in pairs], "B": [B for _, B in pairs]}

    @torch.no_grad()
    def begin(self, start: Mapping[str, Sequence[Tensor]]) -> None:
        """Take (A*, B*) out of W and into the factors. On the meta device there is nothing to compute."""
        if self.tensors["A"][0].is_meta:
            return
        for name, A, B in zip(self.targets, start["A"], start["B"], strict=True):
            with self.moving(name) as W:
                W.addmm_(B.to(W), A.to(W), alpha=-self.scale)
        for name in ("A", "B"):
            for tensor, values in zip(self.tensors[name], start[name], strict=True):
                tensor.copy_(values)


class FeDeRALocal(PrincipalLocal):
    """Client half of FeDeRA: the factors continue from round to round."""

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        super().__init__(loaded, config)
        if not self.tensors["A"][0].is_meta:
            self.begin(self.principal())

    def learning_rate(self) -> float:
        return self.config.of(FeDeRASettings).learning_rate


class FeDeRA(FedIT):
    """Server half: the means of A, of B and of the head."""

    half = FeDeRALocal
    settings = (Lora, FeDeRASettings)
    arxiv = "2404.18848"
    learning_rate_key = "federa.learning-rate"

    def known_start(self) -> Arrays:
        return {}


class FRLoraLocal(PrincipalLocal):
    """Client half of FR-LoRA: W moves, and at rest the factors are (A*, B*)."""

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        super().__init__(loaded, config)
        if config.evaluate != "server" and not self.tensors["A"][0].is_meta:
            self.begin(self.principal())  # else entry 0 brings it

    @property
    def begun(self) -> bool:
        return any(bool(B.any()) for B in self.tensors["B"])

    def state(self) -> dict[str, np.ndarray]:
        start = self.tensors if self.begun else self.principal()
        return {"start-A": flatten(start["A"]), "start-B": flatten(start["B"]), "head": flatten(self.head.values())}

    @torch.no_grad()
    def apply(self, arrays: Arrays) -> None:
        if "start-A" in arrays and not self.begun:
            start = {name: [torch.empty_like(tensor) for tensor in self.tensors[name]] for name in ("A", "B")}
            for name, tensors in start.items():
                unflatten(arrays[f"start-{name}"], tensors)
            self.begin(start)
        if "A" in arrays:
            moves = {name: [torch.empty_like(tensor) for tensor in self.tensors[name]] for name in ("A", "B")}
            for name, tensors in moves.items():
                unflatten(arrays[name], tensors)
            each = (self.targets, self.tensors["A"], self.tensors["B"], moves["A"], moves["B"])
            for name, A, B, dA, dB in zip(*each, strict=True):
                # (B* + dB)(A* + dA) − B* A* = dB (A* + dA) + B* dA
                with self.moving(name) as W:
                    W.addmm_(torch.cat([dB, B], dim=1), torch.cat([A + dA, dA]), alpha=self.scale)
        if "head" in arrays:
            unflatten(arrays["head"], self.head.values())

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        start = {name: [tensor.detach().clone() for tensor in self.tensors[name]] for name in ("A", "B")}

        def update() -> dict[str, np.ndarray]:
            moved = {
                name: flatten(end.detach() - begin for end, begin in zip(self.tensors[name], start[name], strict=True))
                for name in ("A", "B")
            }
            return {**moved, "head": flatten(self.head.values())}

        with super().session(instructions, rng) as session:
            yield replace(session, update=update)

    def shared(self) -> list[Tensor]:
        return [matrix(layer) for layer in self.targets.values()] + super().shared()

    def trained(self) -> list[Tensor]:
        own = [tensor for tensors in self.personal().values() for tensor in tensors]
        return [parameter.detach() for parameter in self.optimized()] + own

    def learning_rate(self) -> float:
        return self.config.of(FRLoraSettings).learning_rate


class FRLora(FedIT):
    """Server half: the means of the differences that A and B have made, and of the head."""

    half = FRLoraLocal
    settings = (Lora, FRLoraSettings)
    arxiv, openreview = "", "e0rQRMUhs7"
    learning_rate_key = "fr-lora.learning-rate"

    def known_start(self) -> Arrays:
        return {}

    @property
    def reply(self) -> Schema:
        fields = self._schema(self.config.wire_dtype).fields
        return Schema({name: f if name == "head" else replace(f, role="update") for name, f in fields.items()})

    @property
    def entry(self) -> Schema:
        fields = self.reply.fields
        start = {f"start-{name}": Field("float32", fields[name].shape, "state", optional=True) for name in ("A", "B")}
        return Schema({**fields, **start})  # entry 0 alone has a start

    @property
    def weights_sizes(self) -> tuple[int, int]:
        factors = sum(self.entry.fields[name].shape[0] for name in ("A", "B"))  # type: ignore[misc]
        return self.shapes.weights, factors + self.shapes.head
