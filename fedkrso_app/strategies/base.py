"""What a method fills in: its half beside the model and its half beside the ledger; ``round.py`` does the rest."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core import lora
from fedkrso_app.core.fixed_point import FixedPointMeans
from fedkrso_app.core.projection import stream
from fedkrso_app.core.robust import RobustMeans
from fedkrso_app.core.subspace import matrix
from fedkrso_app.records import wire
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.records.wire import Schema

Arrays = Mapping[str, np.ndarray]
Batches = Iterator[dict[str, Tensor]]


@dataclass(frozen=True)
class Shapes:
    """All that the server must know of a model: target layers (name -> m, n), head and parameter sizes."""

    targets: Mapping[str, tuple[int, int]]
    head: int
    parameters: int

    @classmethod
    def of(cls, module: nn.Module, targets: Mapping[str, nn.Module], head: Mapping[str, nn.Parameter]) -> "Shapes":
        sizes = {name: (matrix(layer).shape[0], matrix(layer).shape[1]) for name, layer in targets.items()}
        return cls(sizes, sum(p.numel() for p in head.values()), sum(p.numel() for p in module.parameters()))

    def outputs(self, rank: int) -> int:
        """Q = Σ m·r, the size of all B factors."""
        return rank * sum(m for m, _ in self.targets.values())

    def inputs(self, rank: int) -> int:
        """A# = Σ n·r, the size of all A factors."""
        return rank * sum(n for _, n in self.targets.values())


class LocalMethod(ABC):
    """The half of whoever holds the model (each client; the server too, to evaluate and to export): brings it up to
    date, trains it, and says what training moved.

    ``targets`` and ``head`` (name -> layer, name -> parameter of ``module``) are sorted by name.
    """

    def __init__(
        self, module: nn.Module, targets: Mapping[str, nn.Module], head: Mapping[str, nn.Parameter], config: Config
    ) -> None:
        self.module, self.targets, self.head, self.config = module, targets, head, config
        for parameter in module.parameters():
            parameter.requires_grad_(False)

    @abstractmethod
    def initial(self) -> dict[str, np.ndarray]:
        """The arrays of ledger entry 0, whatever of the starting point W^0 alone does not tell, as they now are."""

    @abstractmethod
    def apply(self, arrays: Arrays) -> None:
        """Move the model by one ledger entry."""

    @abstractmethod
    def train(self, batches: Batches, instructions: ConfigRecord, rng: np.random.Generator) -> tuple[dict, float]:
        """Train in place; return the arrays of the reply and the mean loss."""

    @abstractmethod
    def optimized(self) -> list[nn.Parameter]:
        """The parameters that an optimizer moves, which takes float32."""

    def trained(self) -> list[Tensor]:
        """The tensors that :meth:`train` changes."""
        return [parameter.detach() for parameter in self.optimized()]

    def in_bfloat16(self, device: torch.device) -> "LocalMethod":
        """A copy to compute with on ``device``: bfloat16, but float32 where an optimizer works."""
        copied = copy.deepcopy(self)
        exact = {id(parameter) for parameter in copied.optimized()}
        for parameter in copied.module.parameters():
            if id(parameter) not in exact:
                parameter.data = parameter.data.to(torch.bfloat16)
        copied.module.to(device)
        return copied

    def plain_state(self) -> dict[str, Tensor]:
        """The model's state under the names of the plain hub model."""
        return self.module.state_dict()


class LoraLocal(LocalMethod):
    """Client half of the methods that train low-rank factors: LoRA layers on the targets, and their state by name."""

    factors: ClassVar[tuple[str, ...]] = ("A", "B")  # those that are trained

    def __init__(
        self, module: nn.Module, targets: Mapping[str, nn.Module], head: Mapping[str, nn.Parameter], config: Config
    ) -> None:
        super().__init__(module, targets, head, config)
        self.layers = lora.attach(module, list(targets), config.lora.rank, config.lora.alpha, config.seed)
        module.requires_grad_(False)  # the new factors too: training turns on those that it trains
        pairs = [lora.factors(layer) for layer in self.layers.values()]
        tensors = {"A": [A for A, _ in pairs], "B": [B for _, B in pairs], "head": list(head.values())}
        self.state: dict[str, list[nn.Parameter]] = {name: tensors[name] for name in (*self.factors, "head")}

    def optimized(self) -> list[nn.Parameter]:
        return [parameter for parameters in self.state.values() for parameter in parameters]

    def plain_state(self) -> dict[str, Tensor]:
        return lora.merged_state(self.module, self.layers)


