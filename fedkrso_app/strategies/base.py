"""What a method fills in: its half on the server, its half beside the model, and one client's round."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedkrso_app.config import Config, ConfigError, Settings
from fedkrso_app.core.few_bits import FewBits
from fedkrso_app.core.flat import unflatten
from fedkrso_app.core.rounding import moving
from fedkrso_app.core.stacked import Group, Stack, Unstackable
from fedkrso_app.core.subspace import matrix
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.training.loop import Session
from fedkrso_app.training.model import LoadedModel
from fedkrso_app.training.shapes import Shapes

Arrays = Mapping[str, np.ndarray]

# ``wire-dtype`` -> the dtype of a head, and that of other states in a ledger entry, which every round rounds anew.
_HEAD = {"float32": "float32", "float16": "float16", "int8": "int8", "int4": "int8"}
_STATE = {"float32": "float32", "float16": "float16", "int8": "float16", "int4": "float16"}


class Means(Protocol):
    """The good replies of a round, as :meth:`Method.conclude` sees them (:mod:`federation.aggregate`)."""

    def mean(self, key: Hashable) -> np.ndarray:
        """The weighted mean of a summand, float32; a client without it counts as zero."""

    def __contains__(self, key: Hashable) -> bool: ...

    @property
    def replies(self) -> Sequence[tuple[float, Arrays]]:
        """The replies with their shares of the weight, in the order of the partitions; of methods not ``linear``."""


class Local(ABC):
    """The half beside the model (at each client; at the server too, to evaluate and to export).

    ``loaded.targets`` and ``loaded.head`` (name -> layer, name -> parameter of the module) are sorted by name.
    """

    dense: ClassVar[bool] = False  # its sessions train the layers' weights themselves, in float32
    version = -1  # that of the entry which is being applied
    by_row: ClassVar[bool] = False  # its sessions know the data by gradients of linear layers alone

    def __init__(self, loaded: LoadedModel, config: Config) -> None:
        self.module, self.targets, self.head, self.config = loaded.module, loaded.targets, loaded.head, config
        self.module.requires_grad_(False)

    @abstractmethod
    def state(self) -> dict[str, np.ndarray]:
        """The arrays of role "state" as they are now; at W^0 they are ledger entry 0."""

    @abstractmethod
    def apply(self, arrays: Arrays) -> None:
        """Move the model by one ledger entry."""

    @abstractmethod
    def session(self, instructions: Mapping[str, Any], rng: np.random.Generator) -> AbstractContextManager[Session]:
        """One client's round; the module is ready for it inside the context. Must not draw from ``rng`` itself."""

    @abstractmethod
    def optimized(self) -> list[nn.Parameter]:
        """The parameters that an optimizer moves, which takes float32."""

    def moving(self, name: str) -> AbstractContextManager[Tensor]:
        """W of the target ``name`` (m × n, float32), to be moved in place by the entry at hand."""
        return moving(matrix(self.targets[name]), self.config.seed, self.version, name)

    @property
    def absent(self) -> Arrays:
        """The arrays that no entry has since they are empty, for :meth:`apply`."""
        return {} if self.head else {"head": np.zeros(0, np.float32)}

    def shared(self) -> list[Tensor]:
        """The tensors that entries move: with W^0, the model at a version."""
        return [parameter.detach() for parameter in self.optimized()]

    def personal(self) -> dict[str, list[Tensor]]:
        """The tensors of each array of role "personal". At rest they have their values at W^0."""
        return {}

    def adopt(self, own: Arrays) -> None:
        """Take over a partition's arrays of role "personal", as its last session left them (empty: those at rest), and
        those of role "memory"."""
        for name, tensors in self.personal().items() if own else ():
            unflatten(own[name], tensors)

    def trained(self) -> list[Tensor]:
        """The tensors that a session changes."""
        moved = [parameter.detach() for parameter in self.optimized()] if self.config.at_rest else self.shared()
        return moved + [tensor for tensors in self.personal().values() for tensor in tensors]

    @contextmanager
    def stacked(self, group: Group) -> Iterator[tuple[list["Local"], list[Stack]]]:
        """Inside, the module computes the rows of a whole ``group`` of clients in one pass. Yields a half for each
        client, whose session trains slices of the stacks that come with them.

        Raises :class:`Unstackable` where clients have nothing in common that could be computed once, as here.
        """
        raise Unstackable("each of its clients trains the whole model")
        yield

    def computing(self, device: torch.device) -> "Local":
        """A copy to compute with on ``device``: in ``compute-dtype``, but float32 where an optimizer works, and with
        target layers of few bits where ``compute-weights`` says so.

        Made tensor by tensor. What nobody moves is no copy where it is on the device in that dtype already.
        """
        config, memo = self.config, dict[int, Any]()
        dtype = getattr(torch, config.compute_dtype)
        exact = {id(parameter) for parameter in self.optimized()}
        moved = {_place(tensor) for tensor in (*self.shared(), *self.trained())}
        few = {id(layer.weight) for layer in self.targets.values()} if config.few_bits else set()
        for parameter in self.module.parameters():
            if id(parameter) in memo or id(parameter) in few:
                continue
            wanted = dtype if id(parameter) not in exact else parameter.dtype
            values = parameter.detach().to(device, wanted, copy=_place(parameter) in moved)
            memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
        for buffer in self.module.buffers():
            memo[id(buffer)] = buffer.to(device)
        for layer in self.targets.values() if config.few_bits else ():
            bias = None if layer.bias is None else memo[id(layer.bias)]
            memo[id(layer)] = FewBits(matrix(layer), bias, config.compute_weights, dtype, device)
        return copy.deepcopy(self, memo)

    def moved(self) -> list[Tensor]:
        """What entries or a session change, each tensor once; without weights that are in few bits when computing."""
        few = {_place(matrix(layer)) for layer in self.targets.values()} if self.config.few_bits else set()
        every = {(_place(tensor), tensor.shape): tensor for tensor in (*self.shared(), *self.trained())}
        return [tensor for (place, _), tensor in every.items() if place not in few]

    def plain_state(self) -> dict[str, Tensor]:
        """The model's state under the names of the plain hub model."""
        return self.module.state_dict()


