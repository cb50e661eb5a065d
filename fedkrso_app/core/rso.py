"""Algorithm 2 of FedKRSO (arXiv:2602.03019): random subspace optimization.

Moments live in r dimensions, W moves at every step, and B_k adds up what was done along P_k. Read with the standard
bias correction: the printed lines 11-12 write the corrected moments back, which makes them diverge.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any, cast

import torch
from torch import Tensor

from fedkrso_app.core import projection
from fedkrso_app.core.subspace import SubspaceLinear


def adam_update(
    G: Tensor, M: Tensor, V: Tensor, i: int | Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Tensor:
    """U, the bias-corrected Adam direction at step i = 1, 2, … of an interval; M and V are updated in place.

    All tensors have the shape of G; ``i`` may be a float64 tensor that broadcasts to it.
    """
    M.mul_(betas[0]).add_(G, alpha=1 - betas[0])
    V.mul_(betas[1]).addcmul_(G, G, value=1 - betas[1])
    first, second = (1 - beta**i for beta in betas)
    if isinstance(first, Tensor) and isinstance(second, Tensor):  # float32 would lose them: .999 is so near to 1
        first, second = first.to(M.dtype), second.to(V.dtype)
    M_hat = M / first  # Alg. 2, l. 11
    V_hat = V / second  # Alg. 2, l. 12
    return M_hat / (V_hat.sqrt() + eps)


class RSO(torch.optim.Optimizer):
    """Trains the weights of ``layers`` (name -> SubspaceLinear) inside the subspace of the current seed.

    ``accumulators`` maps each seed used so far to B_k, a vector of Q = Σ m·r values: every layer's m × r block, row by
    row, in the order of ``layers``. At any time W = W_start + Σ_k B_k P_k. ``betas=None`` takes plain gradient steps
    instead of Adam's, as the paper's theory does. ``seeds``: how many there are, and how many it may follow at most.
    """

    accumulators: dict[int, Tensor]
    i: int | Tensor

    def __init__(
        self,
        layers: Mapping[str, SubspaceLinear],
        lr: float,
        kind: str = "gaussian",
        betas: tuple[float, float] | None = (0.9, 0.999),
        eps: float = 1e-8,
        seeds: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__([layer.B for layer in layers.values()], {"lr": lr})
        self.layers, self.kind, self.betas, self.eps = dict(layers), kind, betas, eps
        self.sizes, self.seeds, self.fixed = [layer.B.numel() for layer in layers.values()], seeds, False
        self.accumulators = {}
        self.drawing: dict[int, Future[None]] = {}  # what comes by seed

    def fix(self, *state: Tensor) -> None:
        """From now on every tensor of a step stays in its place, as a step that is recorded once and replayed needs.

        ``state``: M, V and B (Q values each) and i (float64, one) to take; without it they are made here, and those of
        the layers too. Call it before the first interval.
        """
        self.fixed = True
        if not state:
            some = next(iter(self.layers.values())).B
            state = *(some.new_zeros(3, sum(self.sizes))), some.new_zeros((), dtype=torch.float64)
            for layer in self.layers.values():
                layer.fix(min(self.seeds))
        self.M, self.V, self.B, self.i = state

    def start_interval(self, seed: int) -> None:
        """Project along ``seed`` from now on: new P_k, moments at zero, B_k continued if the seed was used before."""
        if self.fixed:
            self._reuse(seed)
        else:
            some = next(iter(self.layers.values())).B
            self.M, self.V, self.i = some.new_zeros(sum(self.sizes)), some.new_zeros(sum(self.sizes)), 0
            self.B = self.accumulators.setdefault(seed, torch.zeros_like(self.M))
        if seed in self.drawing:
            self.drawing.pop(seed).result()
        for (name, layer), block in zip(self.layers.items(), self.B.split(self.sizes), strict=True):
            P = layer.kept(seed)
            if P is None:  # Alg. 2, l. 4
                P = projection.placed(seed, name, layer.B.shape[1], layer.W.shape[1], self.kind, layer.W)
            layer.follow(seed, P, block.view_as(layer.B))

    def draw_ahead(self, seed: int) -> None:
        """Let a thread draw the projections of an interval that comes."""
        shapes = {name: (layer.B.shape[1], layer.W.shape[1]) for name, layer in self.layers.items()}
        self.drawing[seed] = projection.ahead(seed, shapes, self.kind)

    def _reuse(self, seed: int) -> None:
        """As a new interval begins, where the tensors stay: the accumulator of the live seed is ``B`` itself."""
        for tensor in (self.M, self.V, cast(Tensor, self.i)):
            tensor.zero_()
        live = next((key for key, value in self.accumulators.items() if value is self.B), None)
        if live is not None:
            self.accumulators[live] = self.B.clone()
        if seed in self.accumulators:
            self.B.copy_(self.accumulators[seed])
        else:
            self.B.zero_()
        self.accumulators[seed] = self.B

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step from the gradients in every layer's ``B.grad``."""
        self.i += 1
        G = torch.cat([cast(Tensor, layer.B.grad).flatten() for layer in self.layers.values()])
        U = G if self.betas is None else adam_update(G, self.M, self.V, self.i, self.betas, self.eps)
        move = U.mul_(-self.param_groups[0]["lr"])
        self.B += move
        for layer, block in zip(self.layers.values(), move.split(self.sizes), strict=True):
            layer.move(block.view_as(layer.B))

    def followed(self) -> Iterator[tuple[SubspaceLinear, Tensor]]:
        """Each layer with its m × r block of the current seed's accumulator."""
        for layer, block in zip(self.layers.values(), self.B.split(self.sizes), strict=True):
            yield layer, block.view_as(layer.B)

    def held(self) -> list[Tensor]:
        """Every tensor that lives between steps."""
        layers = [part for layer in self.layers.values() for part in layer.held()]
        return [self.M, self.V, *self.accumulators.values(), *layers]
