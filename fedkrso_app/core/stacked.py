"""Layers for the rows of several clients in one pass: the frozen weights are common, each client has its own factors.

Rows come client by client (the first client's b, then the next one's), so that x, (N·b) × … × n, is N × tokens × n. A
client's part of a result depends on its own rows and parameters alone, to the bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkrso_app.core.subspace import matrix


class Unstackable(RuntimeError):
    """A model that cannot be computed for several clients at once; the text says why."""


class Stack:
    """One parameter of N clients. ``whole``, N × its shape, is what a pass computes with and differentiates by;
    ``slices[i]``, on the same memory, is what client i's optimizers see."""

    def __init__(self, start: Tensor, clients: int) -> None:
        self.whole = nn.Parameter(start.detach().expand(clients, *start.shape).clone(), requires_grad=False)
        self.slices = [nn.Parameter(part, requires_grad=False) for part in self.whole.data.unbind()]

    @contextmanager
    def trained(self) -> Iterator[None]:
        """Inside, backward adds to ``whole.grad``, and each slice's gradient is its part of that."""
        self.whole.requires_grad_(True)
        self.whole.grad = torch.zeros_like(self.whole)
        for part, gradient in zip(self.slices, self.whole.grad.unbind(), strict=True):
            part.grad = gradient
        try:
            yield
        finally:
            self.whole.requires_grad_(False)
            for part in (self.whole, *self.slices):
                part.grad = None


class Group:
    """The clients of a pass: how many, and how many rows each of them has in the batch at hand."""

    def __init__(self, clients: int) -> None:
        self.clients, self.rows = clients, 0

    def split(self, x: Tensor) -> Tensor:
        """``x``, (N·b) × … × n, as N × tokens × n. Raises :class:`Unstackable` where x has other rows."""
        if x.dim() < 2 or x.shape[0] != self.clients * self.rows:
            raise Unstackable(f"a layer that is trained gets a tensor of shape {tuple(x.shape)}, not the batch's rows")
        return x.reshape(self.clients, -1, x.shape[-1])


