"""FedIT (arXiv:2305.05644): LoRA on the target layers; the means of A, of B and of the head, each by itself.

The mean of B times the mean of A is not the mean of the products: FedIT's average is biased, which is its known price.
"""

import numpy as np
import torch
from flwr.app import ConfigRecord

from fedkrso_app.config import Config
from fedkrso_app.core.flat import flatten, unflatten
from fedkrso_app.federation.round import FedTune
from fedkrso_app.records.wire import HEAD, STATE, Schema
from fedkrso_app.strategies.base import Arrays, Batches, LoraLocal, Shapes
from fedkrso_app.training.loop import head_optimizer, train


class FedITLocal(LoraLocal):
    """Client half: AdamW on the factors (without decay) and on the head."""

    def initial(self) -> dict[str, np.ndarray]:
        return {name: flatten(tensors) for name, tensors in self.state.items()}

    def apply(self, arrays: Arrays) -> None:
        for name, tensors in self.state.items():
            unflatten(arrays[name], tensors)

    def train(self, batches: Batches, instructions: ConfigRecord, rng: np.random.Generator) -> tuple[dict, float]:
        rate = self.learning_rate()
        factors = [tensor for name in self.factors for tensor in self.state[name]]
        optimizers = [torch.optim.AdamW(factors, lr=rate, weight_decay=0.0), head_optimizer(self.head, rate)]
        loss = train(self.module, batches, optimizers, self.config, rng)
        return self.initial(), loss

    def learning_rate(self) -> float:
        return self.config.lora.learning_rate


class FedIT(FedTune):
    """Server half: one mean per factor."""

    local = FedITLocal
    arxiv = "2305.05644"
    learning_rate_key = "lora.learning-rate"
    rank_key = "lora.rank"
    absolute = ("A", "B", "head")

    @classmethod
    def reply_schema(cls, config: Config, shapes: Shapes) -> Schema:
        return cls._schema(config, shapes, config.wire_dtype)

    @classmethod
    def entry_schema(cls, config: Config, shapes: Shapes) -> Schema:
        return cls._schema(config, shapes, STATE[config.wire_dtype])

    @classmethod
    def _schema(cls, config: Config, shapes: Shapes, dtype: str) -> Schema:
        rank = config.lora.rank
        arrays = {
            "A": (dtype, (shapes.inputs(rank),)),
            "B": (dtype, (shapes.outputs(rank),)),
            "head": (HEAD[config.wire_dtype], (shapes.head,)),
        }
        return Schema({name: arrays[name] for name in (*cls.local.factors, "head")})

    def paper_bytes(self) -> int:
        schema = self.reply_schema(self.config, self.shapes)
        return 8 * sum(shape[0] for _, shape in schema.arrays.values())
