"""Target layers inside a random subspace: forward W x, backward G_B = dYᵀ(x Pᵀ), and never the full gradient.

At B = 0 the layer y = x(W + B P)ᵀ + b is the plain linear map, and its gradient for B is ∇W·Pᵀ. It needs only
P xᵀ (r × tokens) from the forward pass: neither the input x (tokens × n) nor ∇W (m × n) is ever kept.

Two forms, equal except for rounding: :class:`SubspaceLinear` moves W itself at every step; :class:`AdapterLinear`
leaves W alone and adds Σ_k B_k P_k beside it: for a W of few bits, which would round most of a step away, and where no
copy of W is to be kept that training could be taken back from.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkrso_app.core.few_bits import FewBits

# What backward makes of P x (r × tokens) and dY (tokens × m): G_B (m × r), or None if it is kept elsewhere, row by row.
Gradient = Callable[[Tensor, Tensor], Tensor | None]


class _ProjectedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor, P: Tensor, gradient: Gradient
    ) -> Tensor:
        # r × tokens and r × m, not their transposes: the long side along memory is two to three times faster on a CPU.
        ctx.save_for_backward(weight, P @ x.T)
        ctx.gradient = gradient
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, projected = ctx.saved_tensors
        dY = grads[0]
        dX = dY @ weight if ctx.needs_input_grad[0] else None  # not in the first block, whose input is not trained
        return dX, None, None, ctx.gradient(projected, dY), None, None


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dense: Callable[[], Tensor],
        bias: Tensor | None,
        B: Tensor,
        Bs: Tensor,
        Ps: Tensor,
        live: slice,
        gradient: Gradient,
    ) -> Tensor:
        ctx.gradient, ctx.dense = gradient, dense
        projected = x @ Ps.T
        ctx.save_for_backward(Bs, Ps, projected[:, live].T.contiguous())
        return functional.linear(x, dense(), bias).addmm_(projected, Bs.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        Bs, Ps, projected = ctx.saved_tensors
        dY = grads[0]
        dX = (dY @ ctx.dense()).addmm_(dY @ Bs, Ps) if ctx.needs_input_grad[0] else None
        return dX, None, None, ctx.gradient(projected, dY), None, None, None, None


def summed(projected: Tensor, dY: Tensor) -> Tensor:
    """G_B of all tokens, m × r, from P x (r × tokens) and dY (tokens × m)."""
    return (projected @ dY).T


class SubspaceLinear(nn.Module):
    """A linear layer that is trained along P only.

    Shares its weight (as ``W``) and ``bias`` with the layer it replaces (``nn.Linear``, or transformers' ``Conv1D``,
    whose weight is stored as n × m). ``B`` (m × r, at least float32) stays zero and exists to receive G_B as
    ``B.grad``.
    """

    P: Tensor
    W: Tensor  # m × n, the weight's own memory
    gradient: Gradient = staticmethod(summed)
    fixed = False

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        self.bias = layer.bias
        self.W = matrix(layer)
        dtype = torch.promote_types(self.W.dtype, torch.float32)
        self.B = nn.Parameter(self.W.new_zeros(self.W.shape[0], rank, dtype=dtype))

    @property
    def weight(self) -> Tensor:
        """W, for models that look at a layer's weight before they call it (T5)."""
        return self.W

    def forward(self, x: Tensor) -> Tensor:
        # Tokens in one row: a function of our own must not return a view, or nobody could change it in place (DeBERTa).
        return self.rows(x.reshape(-1, x.shape[-1]).to(self.W.dtype)).view(*x.shape[:-1], -1)

    def rows(self, x: Tensor) -> Tensor:
        """y, tokens × m, of x, tokens × n."""
        return cast(Tensor, _ProjectedLinear.apply(x, self.W, self.bias, self.B, self.P, self.gradient))

    def fix(self, seeds: int) -> None:
        """Keep every tensor in its place from now on; at most ``seeds`` projections will be followed."""
        self.P = self.W.new_zeros(self.B.shape[1], self.W.shape[1])
        self.fixed = True

    def kept(self, seed: int) -> Tensor | None:
        """The projection (r × n) that belongs to ``seed``, where it is here already."""
        return None

    def follow(self, seed: int, P: Tensor, B_k: Tensor) -> None:
        """Train along ``P`` (r × n), which belongs to ``seed``, from now on. ``B_k`` (m × r): the accumulator so far,
        which is going to change in place with every move."""
        if self.fixed:
            self.P.copy_(P)
        else:
            self.P = P

    def move(self, step: Tensor) -> None:
        """Take ``step`` (m × r) along P, after it was added to the accumulator."""
        self.W.addmm_(step, self.P)

    def held(self) -> list[Tensor]:
        """What lives between steps beside W."""
        return [self.P]


