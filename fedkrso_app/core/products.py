"""Sums of products of factors, Σ p_i·B_i·A_i, without any m×n matrix: what the LoRA methods make of a round's replies.

Letters and shapes as in :mod:`core.srd`: ``B_i`` (m×r_i) times ``A_i`` (r_i×n) is what client i adapts a layer's weight
by, ``p_i`` its weight, Σ p_i = 1; LoRA's scale drops out. All work in float64, in the order given.

Where ranks differ, factors are laid out *by component*: row k of ``A`` (R × Σn) has the rows A[k, :] of all layers side
by side, row k of ``B`` (R × Σm) their columns B[:, k]. Then a smaller rank is the first rows.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedkrso_app.core.srd import svd_of_sum, truncated_svd


def by_component(pairs: Sequence[tuple[Tensor, Tensor]], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``rank`` components of each layer's (A, B): ``A`` rank × Σn and ``B`` rank × Σm, float32."""
    A = torch.cat([A.detach()[:rank] for A, _ in pairs], dim=1)
    B = torch.cat([B.detach()[:, :rank].T for _, B in pairs], dim=1)
    return A.to("cpu", torch.float32).numpy(), B.to("cpu", torch.float32).contiguous().numpy()


def by_layer(A: np.ndarray, B: np.ndarray, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each layer's (A, B), r × n and m × r, of arrays by component; ``sizes`` has the layers' (m, n)."""
    ms, ns = zip(*sizes, strict=True)
    of_A, of_B = (torch.from_numpy(np.require(rows, requirements="W")) for rows in (A, B))
    for A_l, B_l in zip(of_A.split(ns, dim=1), of_B.split(ms, dim=1), strict=True):
        yield A_l, B_l.T


def spectral(
    Bs: Sequence[Tensor], As: Sequence[Tensor], p: Sequence[float], r: int, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of rank r of Σ p_i·B_i·A_i: B = U_r·Σ_r, A = V_rᵀ, singular values descending.

    A's rows are orthonormal in any case: where the sum has fewer than r components, B is zero there, and A is completed
    along the rows of ``spare`` (r × n). A component that is zero in both factors would never train again.
    """
    short = max(0, r - sum(B.shape[1] for B in Bs))
    Bs, As = [*Bs, Bs[0].new_zeros(len(Bs[0]), short)], [*As, spare[:short]]
    U, S, Vh = svd_of_sum(Bs, As, [*p, 1.0], r)
    return U * S, Vh


def residual(As: np.ndarray, Bs: np.ndarray, p: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Factors of Σ p_i·B_i·A_i − (Σ p_i·B_i)·(Σ p_i·A_i) by component, (c−1)·r of them, for all layers at once.

    ``As`` is c × r × Σn, ``Bs`` c × r × Σm. With u = √p, a unit vector, and H' the columns of a Householder reflection
    beside the one along u, H'·H'ᵀ = I − u·uᵀ. So the blocks D_j = Σ_i u_i·H'_ij·(A_i, B_i) multiply to the difference.
    """
    u = np.sqrt(np.asarray(p))
    v = u.copy()
    v[0] += 1.0  # u has no negative part: nothing cancels
    mix = (u[:, None] * (np.eye(len(u)) - 2 * np.outer(v, v) / (v @ v)))[:, 1:]
    return _mixed(mix, As), _mixed(mix, Bs)


def _mixed(mix: np.ndarray, parts: np.ndarray) -> np.ndarray:
    return np.tensordot(mix.T, parts.astype(np.float64), 1).reshape(-1, parts.shape[-1])


def truncated(
    A: np.ndarray, B: np.ndarray, sizes: Sequence[tuple[int, int]], rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of factors by component those of the best approximation of ``rank``, layer by layer; as they are if no larger."""
    if len(A) <= rank:
        return A, B
    pairs = [truncated_svd([B_l], [A_l], [1.0], rank)[::-1] for A_l, B_l in by_layer(A, B, sizes)]
    return by_component(pairs, rank)


def ridge(Bs: Sequence[Tensor], As: Sequence[Tensor], p: Sequence[float], penalty: float) -> Tensor:
    """ΔB (m × r) that brings (B̄ + ΔB)·Ā nearest to Σ p_i·B_i·A_i, where B̄ and Ā are the weighted means.

    It minimises ‖Σ p_i·B_i·A_i − (B̄ + ΔB)·Ā‖² + λ‖ΔB‖² with λ = ``penalty`` · tr(ĀĀᵀ)/r.
    """
    Bs, As = [B.double() for B in Bs], [A.double() for A in As]
    B_mean, A_mean = (torch.stack([share * X for share, X in zip(p, Xs, strict=True)]).sum(0) for Xs in (Bs, As))
    target = torch.zeros_like(B_mean)
    for share, B, A in zip(p, Bs, As, strict=True):
        target += share * (B - B_mean) @ ((A - A_mean) @ A_mean.T)
    gram = A_mean @ A_mean.T
    gram = gram + penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return target @ torch.linalg.pinv(gram, hermitian=True)


def squared_norm(A: Tensor, B: Tensor) -> float:
    """‖B·A‖² (Frobenius) as tr((BᵀB)·(AAᵀ)), two r×r matrices."""
    A, B = A.double(), B.double()
    return float(((B.T @ B) * (A @ A.T)).sum())