def _place(tensor: Tensor) -> int:
    """Where a tensor is in memory; on the meta device, which has no addresses, its storage."""
    return tensor.data_ptr() or tensor.untyped_storage()._cdata


class Method(ABC):
    """The server's half: what travels, and how the replies become a ledger entry.

    It can be asked everything but :meth:`conclude` of a method with a past (:meth:`observe`, ``kept``) as soon as it
    is made; it knows no Flower, no ledger and no round but the number of one.
    """

    half: ClassVar[Any]  # the Local that belongs to it
    settings: ClassVar[tuple[type[Settings], ...]]  # the tables that it reads
    arxiv: ClassVar[str] = ""  # the number of its paper there,
    openreview: ClassVar[str] = ""  # or there if it is not on arXiv
    learning_rate_key: ClassVar[str]  # the key of the run config that holds its learning rate
    rank_key: ClassVar[str] = ""  # and its rank, if it has one
    linear: ClassVar[bool] = True  # the entry needs no more of the replies than the means of their summands
    from_values: ClassVar[bool] = False  # and is no linear function of the states in them: they must be values
    local_head: ClassVar[bool] = False  # each client keeps a head of its own, unless client.head says otherwise
    zeroth_order: ClassVar[bool] = False  # its sessions take losses and no gradients
    ranked: ClassVar[bool] = False  # clients may train at ranks of their own

    def __init__(self, config: Config, shapes: Shapes) -> None:
        self.config, self.shapes = config, shapes
        self.kept: dict[str, np.ndarray] = {}  # the newest arrays of role "server"; the round saves and restores them
        self.replies = 0  # how many are in the newest entry
        rank, width = config.to_dict().get(self.rank_key, 0), min(min(size) for size in shapes.targets.values())
        if rank >= width:
            raise ConfigError(
                f"{self.rank_key} = {rank} is impossible: it must be below {width}, the narrowest layer's width."
            )

    @classmethod
    def check_settings(cls, config: Config) -> None:
        """Raise ConfigError where this method's settings do not go with the rest."""
        return None

    @classmethod
    def citation(cls) -> tuple[str, str]:
        """Its paper in short, as ``arXiv:2602.03019``, and the address."""
        if cls.arxiv:
            return f"arXiv:{cls.arxiv}", f"https://arxiv.org/abs/{cls.arxiv}"
        return f"OpenReview:{cls.openreview}", f"https://openreview.net/forum?id={cls.openreview}"

    def local(self, loaded: LoadedModel) -> Local:
        """The half beside ``loaded``."""
        half = self.half(loaded, self.config)
        for parameter in half.optimized():  # of W in bfloat16; a float32 stays what it is
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        return half

    # What travels

    @property
    @abstractmethod
    def reply(self) -> Schema:
        """What a client's session ends with; its "personal" arrays stay at the node."""

    def reply_of(self, partition: int) -> Schema:
        """What the session of this partition's client ends with."""
        return self.reply

    @property
    def entry(self) -> Schema:
        """What :meth:`conclude` ends with; the arrays of role "server" stay there. Must hold every state."""
        return self.reply

    @property
    def weights_sizes(self) -> tuple[int, int]:
        """How many values :meth:`Local.shared` has, where entries build on one another: weights of target layers, and
        others."""
        raise NotImplementedError

    @property
    def weights(self) -> Schema:
        """:meth:`Local.shared` as it travels: flat, weights of ``state-dtype`` bfloat16 apart from what is float32."""
        few, others = self.weights_sizes
        if self.config.state_dtype == "float32" or not few:
            return Schema({"weights": Field("float32", (few + others,), "state")})
        rest = {"rest": Field("float32", (others,), "state")} if others else {}
        return Schema({"weights": Field("bfloat16", (few,), "state"), **rest})

    @property
    def weights_bytes(self) -> int:
        """Bytes of :attr:`weights`."""
        few, others = self.weights_sizes
        return (4 if self.config.state_dtype == "float32" else 2) * few + 4 * others

    @abstractmethod
    def paper_bytes(self) -> int:
        """Bytes per client and round, both ways, by the paper's formula; it may count on ``replies``."""

    def expected(self, clients: int) -> tuple[Mapping[str, float], Mapping[str, float], Mapping[str, float]]:
        """Expected lengths of the letters in ``reply`` and in ``entry`` where ``clients`` are asked in a round; and
        figures worth showing in a plan."""
        return {}, {}, {}

    def client_bytes(self, lengths: Mapping[str, float]) -> int:
        """Bytes that a client holds at the end of a round beyond those after its first step; ``lengths`` as those
        expected in a reply."""
        return 0

    def known_start(self) -> Arrays:
        """The arrays of role "state" at W^0 that the run's seed alone gives, to a server without a model too."""
        return {}

    # A round

    def instructions(self, round: int) -> dict[str, Any]:
        """What the clients must know for this round beside the model."""
        return {}

    def turns(self) -> Sequence[Mapping[str, Any]]:
        """The instructions of one round of each kind: what clients train, and so their memory, may differ."""
        return [self.instructions(1)]

    def check(self, arrays: Arrays, round: int) -> None:  # noqa: B027
        """Raise :class:`wire.Refused` where a reply fits its schema and is wrong all the same."""

    def summands(self, arrays: Arrays) -> Mapping[Any, np.ndarray]:
        """What is to be averaged of a checked reply."""
        return arrays

    def layout(self, round: int, instructions: Mapping[str, Any]) -> Mapping[Hashable, tuple[int, ...]]:
        """The summands of ``round`` with their shapes: those that all replies together can have, from what clients are
        given (:meth:`instructions`) alone. Raises ConfigError where the replies decide that."""
        shapes = {name: self.reply.fields[name].shape for name in self.reply.named("update", "state")}
        if type(self).summands is not Method.summands or not all(type(n) is int for s in shapes.values() for n in s):
            raise ConfigError(
                f"secure-aggregation does not work with strategy = {self.config.strategy!r}: what its clients add up "
                "depends on what each of them sends."
            )
        return shapes  # type: ignore[return-value]

    def reach(self, round: int, instructions: Mapping[str, Any]) -> Mapping[Hashable, float]:
        """How far each of the :meth:`layout` moves in a client at most, in learning rate times steps."""
        rate = float(self.config.to_dict()[self.learning_rate_key])
        return dict.fromkeys(self.layout(round, instructions), rate * self.config.local_steps)

    def conclude(self, means: Means, round: int) -> dict[str, np.ndarray]:
        """The arrays of the next ledger entry."""
        return {name: means.mean(name) for name in self.reply.travelling.fields if name in means}

    def observe(self, version: int, arrays: Arrays) -> None:  # noqa: B027
        """See a ledger entry: each one once, in order, those before a resume included (the last ``span`` of them)."""

    # Fields that several methods have

    def head_field(self) -> Field:
        return Field(_HEAD[self.config.wire_dtype], (self.shapes.head,), "state")

    def state_dtype(self) -> str:
        """Of a state in a ledger entry; in a reply it travels as a difference, in ``wire-dtype``."""
        return _STATE[self.config.wire_dtype]
