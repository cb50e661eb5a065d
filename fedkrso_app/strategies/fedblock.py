"""Federated block coordinate descent, after FedCyBGD (arXiv:2406.11187): every round trains one transformer block.

    Server, round t                                 Client n
    b_t, the block whose turn it is         ->      AdamW on block b_t and the head, all else frozen
    Δ = Σ_n w_n Δ_n, the mean of the heads  <-      send Δ_n = W_{n,b} − W_b^t, and the head
    W_b^{t+1} = W_b^t + Δ

A cycle gives each block its turn: the first in ascending order, later ones in an order of their own. In the paper one
client at a time trains a block: that is ``fraction-train`` = 1/N.
"""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedkrso_app.config import Config, Settings, choice, need_positive
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.core.projection import stream
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Local, Means, Method
from fedkrso_app.training.loop import Session, head_optimizer
from fedkrso_app.training.model import LoadedModel, find_blocks


@dataclass(frozen=True)
class FedBlockSettings(Settings):
    table = "fedblock"
    learning_rate: float
    order: str

    def __post_init__(self) -> None:
        need_positive("fedblock.learning-rate", self.learning_rate)
        choice("fedblock.order", self.order, ["random", "ascending"])


def block_of(round: int, count: int, seed: int, order: str) -> int:
    """Which of ``count`` blocks is trained in ``round`` 1, 2, …: every one of them once per cycle."""
    cycle, turn = divmod(round - 1, count)
    if order == "ascending" or not cycle:
        return turn
    return int(stream(seed, "blocks", cycle).permutation(count)[turn])


class FedBlockLocal(Local):
    """Client half: AdamW on the parameters of one block, norms and biases included, and on the head."""

    dense = True

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        super().__init__(loaded, config)
        self.blocks = [list(block.values()) for block in find_blocks(loaded).values()]

    def state(self) -> dict[str, np.ndarray]:
        return {"head": flatten(self.head.values())}

    def apply(self, arrays: Arrays) -> None:
        if "block" in arrays:
            block = self.blocks[int(arrays["block"][0])]
            unflatten(flatten(block) + arrays["values"], block)
        if "head" in arrays:
            unflatten(arrays["head"], self.head.values())

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        rate, block = self.config.of(FedBlockSettings).learning_rate, self.blocks[int(instructions["block"])]
        before = [parameter.detach().clone() for parameter in block]

        def update() -> dict[str, np.ndarray]:
            moved = [new.detach() - old for new, old in zip(block, before, strict=True)]
            return {"values": flatten(moved), "head": flatten(self.head.values())}

        yield Session([torch.optim.AdamW(block, lr=rate, weight_decay=0.01), head_optimizer(self.head, rate)], update)

    def optimized(self) -> list[nn.Parameter]:
        return [parameter for block in self.blocks for parameter in block] + list(self.head.values())


class FedBlock(Method):
    """Server half: whose turn it is, and the mean of what clients did to that block."""

    half = FedBlockLocal
    settings = (FedBlockSettings,)
    arxiv = "2406.11187"
    learning_rate_key = "fedblock.learning-rate"

    @property
    def reply(self) -> Schema:
        fields = {"values": Field(self.config.wire_dtype, ("v",)), "head": self.head_field()}
        return Schema(fields, limits={"v": max(self.shapes.blocks)})

    @property
    def entry(self) -> Schema:
        return Schema({"block": Field("uint16", (1,), "key"), **self.reply.fields}, self.reply.limits)

    @property
    def weights_sizes(self) -> tuple[int, int]:
        return 0, sum(self.shapes.blocks) + self.shapes.head

    @property
    def mean_block(self) -> float:
        return sum(self.shapes.blocks) / len(self.shapes.blocks)

    def paper_bytes(self) -> int:
        return round(8 * (self.mean_block + self.shapes.head))

    def expected(self, clients: int) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]:
        return {"v": self.mean_block}, {"v": self.mean_block}, {}

    def block(self, round: int) -> int:
        """b_t."""
        return block_of(round, len(self.shapes.blocks), self.config.seed, self.config.of(FedBlockSettings).order)

    def instructions(self, round: int) -> dict[str, Any]:
        return {"block": self.block(round)}

    def check(self, arrays: Arrays, round: int) -> None:
        size = self.shapes.blocks[self.block(round)]
        if len(arrays["values"]) != size:
            raise Refused(f"{len(arrays['values'])} values for a block of {size}")

    def layout(self, round: int, instructions: Mapping[str, Any]) -> Mapping[Hashable, tuple[int, ...]]:
        return {"values": (self.shapes.blocks[self.block(round)],), "head": (self.shapes.head,)}

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        return {"block": np.array([self.block(round)], np.uint16), **super().conclude(means, round)}
