"""Zeroth-order steps: two losses per direction and no backward pass (SPSA; MeZO, arXiv:2305.17333).

    g_k = (f(W + εz_k) − f(W − εz_k)) / 2ε,    W ← W − (η/p) Σ_k g_k z_k    over the p directions of a step

Layers are perturbed beside their weight, which moves by whole steps only; what is no matrix is perturbed in place and
copied back. Neither drifts: nothing is ever restored by subtraction.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkrso_app.core.directions import pair, vectors
from fedkrso_app.core.subspace import fold, matrix


class SidePath:
    """A forward hook of a linear layer: y = xWᵀ + b + (xPsᵀ)Bsᵀ, with W at rest.

    ``Bs`` (m × R) and ``Ps`` (R × n) are the steps that W has not taken, in W's dtype.
    """

    def __init__(self, W: Tensor) -> None:
        self.W, self.Bs, self.Ps = W, W.new_zeros(len(W), 0), W.new_zeros(0, W.shape[1])
        self.now = self.Bs, self.Ps

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        Bs, Ps = self.now
        return y + functional.linear(functional.linear(args[0], Ps), Bs) if len(Ps) else None

    def perturb(self, C: Tensor, P: Tensor, by: float) -> None:
        """Add ``by`` · C P for the time being; ``by`` = 0 takes it away."""
        both = (torch.cat([self.Bs, by * C], dim=1), torch.cat([self.Ps, P])) if len(self.Ps) else (by * C, P)
        self.now = both if by else (self.Bs, self.Ps)

    def keep(self, B: Tensor, P: Tensor) -> None:
        """Take the step B P beside W, which has too few bits for it."""
        self.Bs, self.Ps = torch.cat([self.Bs, B], dim=1), torch.cat([self.Ps, P])
        self.now = self.Bs, self.Ps


class ZerothOrder(torch.optim.Optimizer):
    """Moves the weights of ``layers`` and the ``others``, tensors that are no matrices; ``step`` takes a closure that
    evaluates the loss.

    ``seeds(j)`` gives the directions of step j = 0, 1, …; ``rank`` is that of :mod:`core.directions`. With ``signs``
    a step goes by the sign of g alone (FeedSign, arXiv:2501.17610). With ``at_rest`` the steps of layers stay beside W,
    for a W of few bits. At any time W = W_start + Σ s z over ``taken``, the (seed, s, g) of every direction so far; s
    is a float32 and contains −η/p.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        others: Mapping[str, Tensor],
        lr: float,
        epsilon: float,
        rank: int,
        seeds: Callable[[int], Sequence[int]],
        signs: bool = False,
        at_rest: bool = False,
    ) -> None:
        tensors = [matrix(layer) for layer in layers.values()] + list(others.values())
        nothing = nn.Parameter(tensors[0].new_zeros(0), requires_grad=False)  # no optimizer without a parameter
        super().__init__([nothing], {"lr": lr})
        self.layers, self.others, self.epsilon, self.rank = dict(layers), dict(others), epsilon, rank
        self.seeds, self.signs, self.at_rest = seeds, signs, at_rest
        self.sides = {name: SidePath(matrix(layer)) for name, layer in layers.items()}
        self.taken: list[tuple[int, float, float]] = []
        self.j = 0

    @contextmanager
    def beside(self) -> Iterator["ZerothOrder"]:
        """The layers have their side paths inside."""
        with ExitStack() as stack:
            for name, side in self.sides.items():
                stack.callback(self.layers[name].register_forward_hook(side).remove)
            yield self

    @torch.no_grad()
    def step(self, closure: Any) -> None:  # type: ignore[override]
        """One step from two losses per direction."""
        seeds, rate = self.seeds(self.j), self.param_groups[0]["lr"]
        self.j += 1
        pairs = {}
        for name, side in self.sides.items():
            C, P = pair(seeds, name, side.W.shape[0], side.W.shape[1], self.rank)
            pairs[name] = C.to(side.W), P.to(side.W)
        dense = {
            name: vectors(seeds, name, other.numel(), self.rank).to(other).view(-1, *other.shape)
            for name, other in self.others.items()
        }
        slopes = [self._slope(closure, k, pairs, dense) for k in range(len(seeds))]
        steps = [float(np.float32(-rate * ((1 if g > 0 else -1) if self.signs else g) / len(seeds))) for g in slopes]
        s = torch.tensor(steps)
        for name, (C, P) in pairs.items():
            B, side = C * s.to(C)[:, None, None], self.sides[name]
            if not self.at_rest:
                fold(side.W, B, P)
                continue
            for one, projection in zip(B, P, strict=True):
                side.keep(one, projection)
        for name, other in self.others.items():
            other.add_(torch.tensordot(s.to(other), dense[name], dims=1))
        self.taken += zip(seeds, steps, slopes, strict=True)

    def _slope(
        self, closure: Any, k: int, pairs: Mapping[str, tuple[Tensor, Tensor]], dense: Mapping[str, Tensor]
    ) -> float:
        """g along the k-th of the drawn directions."""
        kept = {name: other.clone() for name, other in self.others.items()}
        losses = []
        for by in (self.epsilon, -self.epsilon):
            for name, (C, P) in pairs.items():
                self.sides[name].perturb(C[k], P[k], by)
            for name, other in self.others.items():
                other.copy_(kept[name]).add_(dense[name][k], alpha=by)
            losses.append(closure().item())
        for name, (C, P) in pairs.items():
            self.sides[name].perturb(C[k], P[k], 0.0)
        for name, other in self.others.items():
            other.copy_(kept[name])
        return (losses[0] - losses[1]) / (2 * self.epsilon)

    def held(self) -> list[Tensor]:
        """Every tensor that lives between steps."""
        return [part for side in self.sides.values() for part in (side.Bs, side.Ps)]
