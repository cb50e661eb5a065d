"""What methods on LoRA have in common: their settings, and layers with factors beside the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedkrso_app.config import Config, ConfigError, Settings, need, need_positive
from fedkrso_app.core import lora
from fedkrso_app.core.stacked import Group, Stack, StackedLora, sliced, stacked_linears
from fedkrso_app.core.subspace import replaced
from fedkrso_app.strategies.base import Local
from fedkrso_app.training.loop import factor_optimizer, head_optimizer
from fedkrso_app.training.model import LoadedModel


@dataclass(frozen=True)
class Lora(Settings):
    """LoRA on the target layers: ΔW = (alpha / rank) B A."""

    table = "lora"
    rank: int
    ranks: str  # partition i trains at the i-th, counting on from the first after the last; "": all at ``rank``
    alpha: float
    learning_rate: float  # FedIT's

    def __post_init__(self) -> None:
        need(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        if self.ranks and not all(part.strip().isdecimal() and int(part) for part in self.ranks.split(",")):
            raise ConfigError(f"lora.ranks = {self.ranks!r} is not a list of ranks; write for instance '8,4,4'.")
        need_positive("lora.alpha", self.alpha)
        need_positive("lora.learning-rate", self.learning_rate)

    @property
    def each(self) -> list[int]:
        """The ranks that partitions take in turn."""
        return [int(part) for part in self.ranks.split(",")] if self.ranks else [self.rank]

    @property
    def most(self) -> int:
        """R, the rank of the factors that all have: a smaller one uses the first components."""
        return max(self.each)

    def of(self, partition: int) -> int:
        return self.each[partition % len(self.each)]


class LoraLocal(Local):
    """Client half of the methods that train low-rank factors: LoRA layers on the targets, and their tensors by name."""

    by_row: ClassVar[bool] = True
    factors: ClassVar[tuple[str, ...]] = ("A", "B")  # those that are trained

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        super().__init__(loaded, config)
        settings = config.of(Lora)
        # alpha / rank is the scale at every rank
        alpha = settings.alpha * settings.most / settings.rank if settings.ranks else settings.alpha
        self.layers = lora.attach(self.module, list(self.targets), settings.most, alpha, config.seed)
        self.module.requires_grad_(False)  # the new factors too: training turns on those that it trains
        self.pairs = [lora.factors(layer) for layer in self.layers.values()]
        tensors = {"A": [A for A, _ in self.pairs], "B": [B for _, B in self.pairs], "head": list(self.head.values())}
        self.tensors: dict[str, list[nn.Parameter]] = {name: tensors[name] for name in (*self.factors, "head")}

    def optimized(self) -> list[nn.Parameter]:
        return [parameter for name in (*self.factors, "head") for parameter in self.tensors.get(name, [])]

    def shared(self) -> list[Tensor]:
        return [parameter.detach() for parameters in self.tensors.values() for parameter in parameters]

    def trained(self) -> list[Tensor]:
        own = [tensor for tensors in self.personal().values() for tensor in tensors]
        return [parameter.detach() for parameter in self.optimized()] + own

    def optimizers(self, factors: Sequence[str], learning_rate: float) -> list[torch.optim.Optimizer]:
        """AdamW on the named ``factors`` (without decay) and on the head."""
        parameters = [parameter for name in factors for parameter in self.tensors[name]]
        return [factor_optimizer(parameters, learning_rate), head_optimizer(self.head, learning_rate)]

    def plain_state(self) -> dict[str, Tensor]:
        return lora.merged_state(self.module, self.layers)

    @contextmanager
    def stacked(self, group: Group) -> Iterator[tuple[list[Local], list[Stack]]]:
        layers, heads = stacked_linears(self.module, list(self.head), group)
        stacks = {id(self.head[name]): stack for name, stack in heads.items()}
        for name, layer in self.layers.items():
            A, B = lora.factors(layer)
            stacks |= {id(factor): Stack(factor, group.clients) for factor in (A, B)}
            both = stacks[id(A)].whole, stacks[id(B)].whole
            layers[name] = StackedLora(layer.get_base_layer(), *both, lora.scaling(layer), group)
        with replaced(self.module, layers):
            yield [sliced(self, stacks, client) for client in range(group.clients)], list(stacks.values())
