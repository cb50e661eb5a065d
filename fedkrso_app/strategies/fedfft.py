"""FedFFT: federated averaging (arXiv:1602.05629) of all parameters, full fine-tuning on every client."""

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import ConfigRecord
from torch import nn

from fedkrso_app.config import Config
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.federation.round import FedTune
from fedkrso_app.records.wire import STATE, Schema
from fedkrso_app.strategies.base import Arrays, Batches, LocalMethod, Shapes
from fedkrso_app.training.loop import train


class FedFFTLocal(LocalMethod):
    """Client half: AdamW on every parameter."""

    def __init__(
        self, module: nn.Module, targets: Mapping[str, nn.Module], head: Mapping[str, nn.Parameter], config: Config
    ) -> None:
        super().__init__(module, targets, head, config)
        self.parameters = [parameter for _, parameter in sorted(module.named_parameters())]  # tied ones once

    def initial(self) -> dict[str, np.ndarray]:
        return {"parameters": flatten(self.parameters)}

    def apply(self, arrays: Arrays) -> None:
        unflatten(arrays["parameters"], self.parameters)

    def train(self, batches: Batches, instructions: ConfigRecord, rng: np.random.Generator) -> tuple[dict, float]:
        adamw = torch.optim.AdamW(self.parameters, lr=self.config.fedfft.learning_rate, weight_decay=0.01)
        loss = train(self.module, batches, [adamw], self.config, rng)
        return {"parameters": flatten(self.parameters)}, loss

    def optimized(self) -> list[nn.Parameter]:
        return self.parameters


class FedFFT(FedTune):
    """Server half: the mean of the parameters."""

    local = FedFFTLocal
    arxiv = "1602.05629"
    learning_rate_key = "fedfft.learning-rate"
    absolute = ("parameters",)

    @classmethod
    def reply_schema(cls, config: Config, shapes: Shapes) -> Schema:
        return Schema({"parameters": (config.wire_dtype, (shapes.parameters,))})

    @classmethod
    def entry_schema(cls, config: Config, shapes: Shapes) -> Schema:
        return Schema({"parameters": (STATE[config.wire_dtype], (shapes.parameters,))})

    def paper_bytes(self) -> int:
        return 8 * self.shapes.parameters
