"""Algorithm 2 of FedKRSO (arXiv:2602.03019): random subspace optimization.

Moments live in r dimensions, W moves at every step, and B_k adds up what was done along P_k. Read with the standard
bias correction: the printed lines 11-12 write the corrected moments back, which makes them diverge.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from fedkrso_app.core.projection import projection
from fedkrso_app.core.subspace import SubspaceLinear


def adam_update(
    G: Tensor, M: Tensor, V: Tensor, i: int, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Tensor:
    """U, the bias-corrected Adam direction at step i = 1, 2, … of an interval; M and V are updated in place.

    All tensors have the shape of G.
    """
    M.mul_(betas[0]).add_(G, alpha=1 - betas[0])
    V.mul_(betas[1]).addcmul_(G, G, value=1 - betas[1])
    M_hat = M / (1 - betas[0] ** i)  # Alg. 2, l. 11
    V_hat = V / (1 - betas[1] ** i)  # Alg. 2, l. 12
    return M_hat / (V_hat.sqrt() + eps)


class RSO(torch.optim.Optimizer):
    """Trains the weights of ``layers`` (name -> SubspaceLinear) inside the subspace of the current seed.

    ``accumulators`` maps each seed used so far to B_k, a vector of Q = Σ m·r values: every layer's m × r block, row by
    row, in the order of ``layers``. At any time W = W_start + Σ_k B_k P_k. ``betas=None`` takes plain gradient steps
    instead of Adam's, as the paper's theory does.
    """

    accumulators: dict[int, Tensor]

    def __init__(
        self,
        layers: Mapping[str, SubspaceLinear],
        lr: float,
        kind: str = "gaussian",
        betas: tuple[float, float] | None = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__([layer.B for layer in layers.values()], {"lr": lr})
        self.layers, self.kind, self.betas, self.eps = dict(layers), kind, betas, eps
        self.sizes = [layer.B.numel() for layer in layers.values()]
        self.accumulators = {}

    def start_interval(self, seed: int) -> None:
        """Project along ``seed`` from now on: new P_k, moments at zero, B_k continued if the seed was used before."""
        some = next(iter(self.layers.values())).B
        self.M, self.V, self.i = some.new_zeros(sum(self.sizes)), some.new_zeros(sum(self.sizes)), 0
        self.B = self.accumulators.setdefault(seed, torch.zeros_like(self.M))
        for (name, layer), block in zip(self.layers.items(), self.B.split(self.sizes), strict=True):
            P = projection(seed, name, layer.B.shape[1], layer.W.shape[1], self.kind)  # Alg. 2, l. 4
            layer.follow(seed, torch.from_numpy(P).to(layer.W), block.view_as(layer.B))

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
        return [self.M, self.V, *self.accumulators.values(), *(layer.P for layer in self.layers.values())]
