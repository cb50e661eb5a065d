"""Weights of few bits: what a client computes with in the place of a W that does not move meanwhile.

64 values in a row share a scale, the largest magnitude among them. ``int8`` rounds each to a multiple of 1/127 of it,
``nf4`` to one of 16 quantiles of a normal distribution (QLoRA, arXiv:2305.14314), whose scales are rounded to 8 bits in
turn. So a weight takes 8.5 or 4.13 bits. Dequantised, one layer at a time, for each product.

bitsandbytes does it, with kernels for CUDA and for CPUs. It is imported when weights of few bits are first made.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

INSTALL = "pip install 'bitsandbytes>=0.49,<0.51'"
KINDS = ("int8", "nf4")
_BLOCK = 64


def pack(W: Tensor, kind: str) -> tuple[Tensor, Any]:
    """``W`` (m × n) in few bits of a ``kind``, on its device: what :func:`unpack` takes.

    Raises ImportError without bitsandbytes.
    """
    import bitsandbytes.functional as few

    if kind == "nf4":
        return few.quantize_4bit(W, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
    levels = few.create_linear_map(signed=True, total_bits=8).to(W.device)
    return few.quantize_blockwise(W, code=levels, blocksize=_BLOCK)


def unpack(packed: tuple[Tensor, Any], kind: str) -> Tensor:
    """The matrix that was packed, m × n and of its dtype, as far as few bits say."""
    import bitsandbytes.functional as few

    return few.dequantize_4bit(*packed) if kind == "nf4" else few.dequantize_blockwise(*packed)


def probe(kind: str, device: torch.device) -> None:
    """Pack and unpack a small matrix on ``device``. Raises what does not work there, ImportError without the library,
    and ArithmeticError where something else comes out."""
    W = torch.linspace(-1, 1, 4 * _BLOCK, device=device).view(4, _BLOCK)
    if float((unpack(pack(W, kind), kind) - W).abs().max()) > 0.2:  # nf4's widest gap is .3 of the scale
        raise ArithmeticError("what is unpacked is not what was packed")


class _FrozenLinear(torch.autograd.Function):
    """x W_qᵀ + b. Of the layer nothing is kept for backward but itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: "FewBits") -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.dense(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dY = grads[0]
        dX = dY @ ctx.layer.dense() if ctx.needs_input_grad[0] else None
        db = dY.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return dX, db, None


class FewBits(nn.Module):
    """A frozen linear layer y = x W_qᵀ + b, in the place of one whose matrix is ``exact`` (m × n, anywhere).

    ``weight`` tells shape, dtype and device of what is computed with. It has no memory, and its values are NaN: no
    model may compute with it unnoticed.
    """

    def __init__(
        self, exact: Tensor, bias: nn.Parameter | None, kind: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.exact, self.bias, self.kind = exact, bias, kind
        self.weight: Tensor = torch.full((), math.nan, dtype=dtype, device=device).expand(exact.shape)
        self.full = False
        self.quantize()

    def quantize(self) -> None:
        """Make W_q anew from ``exact`` as it is now."""
        self.packed = pack(self.exact.to(self.weight).contiguous(), self.kind)

    def dense(self) -> Tensor:
        """The matrix of a product, m × n: W_q, or inside :func:`in_full` W itself, brought here for the moment."""
        return self.exact.to(self.weight) if self.full else unpack(self.packed, self.kind)

    def distance(self) -> float:
        """‖W_q − W‖ / ‖W‖ (Frobenius)."""
        W = self.exact.to(self.weight).float()
        return float((unpack(self.packed, self.kind) - W).norm() / W.norm())

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return cast(Tensor, _FrozenLinear.apply(x.to(self.weight.dtype), bias, self))


def requantize(layers: Iterable[nn.Module]) -> None:
    """Make those of ``layers`` that have few bits anew from their W as it is now."""
    for layer in layers:
        if isinstance(layer, FewBits):
            layer.quantize()


@contextmanager
def in_full(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, those of ``layers`` that have few bits compute with W itself, one layer at a time."""
    few = [layer for layer in layers if isinstance(layer, FewBits)]
    try:
        for layer in few:
            layer.full = True
        yield
    finally:
        for layer in few:
            layer.full = False