class ServerMethod(ABC):
    """The server's half: what travels, and how replies become a ledger entry. The round sets the first four."""

    config: Config
    shapes: Shapes
    ledger: Ledger
    round: int  # the one under way

    local: ClassVar[Any]  # the LocalMethod that goes with it
    robust: ClassVar[bool] = True  # whether ``aggregation`` can be another one than the mean
    incremental: ClassVar[bool] = False  # whether entry v needs the model at v-1, or stands for itself
    absolute: ClassVar[tuple[str, ...]] = ("head",)  # arrays of a reply and an entry that are no update but the state
    arxiv: ClassVar[str]  # the number of its paper there
    learning_rate_key: ClassVar[str]  # the key of the run config that holds its learning rate
    rank_key: ClassVar[str] = ""  # and its rank, if it has one

    @classmethod
    def check_rank(cls, config: Config, shapes: Shapes) -> None:
        """Raise ConfigError if the rank is not below the width of every target layer."""
        rank, width = config.to_dict().get(cls.rank_key, 0), min(min(size) for size in shapes.targets.values())
        if rank >= width:
            raise ConfigError(
                f"{cls.rank_key} = {rank} is impossible: it must be below {width}, the narrowest layer's width."
            )

    @classmethod
    @abstractmethod
    def reply_schema(cls, config: Config, shapes: Shapes) -> Schema:
        """What a client's reply holds."""

    @classmethod
    def entry_schema(cls, config: Config, shapes: Shapes) -> Schema:
        """What a ledger entry holds; the mean of the replies unless a method says otherwise."""
        return cls.reply_schema(config, shapes)

    @classmethod
    def weights_schema(cls, config: Config, shapes: Shapes) -> Schema:
        """What can stand for all entries up to a version, in a method whose entries build on one another."""
        return Schema({"weights": ("float32", (cls.weights_size(config, shapes),))})

    @classmethod
    def weights_size(cls, config: Config, shapes: Shapes) -> int:
        """How many values training changes, where entries build on one another."""
        raise NotImplementedError

    @abstractmethod
    def paper_bytes(self) -> int:
        """Bytes of one client and round, both ways, by the paper's formula."""

    def instructions(self, round: int) -> dict[str, Any]:
        """What the clients must know for this round beside the model."""
        return {}

    def check(self, arrays: Arrays) -> None:  # noqa: B027  # most have nothing to add
        """Raise :class:`wire.Refused` where a reply fits its schema and is wrong all the same."""

    def begin(self) -> None:
        """Start a round's sums."""
        kind = self.config.aggregation
        self.sums = FixedPointMeans() if kind == "mean" else RobustMeans(kind)

    def absorb(self, arrays: Arrays, weight: int, partition: int) -> None:
        """Fold one checked reply into the sums, entirely or (raising OverflowError) not at all."""
        self.sums.add(arrays, weight)

    def average(self, total_weight: int) -> dict[str, np.ndarray]:
        """The arrays of the next ledger entry."""
        return {name: self.sums.mean(name, total_weight) for name in self.reply_schema(self.config, self.shapes).arrays}

    # The number format on the wire

    @classmethod
    def encode_entry(cls, arrays: Arrays, config: Config, shapes: Shapes, round: int) -> dict[str, np.ndarray]:
        """A ledger entry as it is stored and sent; its rounding is the same for the same run seed and round."""
        return wire.encode(arrays, cls.entry_schema(config, shapes), stream(config.seed, "broadcast", round))

    @classmethod
    def encode_reply(
        cls, arrays: Arrays, start: Arrays, config: Config, shapes: Shapes, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """A reply as it is sent. Quantised, absolute values go as the difference to those that training ``start``-ed
        from: so the error is as small as the update, and the next entry is the newest plus the mean."""
        if config.wire_dtype != "float32":
            arrays = {name: x - start[name] if name in cls.absolute else x for name, x in arrays.items()}
        return wire.encode(arrays, cls.reply_schema(config, shapes), rng)

    def next_entry(self, averages: Arrays) -> dict[str, np.ndarray]:
        """The round's averages as the ledger entry that is stored, sent and, decoded, applied by all sides."""
        if self.config.wire_dtype != "float32":
            start = wire.decode(self.ledger.read(self.ledger.version).arrays)
            averages = {name: x + start[name] if name in self.absolute else x for name, x in averages.items()}
        return self.encode_entry(averages, self.config, self.shapes, self.round)
