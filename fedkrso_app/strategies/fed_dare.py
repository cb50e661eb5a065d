"""Fed-DARE: FedIT, of whose updates clients drop most values at random and rescale the rest (DARE, arXiv:2311.03099).

The baseline of that name in FedSRD's comparison (arXiv:2510.04601). A client sends the seed of its mask and the values
that are left of A's and B's changes, divided by 1 − p, which keeps their mean. The head is dense.
"""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkrso_app.config import Config, ConfigError, Settings, need, need_positive
from fedkrso_app.core import srd
from fedkrso_app.core.flat import flatten
from fedkrso_app.core.projection import beside
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.records.wire import Refused
from fedkrso_app.strategies.base import Arrays, Means
from fedkrso_app.strategies.fedit import FedIT, FedITLocal
from fedkrso_app.strategies.lora import Lora
from fedkrso_app.training.loop import Session
from fedkrso_app.training.shapes import Shapes


@dataclass(frozen=True)
class FedDARESettings(Settings):
    table = "fed-dare"
    learning_rate: float
    sparsity: float  # p

    def __post_init__(self) -> None:
        need_positive("fed-dare.learning-rate", self.learning_rate)
        need(0 <= self.sparsity < 1, "fed-dare.sparsity", self.sparsity, "at least 0 and below 1")


class FedDARELocal(FedITLocal):
    """Client half: FedIT's, then the random mask."""

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        own, factors = self.config.of(FedDARESettings), [*self.tensors["A"], *self.tensors["B"]]
        before = [tensor.detach().clone() for tensor in factors]
        seed = beside(rng).integers(2**64, dtype=np.uint64)

        def update() -> dict[str, np.ndarray]:
            moved = flatten(factors) - flatten(before)
            kept = srd.dare_mask(moved.shape, own.sparsity, srd.dare_rng(int(seed)))
            values = moved[kept] / np.float32(1 - own.sparsity)
            return {"mask": np.array([seed]), "values": values, "head": flatten(self.head.values())}

        yield Session(self.optimizers(self.factors, own.learning_rate), update)


class FedDARE(FedIT):
    """Server half: the mean of the sparse updates, added to the factors of the newest entry."""

    half = FedDARELocal
    settings = (Lora, FedDARESettings)
    from_values = True
    arxiv = "2510.04601"
    learning_rate_key = "fed-dare.learning-rate"

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.own = config.of(FedDARESettings)
        self.factors = dict(self.known_start())  # of the newest entry

    @classmethod
    def check_settings(cls, config: Config) -> None:
        if config.aggregation != "mean":
            raise ConfigError(
                f"aggregation = {config.aggregation!r} does not go with fed-dare, whose clients send zeros for most "
                "values: set it to 'mean'."
            )
        if config.secure_aggregation:
            raise ConfigError(
                "secure-aggregation does not work with strategy = 'fed-dare': of a value that one client alone keeps, "
                "the sum is that client's."
            )

    @property
    def size(self) -> int:
        """L."""
        return sum(values.size for values in self.factors.values())

    @property
    def reply(self) -> Schema:
        fields = {
            "mask": Field("uint64", (1,), "key"),
            "values": Field(self.config.wire_dtype, ("v",), "update"),
            "head": self.head_field(),
        }
        return Schema(fields, limits={"v": self.size})

    def paper_bytes(self) -> int:
        """4 ((1 − p) L + h) up, 4 (L + h) down."""
        return round(4 * ((2 - self.own.sparsity) * self.size + 2 * self.shapes.head))

    def expected(self, clients: int) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]:
        return {"v": (1 - self.own.sparsity) * self.size}, {}, {}

    def mask(self, arrays: Arrays) -> np.ndarray:
        return srd.dare_mask((self.size,), self.own.sparsity, srd.dare_rng(int(arrays["mask"][0])))

    def check(self, arrays: Arrays, round: int) -> None:
        if (kept := int(self.mask(arrays).sum())) != len(arrays["values"]):
            raise Refused(f"{len(arrays['values'])} values for {kept} places in its mask")

    def summands(self, arrays: Arrays) -> Mapping[Any, np.ndarray]:
        update = np.zeros(self.size, np.float32)
        update[self.mask(arrays)] = arrays["values"]
        return {"update": update, "head": arrays["head"]}

    def layout(self, round: int, instructions: Mapping[str, Any]) -> Mapping[Hashable, tuple[int, ...]]:
        return {"update": (self.size,), "head": (self.shapes.head,)}

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        A, B = np.split(means.mean("update"), [self.factors["A"].size])
        return {"A": self.factors["A"] + A, "B": self.factors["B"] + B, "head": means.mean("head")}

    def observe(self, version: int, arrays: Arrays) -> None:
        self.factors |= {name: arrays[name] for name in self.factors if name in arrays}