class StackedLinear(nn.Module):
    """``nn.Linear`` with N weights (N × m × n) and biases (N × m)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: Group) -> None:
        super().__init__()
        self.weight, self.bias, self.group = weight, bias, group

    def forward(self, x: Tensor) -> Tensor:
        rows = self.group.split(x).to(self.weight.dtype)
        y = torch.bmm(rows, self.weight.mT)
        return (y if self.bias is None else y + self.bias.unsqueeze(1)).view(*x.shape[:-1], -1)


class StackedLora(nn.Module):
    """LoRA around a frozen layer with N pairs of factors, A (N × r × n), B (N × m × r): y = base(x) + s (x Aᵀ) Bᵀ."""

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, scaling: float, group: Group) -> None:
        super().__init__()
        self.base, self.A, self.B, self.scaling, self.group = base, A, B, scaling, group

    @property
    def weight(self) -> Tensor:
        """That of the frozen layer, for models that look at it before they call it (T5)."""
        return cast(Tensor, self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        h = torch.bmm(self.group.split(x).to(self.A.dtype), self.A.mT)
        added = torch.bmm(h, self.B.mT) * self.scaling
        return y + added.view(y.shape).to(y.dtype)


class _StackedAdapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor, Bs: Tensor, Ps: Tensor, live: Tensor
    ) -> Tensor:
        projected = x @ Ps.T
        tokens, rank = projected.shape[1], live.shape[1]
        ctx.save_for_backward(weight, Bs, Ps, projected.gather(2, live.unsqueeze(1).expand(-1, tokens, rank)))
        return functional.linear(x, weight, bias).baddbmm_(projected, Bs.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, Bs, Ps, projected = ctx.saved_tensors
        dY = grads[0]
        dX = torch.bmm(dY, Bs) @ Ps + dY @ weight if ctx.needs_input_grad[0] else None
        return dX, None, None, torch.bmm(dY.mT, projected), None, None, None


class StackedSubspace(nn.Module):
    """A target layer inside N clients' subspaces, W at rest: y_i = x_i (W + Σ_k B_ik P_k)ᵀ + b over the pool's seeds k
    that any of them has followed.

    A projection is there once, however many clients follow it. ``B`` (N × m × r, as :class:`SubspaceLinear`'s) receives
    the gradients along each client's live seed.
    """

    def __init__(self, layer: nn.Module, rank: int, group: Group) -> None:
        super().__init__()
        self.W, self.bias, self.group, self.rank = matrix(layer), layer.bias, group, rank
        m, n = self.W.shape
        dtype = torch.promote_types(self.W.dtype, torch.float32)
        self.B = Stack(self.W.new_zeros(m, rank, dtype=dtype), group.clients)
        self.seeds: list[int] = []
        self.Ps, self.Bs = self.W.new_zeros(0, n), self.W.new_zeros(group.clients, m, 0)
        self.live = torch.zeros(group.clients, rank, dtype=torch.long, device=self.W.device)  # columns of Bs

    @property
    def weight(self) -> Tensor:
        return self.W

    def forward(self, x: Tensor) -> Tensor:
        rows = self.group.split(x).to(self.W.dtype)
        y = _StackedAdapted.apply(rows, self.W, self.bias, self.B.whole, self.Bs, self.Ps, self.live)
        return cast(Tensor, y).view(*x.shape[:-1], -1)

    def start(self, seed: int, P: Tensor) -> slice:
        """The columns of ``Bs`` that belong to ``seed``, whose projection is ``P`` (r × n)."""
        if seed not in self.seeds:
            self.seeds.append(seed)
            self.Ps = torch.cat([self.Ps, P])
            self.Bs = torch.cat([self.Bs, self.Bs.new_zeros(*self.Bs.shape[:2], len(P))], dim=2)
        first = self.seeds.index(seed) * self.rank
        return slice(first, first + self.rank)


class SubspaceSlice:
    """One client's view of a :class:`StackedSubspace`: what :class:`core.rso.RSO` needs of a layer."""

    def __init__(self, layer: StackedSubspace, client: int) -> None:
        self.layer, self.client, self.W, self.B = layer, client, layer.W, layer.B.slices[client]

    def follow(self, seed: int, P: Tensor, B_k: Tensor) -> None:
        """As :meth:`SubspaceLinear.follow`."""
        self.columns, self.B_k = self.layer.start(seed, P), B_k
        self.layer.live[self.client] = torch.arange(self.columns.start, self.columns.stop)

    def move(self, step: Tensor) -> None:
        """As :meth:`core.subspace.AdapterLinear.move`."""
        self.layer.Bs[self.client][:, self.columns] = self.B_k.to(self.layer.Bs.dtype)


def stacked_linears(
    module: nn.Module, parameters: Sequence[str], group: Group
) -> tuple[dict[str, nn.Module], dict[str, Stack]]:
    """Layers in the place of the linear layers that ``parameters`` of ``module`` belong to, and their stacks by
    parameter. Raises :class:`Unstackable` where a parameter belongs to another kind of layer."""
    stacks = {name: Stack(module.get_parameter(name), group.clients) for name in parameters}
    layers: dict[str, nn.Module] = {}
    for name in dict.fromkeys(parameter.rpartition(".")[0] for parameter in parameters):
        layer = module.get_submodule(name)
        own = {key: stacks.get(f"{name}.{key}") for key, _ in layer.named_parameters()}
        if type(layer) is not nn.Linear or None in own.values():
            raise Unstackable(f"{name} of its head, which is trained, is no linear layer")
        weight, bias = cast(Stack, own["weight"]), own.get("bias")
        layers[name] = StackedLinear(weight.whole, bias.whole if bias else None, group)
    return layers, stacks
