"""The sizes of a model, which are all that a server without it must know."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedkrso_app.core.subspace import matrix
from fedkrso_app.training.model import LoadedModel, find_blocks, find_small


@dataclass(frozen=True)
class Shapes:
    """All that the server must know of a model: target layers (name -> m, n), and numbers of parameters."""

    targets: Mapping[str, tuple[int, int]]
    head: int  # what is trained of it
    parameters: int  # all
    frozen: int = 0  # what is left of the head
    blocks: tuple[int, ...] = ()  # each transformer block
    small: Mapping[str, int] = field(default_factory=dict)  # norms and biases, by name

    @classmethod
    def of(cls, loaded: LoadedModel) -> "Shapes":
        sizes = {name: (matrix(layer).shape[0], matrix(layer).shape[1]) for name, layer in loaded.targets.items()}
        head = sum(parameter.numel() for parameter in loaded.head.values())
        every = {name: parameter.numel() for name, parameter in loaded.module.named_parameters()}
        blocks = tuple(sum(parameter.numel() for parameter in block.values()) for block in find_blocks(loaded).values())
        small = {name: parameter.numel() for name, parameter in find_small(loaded).items()}
        frozen = sum(every[name] for name in loaded.frozen)
        return cls(sizes, head, sum(every.values()), frozen, blocks, small)

    @property
    def weights(self) -> int:
        """Σ m·n, the size of the target layers' weights."""
        return sum(m * n for m, n in self.targets.values())

    def outputs(self, rank: int) -> int:
        """Q = Σ m·r, the size of all B factors."""
        return rank * sum(m for m, _ in self.targets.values())

    def inputs(self, rank: int) -> int:
        """A# = Σ n·r, the size of all A factors."""
        return rank * sum(n for _, n in self.targets.values())
