"""Target layers inside a random subspace: forward W x, backward G_B = dYᵀ(x Pᵀ), and never the full gradient.

At B = 0 the layer y = x(W + B P)ᵀ + b is the plain linear map, and its gradient for B is ∇W·Pᵀ. It needs only
P xᵀ (r × tokens) from the forward pass: neither the input x (tokens × n) nor ∇W (m × n) is ever kept.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class _ProjectedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor, P: Tensor) -> Tensor:
        # r × tokens and r × m, not their transposes: the long side along memory is two to three times faster on a CPU.
        ctx.save_for_backward(weight, P @ x.T)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, projected = ctx.saved_tensors
        dY = grads[0]
        dX = dY @ weight if ctx.needs_input_grad[0] else None  # not in the first block, whose input is not trained
        return dX, None, None, (projected @ dY).T, None


class SubspaceLinear(nn.Module):
    """A linear layer that is trained along P only.

    Shares its weight (as ``W``) and ``bias`` with the layer it stands for (``nn.Linear``, or transformers' ``Conv1D``,
    whose weight is stored as n × m). ``B`` (m × r) stays zero and exists to receive G_B as ``B.grad``; ``P`` (r × n) is
    set by whoever trains.
    """

    P: Tensor
    W: Tensor  # m × n, the weight's own memory

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        self.bias = layer.bias
        self.W = matrix(layer)
        self.B = nn.Parameter(self.W.new_zeros(self.W.shape[0], rank))

    def forward(self, x: Tensor) -> Tensor:
        # Tokens in one row: a function of our own must not return a view, or nobody could change it in place (DeBERTa).
        y = _ProjectedLinear.apply(x.reshape(-1, x.shape[-1]), self.W, self.bias, self.B, self.P)
        return cast(Tensor, y).view(*x.shape[:-1], -1)


def matrix(layer: nn.Module) -> Tensor:
    """A layer's weight as an m × n view (m outputs, n inputs) that shares its memory."""
    weight = cast(Tensor, layer.weight).detach()
    return weight.T if is_conv1d(layer) else weight


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the weight is stored as (in, out), as in GPT-2; told by the attribute ``nf`` that only Conv1D has."""
    return hasattr(layer, "nf")


@contextmanager
def attached(module: nn.Module, targets: Mapping[str, nn.Module], rank: int):
    """Put a :class:`SubspaceLinear` in the place of every target (name -> layer of ``module``) and yield them by name.

    On leaving, the original layers stand where they stood.
    """
    layers = {name: SubspaceLinear(layer, rank) for name, layer in targets.items()}
    try:
        for name, layer in layers.items():
            module.set_submodule(name, layer)
        yield layers
    finally:
        for name, original in targets.items():
            module.set_submodule(name, original)


@torch.no_grad()
def fold(W: Tensor, Bs: Tensor, Ps: Tensor) -> None:
    """W ← W + Σ_k B_k P_k in place, one matrix product over all k (FedKRSO, eq. 9 and Alg. 1 l. 5).

    ``W`` is m × n, ``Bs`` K × m × r and ``Ps`` K × r × n, of one dtype and on one device.
    """
    K, m, r = Bs.shape
    W.addmm_(Bs.permute(1, 0, 2).reshape(m, K * r), Ps.reshape(K * r, -1))
