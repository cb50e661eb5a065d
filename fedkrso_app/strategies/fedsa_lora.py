"""FedSA-LoRA (arXiv:2410.01463): A is averaged, B and the head stay with each client. There is no model of all.

Client i                                          Server
A ← Ā; B_i and head_i as its last round left them
train all three; send A_i                     ->  Ā = Σ p_i A_i
judge (Ā, B_i, head_i) on its own rows        <-  Ā
"""

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fedkrso_app.config import Settings, need_positive
from fedkrso_app.core.flat import flatten
from fedkrso_app.records.schema import Schema
from fedkrso_app.strategies.base import Arrays
from fedkrso_app.strategies.fedit import FedIT, FedITLocal
from fedkrso_app.strategies.lora import Lora


@dataclass(frozen=True)
class FedSALoraSettings(Settings):
    table = "fedsa-lora"
    learning_rate: float

    def __post_init__(self) -> None:
        need_positive("fedsa-lora.learning-rate", self.learning_rate)


class FedSALoraLocal(FedITLocal):
    """Client half: as FedIT, with B of role "personal"."""

    def personal(self) -> dict[str, list[Tensor]]:
        return {**super().personal(), "B": [tensor.detach() for tensor in self.tensors["B"]]}

    def shared(self) -> list[Tensor]:
        return [tensor.detach() for name in ("A", "head") for tensor in self.tensors[name]]

    def state(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in super().state().items() if name != "B"}

    def apply(self, arrays: Arrays) -> None:
        super().apply({**arrays, "B": flatten(self.tensors["B"])})

    def learning_rate(self) -> float:
        return self.config.of(FedSALoraSettings).learning_rate


class FedSALora(FedIT):
    """Server half: the mean of A."""

    half = FedSALoraLocal
    settings = (Lora, FedSALoraSettings)
    arxiv = "2410.01463"
    learning_rate_key = "fedsa-lora.learning-rate"
    local_head = True

    @property
    def reply(self) -> Schema:
        reply = super().reply
        own = replace(reply.fields["B"], dtype="float32", role="personal")
        return replace(reply, fields={**reply.fields, "B": own})

    @property
    def entry(self) -> Schema:
        entry = super().entry
        return entry.only(name for name in entry.fields if name != "B")