class AdapterLinear(SubspaceLinear):
    """The same layer with W at rest: y = x(W + Σ_k B_k P_k)ᵀ + b over all seeds that it has followed.

    Each seed has its columns of ``Bs``. Where they are fixed, the first r are the live seed's, whichever that is, and
    its own are 0 meanwhile.
    """

    Ps: Tensor  # R × n and m × R, R = r times the seeds so far, in W's dtype
    Bs: Tensor

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__(layer, rank)
        m, n = self.W.shape
        self.dense = dense_of(layer)
        self.Ps, self.Bs, self.seeds = self.W.new_zeros(0, n), self.W.new_zeros(m, 0), cast(list[int], [])

    def rows(self, x: Tensor) -> Tensor:
        factors = self.B, self.Bs, self.Ps, self.live
        return cast(Tensor, _AdaptedLinear.apply(x, self.dense, self.bias, *factors, self.gradient))

    def fix(self, seeds: int) -> None:
        m, r = self.B.shape
        self.Ps, self.Bs = self.W.new_zeros((seeds + 1) * r, self.W.shape[1]), self.W.new_zeros(m, (seeds + 1) * r)
        self.live, self.own, self.fixed = slice(0, r), slice(0, r), True

    def kept(self, seed: int) -> Tensor | None:
        if seed not in self.seeds:
            return None
        r = self.B.shape[1]
        start = (self.seeds.index(seed) + self.fixed) * r
        return self.Ps[start : start + r]

    def follow(self, seed: int, P: Tensor, B_k: Tensor) -> None:
        if self.fixed:
            return self._swap(seed, P, B_k)
        if seed not in self.seeds:
            self.seeds.append(seed)
            self.Ps, self.Bs = torch.cat([self.Ps, P]), torch.cat([self.Bs, B_k.to(P)], dim=1)
        start = self.seeds.index(seed) * len(P)
        self.live, self.B_k = slice(start, start + len(P)), B_k

    def _swap(self, seed: int, P: Tensor, B_k: Tensor) -> None:
        """Let ``seed`` take the live columns, and the seed before it go back to its own."""
        self.Bs[:, self.own] = self.Bs[:, self.live].clone()
        if seed not in self.seeds:
            self.seeds.append(seed)
        start = (self.seeds.index(seed) + 1) * len(P)
        self.own, self.B_k = slice(start, start + len(P)), B_k
        self.Ps[self.own] = self.Ps[self.live] = P
        self.Bs[:, self.own] = 0
        self.move(B_k)

    def move(self, step: Tensor) -> None:
        self.Bs[:, self.live] = self.B_k.to(self.Bs.dtype)  # rounded from the exact sum, not added up in few bits

    def held(self) -> list[Tensor]:
        return [self.Ps, self.Bs]


def matrix(layer: nn.Module) -> Tensor:
    """A layer's weight as an m × n view (m outputs, n inputs) that shares its memory."""
    weight = cast(Tensor, layer.weight).detach()
    return weight.T if is_conv1d(layer) else weight


def dense_of(layer: nn.Module) -> Callable[[], Tensor]:
    """What gives the matrix (m × n) that a layer computes with: its weight, or what few bits make of it each time."""
    W = matrix(layer)
    return layer.dense if isinstance(layer, FewBits) else lambda: W


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the weight is stored as (in, out), as in GPT-2; only Conv1D has the attribute ``nf``."""
    return hasattr(layer, "nf")


@contextmanager
def replaced(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, ``layers`` (name -> layer) stand in ``module`` in the place of its own."""
    originals = {name: module.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            module.set_submodule(name, layer)
        yield
    finally:
        for name, original in originals.items():
            module.set_submodule(name, original)


@contextmanager
def attached(
    module: nn.Module, targets: Mapping[str, nn.Module], rank: int, form: type[SubspaceLinear] = SubspaceLinear
):
    """Replace every target by a ``form`` (name -> layer of ``module``) and yield them by name.

    On leaving, the original layers stand where they stood.
    """
    layers = {name: form(layer, rank) for name, layer in targets.items()}
    with replaced(module, layers):
        yield layers


@torch.no_grad()
def fold(W: Tensor, Bs: Tensor, Ps: Tensor) -> None:
    """W ← W + Σ_k B_k P_k in place, one matrix product over all k (FedKRSO, eq. 9 and Alg. 1 l. 5).

    ``W`` is m × n, ``Bs`` K × m × r and ``Ps`` K × r × n, of one dtype and on one device.
    """
    K, m, r = Bs.shape
    W.addmm_(Bs.permute(1, 0, 2).reshape(m, K * r), Ps.reshape(K * r, -1))
