"""Directions z that a seed stands for, and W ← W + Σ_k s_k z_k: what zeroth-order methods send scalars along.

A matrix gets z = C P of low rank, whose entries have mean 0 and variance 1 and are uncorrelated, as those of a dense z
are: E[vec z (vec z)ᵀ] = I. So y = x(W ± εz)ᵀ is xWᵀ ± ε(xPᵀ)Cᵀ, W itself is never perturbed, and any number of
scalars is applied in one product (LOZO, arXiv:2410.07698, perturbs along such products too). All values are random
signs, whose bits depend on no mathematical library.

``rank`` = 0 stands for the dense z ~ N(0, I) that the papers draw: exact in law, slow, and for small models.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedkrso_app.core.projection import projections, stream
from fedkrso_app.core.subspace import fold

_CHUNK = 1 << 23  # values drawn at once


def seeds_of(root: int, count: int) -> list[int]:
    """``count`` seeds in [0, 2**64) that one ``root`` stands for."""
    return stream(root, "directions").integers(2**64, size=count, dtype=np.uint64).tolist()


def pair(seeds: Sequence[int], name: str, m: int, n: int, rank: int) -> tuple[Tensor, Tensor]:
    """C (s × m × r) and P (s × r × n), float32, with z_k = C_k P_k for the m × n matrix ``name`` and every seed k.

    P is that of :func:`projections` with random signs, C has entries ±1. With ``rank`` 0 it is C = z and P = I.
    """
    if not rank:
        return _dense(seeds, name, m * n, "gaussian").view(-1, m, n), torch.eye(n).expand(len(seeds), n, n)
    P = torch.from_numpy(projections(seeds, name, rank, n, "rademacher"))
    return _dense(seeds, name + "/left", m * rank, "rademacher").view(-1, m, rank), P


def vectors(seeds: Sequence[int], name: str, size: int, rank: int) -> Tensor:
    """z of the tensor ``name`` with ``size`` values that is no matrix, s × size, float32: random signs whatever the
    rank; with ``rank`` 0 z ~ N(0, I)."""
    return _dense(seeds, name, size, "rademacher" if rank else "gaussian")


@torch.no_grad()
def move(W: Tensor, seeds: Sequence[int], scalars: Sequence[float], name: str, rank: int) -> None:
    """W ← W + Σ_k s_k z_k in place, for the m × n matrix ``name``: many seeds in one product, in their order."""
    m, n = W.shape
    for chosen, s in _parts(seeds, scalars, (rank or n) * (m + n)):
        C, P = pair(chosen, name, m, n, rank)
        fold(W, C.to(W) * s.to(W)[:, None, None], P.to(W))


@torch.no_grad()
def move_vector(v: Tensor, seeds: Sequence[int], scalars: Sequence[float], name: str, rank: int) -> None:
    """The same for a tensor of any shape that is no matrix."""
    for chosen, s in _parts(seeds, scalars, v.numel()):
        Z = vectors(chosen, name, v.numel(), rank)
        v.add_((s.to(v) @ Z.to(v)).view_as(v))


def _parts(seeds: Sequence[int], scalars: Sequence[float], size: int):
    """Seeds and scalars, as many at once as draw ``_CHUNK`` values of ``size`` each."""
    count = max(1, _CHUNK // max(1, size))
    for start in range(0, len(seeds), count):
        yield seeds[start : start + count], torch.tensor(scalars[start : start + count])


def _dense(seeds: Sequence[int], name: str, size: int, kind: str) -> Tensor:
    """s × size values of mean 0 and variance 1."""
    return torch.from_numpy(projections(seeds, name, 1, size, kind)[:, 0])
