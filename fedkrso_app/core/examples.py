"""The gradient of each row of a batch, out of the product that a backward pass makes anyway: what DP-SGD clips.

A layer y = x Wᵀ + b gets the tokens τ of row i as x_iτ. With dY of a loss Σ_i ℓ_i, in which ℓ_i depends on row i alone,

    G_i = Σ_τ dY_iτ x_iτᵀ (m × n)        ‖g_i‖² = Σ_layers ‖G_i‖²        Σ_i min(1, C/‖g_i‖) G_i

In a random subspace x is P x, of r values: all G_i of a layer are b × m × r and take the operations of their sum. Where
a row is one token (a classifier's head), ‖G_i‖ = ‖dY_i‖·‖x_i‖, and G_i is never made.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkrso_app.core.subspace import SubspaceLinear


class NotRows(RuntimeError):
    """A model whose gradient is no sum over the rows of a batch, as far as can be seen; the text says where."""


class RowGradients:
    """What one backward pass over ``rows`` rows says of each row's gradient, for ``parameters``."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.rows = 0
        self._dense: dict[int, Tensor] = {}  # by id of the parameter: b × its shape, or × that of its transpose
        self._outer: dict[int, tuple[Tensor, Tensor]] = {}  # dY, b × m, and x, b × n, whose products are G_i

    def start(self, rows: int) -> None:
        """Begin with the next batch."""
        self.rows = rows
        self._dense, self._outer = {}, {}

    def add(self, weight: Tensor, x: Tensor, dY: Tensor) -> None:
        """Add what a call of a layer gives for its ``weight``, m × n: x is b × tokens × n and dY is b × tokens × m."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, dY.dtype), torch.float32)
        x, dY = x.to(dtype), dY.to(dtype)
        if id(weight) in self._outer:  # the layer is used once more
            before = self._outer.pop(id(weight))
            self._dense[id(weight)] = _products(before[1].unsqueeze(1), before[0].unsqueeze(1))
        elif x.shape[1] == 1 and id(weight) not in self._dense:
            self._outer[id(weight)] = dY.squeeze(1), x.squeeze(1)
            return
        self._add(weight, _products(x, dY))

    def add_bias(self, bias: Tensor, dY: Tensor) -> None:
        """The same for the m values of ``bias``."""
        self._add(bias, dY.sum(1, dtype=torch.promote_types(dY.dtype, torch.float32)))

    def add_projected(self, B: Tensor, projected: Tensor, dY: Tensor) -> None:
        """The same for a layer in a subspace: its P x is r × tokens and dY is tokens × m, row by row."""
        self.add(B, projected.view(len(projected), self.rows, -1).permute(1, 2, 0), dY.view(self.rows, -1, len(B)))

    def _add(self, parameter: Tensor, G: Tensor) -> None:
        before = self._dense.get(id(parameter))
        self._dense[id(parameter)] = G if before is None else before.add_(G)

    def norms(self) -> Tensor:
        """‖g_i‖ over all parameters, (b,)."""
        vector_norm = torch.linalg.vector_norm
        parts = [vector_norm(G.flatten(1), dim=1) for G in self._dense.values()]
        parts += [vector_norm(dY, dim=1) * vector_norm(x, dim=1) for dY, x in self._outer.values()]
        return vector_norm(torch.stack(parts), dim=0) if parts else torch.zeros(self.rows)

    def weighted(self, weights: Tensor) -> list[Tensor | None]:
        """Σ_i w_i G_i of every parameter, with its shape; None where no layer was called. ``weights`` are (b,). A row
        of weight 0 counts as nothing, even if its gradient is not finite."""
        if not bool(weights.all()):
            out = weights == 0
            for G in self._dense.values():
                G[out] = 0
            for key, (dY, x) in self._outer.items():
                self._outer[key] = dY.masked_fill(out[:, None], 0), x.masked_fill(out[:, None], 0)
        return [self._weighted(parameter, weights) for parameter in self.parameters]

    def _weighted(self, parameter: nn.Parameter, weights: Tensor) -> Tensor | None:
        if (pair := self._outer.get(id(parameter))) is not None:
            dY, x = pair
            return dY.T @ (x * weights.to(x.dtype)[:, None])
        if (G := self._dense.get(id(parameter))) is None:
            return None
        total = (weights.to(G.dtype) @ G.flatten(1)).view(G.shape[1:])
        return total if parameter.dim() < 2 or _wide(*parameter.shape) else total.T

    def clipped(self, clip: float) -> list[Tensor | None]:
        """Σ_i min(1, C/‖g_i‖) G_i of every parameter, as :meth:`weighted`; a row whose gradient is not finite is left
        out."""
        norms = self.norms()
        rounding = 1 + 8 * torch.finfo(norms.dtype).eps  # of the norms, which must not be too small
        scale = (clip / (norms * rounding)).clamp(max=1)  # 1 where a norm is 0
        return self.weighted(torch.where(torch.isfinite(norms), scale, torch.zeros_like(scale)))


def _wide(m: int, n: int) -> bool:
    """Whether G_i is kept as m × n, else as n × m: the long side along memory is faster."""
    return n > m


def _products(x: Tensor, dY: Tensor) -> Tensor:
    return torch.bmm(dY.mT, x) if _wide(dY.shape[-1], x.shape[-1]) else torch.bmm(x.mT, dY)


class _RowLinear(torch.autograd.Function):
    """A linear layer that hands x and dY to ``take`` instead of making its own gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, take: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.take = take
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dY = grads[0]
        ctx.take(x, dY)
        dX = (dY @ weight.to(dY.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None  # autocast had its own
        return dX, None, None, None


@contextmanager
def row_gradients(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[RowGradients]:
    """Inside, a backward pass through ``module`` leaves the rows' gradients of ``parameters`` in what is yielded, and
    none in the parameters themselves.

    Every layer that holds one of them must be an ``nn.Linear`` or a :class:`SubspaceLinear`, and its input must have
    the batch first. Raises :class:`NotRows`.
    """
    found, wanted = RowGradients(parameters), {id(parameter) for parameter in parameters}
    with ExitStack() as stack:
        for name, part in module.named_modules():
            own = {id(p) for p in part.parameters(recurse=False)} & wanted
            if not own:
                continue
            if isinstance(part, SubspaceLinear):
                stack.enter_context(_set(part, "gradient", partial(found.add_projected, part.B)))
            elif type(part) is nn.Linear:
                stack.enter_context(_set(part, "forward", partial(_forward, part, own, found)))
            else:
                continue
            stack.callback(part.register_forward_pre_hook(partial(_check_rows, name, found)).remove)
            wanted -= own
        if wanted:
            name = next((name for name, p in module.named_parameters() if id(p) in wanted), "a parameter")
            raise NotRows(f"{name}, which is trained, is not in a linear layer")
        yield found


def _forward(layer: nn.Linear, own: set[int], found: RowGradients, x: Tensor) -> Tensor:
    def take(x: Tensor, dY: Tensor) -> None:
        x, dY = x.reshape(found.rows, -1, x.shape[-1]), dY.reshape(found.rows, -1, dY.shape[-1])
        if id(layer.weight) in own:
            found.add(layer.weight, x, dY)
        if id(layer.bias) in own:
            found.add_bias(layer.bias, dY)

    return cast(Tensor, _RowLinear.apply(x, layer.weight, layer.bias, take))


def _check_rows(name: str, found: RowGradients, part: nn.Module, args: tuple[Tensor, ...]) -> None:
    shape = tuple(args[0].shape) if args else ()
    if len(shape) < 2 or shape[0] != found.rows:
        raise NotRows(f"layer {name} gets a tensor of shape {shape}, whose first axis is not the batch")


@contextmanager
def _set(part: nn.Module, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Let ``value`` stand for an attribute of ``part``, on top of what may stand for it already."""
    before = part.__dict__.get(name)
    setattr(part, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(part, name)
        else:
            setattr(part, name, before)
