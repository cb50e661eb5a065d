"""FedFFT: federated averaging (arXiv:1602.05629) of all parameters, full fine-tuning on every client."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedkrso_app.config import Config, Settings, need_positive
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.strategies.base import Arrays, Local, Method
from fedkrso_app.training.loop import Session
from fedkrso_app.training.model import LoadedModel


@dataclass(frozen=True)
class FedFFTSettings(Settings):
    table = "fedfft"
    learning_rate: float

    def __post_init__(self) -> None:
        need_positive("fedfft.learning-rate", self.learning_rate)


class FedFFTLocal(Local):
    """Client half: AdamW on every parameter that the key ``head`` does not freeze."""

    dense = True

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        super().__init__(loaded, config)
        parameters = sorted(self.module.named_parameters())  # tied ones once
        self.parameters = [parameter for name, parameter in parameters if name not in loaded.frozen]

    def state(self) -> dict[str, np.ndarray]:
        return {"parameters": flatten(self.parameters)}

    def apply(self, arrays: Arrays) -> None:
        unflatten(arrays["parameters"], self.parameters)

    @contextmanager
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> Iterator[Session]:
        rate = self.config.of(FedFFTSettings).learning_rate
        yield Session([torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.01)], self.state)

    def optimized(self) -> list[nn.Parameter]:
        return self.parameters


class FedFFT(Method):
    """Server half: the mean of the parameters."""

    half = FedFFTLocal
    settings = (FedFFTSettings,)
    arxiv = "1602.05629"
    learning_rate_key = "fedfft.learning-rate"

    @property
    def size(self) -> int:
        return self.shapes.parameters - self.shapes.frozen

    @property
    def reply(self) -> Schema:
        return Schema({"parameters": Field(self.config.wire_dtype, (self.size,), "state")})

    @property
    def entry(self) -> Schema:
        return Schema({"parameters": Field(self.state_dtype(), (self.size,), "state")})

    def paper_bytes(self) -> int:
        return 8 * self.size
