"""Layers for the rows of several clients in one pass: the frozen weights are common, each client has its own factors.

Rows come client by client (the first client's b, then the next one's), so that x, (N·b) × … × n, is N × tokens × n. A
client's part of a result depends on its own rows and parameters alone, to the bit.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkrso_app.core.rso import RSO, adam_update
from fedkrso_app.core.subspace import dense_of, matrix

T = TypeVar("T")


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
        ctx: Any,
        x: Tensor,
        dense: Callable[[], Tensor],
        bias: Tensor | None,
        B: Tensor,
        Bs: Tensor,
        Ps: Tensor,
        live: Tensor,
    ) -> Tensor:
        ctx.dense = dense
        projected = x @ Ps.T
        tokens, rank = projected.shape[1], live.shape[1]
        ctx.save_for_backward(Bs, Ps, projected.gather(2, live.unsqueeze(1).expand(-1, tokens, rank)))
        return functional.linear(x, dense(), bias).baddbmm_(projected, Bs.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        Bs, Ps, projected = ctx.saved_tensors
        dY = grads[0]
        dX = torch.bmm(dY, Bs) @ Ps + dY @ ctx.dense() if ctx.needs_input_grad[0] else None
        return dX, None, None, torch.bmm(dY.mT, projected), None, None, None


class StackedSubspace(nn.Module):
    """A target layer inside N clients' subspaces, W at rest: y_i = x_i (W + Σ_k B_ik P_k)ᵀ + b over the pool's seeds k
    that any of them has followed.

    A projection is there once, however many clients follow it. ``B`` (N × m × r, as :class:`SubspaceLinear`'s) receives
    the gradients along each client's live seed.
    """

    fixed = False

    def __init__(self, layer: nn.Module, rank: int, group: Group) -> None:
        super().__init__()
        self.W, self.bias, self.group, self.rank = matrix(layer), layer.bias, group, rank
        self.dense = dense_of(layer)
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
        y = _StackedAdapted.apply(rows, self.dense, self.bias, self.B.whole, self.Bs, self.Ps, self.live)
        return cast(Tensor, y).view(*x.shape[:-1], -1)

    def start(self, seed: int, P: Tensor) -> slice:
        """The columns of ``Bs`` that belong to ``seed``, whose projection is ``P`` (r × n)."""
        new = seed not in self.seeds
        if new:
            self.seeds.append(seed)
        first = self.seeds.index(seed) * self.rank
        columns = slice(first, first + self.rank)
        if new and self.fixed:
            self.Ps[columns] = P
        elif new:
            self.Ps = torch.cat([self.Ps, P])
            self.Bs = torch.cat([self.Bs, self.Bs.new_zeros(*self.Bs.shape[:2], len(P))], dim=2)
        return columns

    def fix(self, seeds: int, B: Tensor) -> None:
        """Keep every tensor in its place from now on; at most ``seeds`` projections will be followed. ``B`` (N × m × r)
        will hold each client's accumulator along its live seed."""
        self.Ps = self.W.new_zeros(seeds * self.rank, self.W.shape[1])
        self.Bs = self.W.new_zeros(*B.shape[:2], seeds * self.rank)
        self.lives = torch.zeros(B.shape[0], 1, seeds, 1, dtype=torch.bool, device=B.device)  # which seed it is
        self.of_live, self.fixed = B, True

    def settle(self) -> None:
        """Take over the accumulators of all clients at once."""
        by_seed = self.Bs.view(*self.Bs.shape[:2], -1, self.rank)
        by_seed.copy_(torch.where(self.lives, self.of_live.unsqueeze(2).to(by_seed.dtype), by_seed))


class SubspaceSlice:
    """One client's view of a :class:`StackedSubspace`: what :class:`core.rso.RSO` needs of a layer."""

    def __init__(self, layer: StackedSubspace, client: int) -> None:
        self.layer, self.client, self.W, self.B = layer, client, layer.W, layer.B.slices[client]

    def kept(self, seed: int) -> Tensor | None:
        """As :meth:`SubspaceLinear.kept`: drawn once for all clients of a pass."""
        layer = self.layer
        return layer.Ps[layer.start(seed, layer.Ps)] if seed in layer.seeds else None

    def follow(self, seed: int, P: Tensor, B_k: Tensor) -> None:
        """As :meth:`SubspaceLinear.follow`."""
        self.columns, self.B_k = self.layer.start(seed, P), B_k
        columns = torch.arange(self.columns.start, self.columns.stop, device=self.layer.live.device)
        self.layer.live[self.client] = columns
        if self.layer.fixed:
            self.layer.lives[self.client] = False
            self.layer.lives[self.client, 0, self.columns.start // self.layer.rank] = True

    def move(self, step: Tensor) -> None:
        """As :meth:`core.subspace.AdapterLinear.move`."""
        self.layer.Bs[self.client][:, self.columns] = self.B_k.to(self.layer.Bs.dtype)


class StackedRSO(torch.optim.Optimizer):
    """The RSOs of all clients of a pass as one, with every tensor in its place (:meth:`RSO.fix`); each still opens its
    own intervals. Its state is N × Q, a row for each client."""

    def __init__(self, each: Sequence[RSO]) -> None:
        self.each = list(each)
        self.layers = [cast(SubspaceSlice, part).layer for part in each[0].layers.values()]
        super().__init__([layer.B.whole for layer in self.layers], {"lr": each[0].param_groups[0]["lr"]})
        pool, followed = each[0].seeds
        N, seeds = len(each), min(pool, len(each) * followed)
        whole = self.layers[0].B.whole
        self.M, self.V, self.B = whole.new_zeros(3, N, sum(each[0].sizes))
        self.i = whole.new_zeros(N, 1, dtype=torch.float64)
        for rso, *rows, i in zip(each, self.M, self.V, self.B, self.i, strict=True):
            rso.fix(*rows, i)
        for layer, block in zip(self.layers, self.B.split(each[0].sizes, dim=1), strict=True):
            layer.fix(seeds, block.view(layer.B.whole.shape))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """As :meth:`RSO.step`, for every client."""
        for rso in self.each:
            for hook in rso._optimizer_step_pre_hooks.values():
                hook(rso, (), {})
        self.i += 1
        G = torch.cat([cast(Tensor, layer.B.whole.grad).flatten(1) for layer in self.layers], dim=1)
        first = self.each[0]
        U = G if first.betas is None else adam_update(G, self.M, self.V, self.i, first.betas, first.eps)
        self.B += U.mul_(-self.param_groups[0]["lr"])
        for layer in self.layers:
            layer.settle()


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


def sliced(half: T, stacks: Mapping[int, Stack], client: int) -> T:
    """``half`` for one client of a pass: the same, with slices in the place of the parameters that ``stacks`` (by the
    id of the parameter) were made of."""

    def swapped(value: Any) -> Any:
        if isinstance(value, nn.Parameter) and id(value) in stacks:
            return stacks[id(value)].slices[client]
        if isinstance(value, dict):
            return {key: swapped(item) for key, item in value.items()}
        return type(value)(map(swapped, value)) if type(value) in (list, tuple) else value

    own = copy.copy(half)
    vars(own).update({name: swapped(value) for name, value in vars(half).items()})
    return own
