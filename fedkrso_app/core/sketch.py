"""What of an update Δ is left when it is projected afterwards: along single directions, or onto rows.

Any fixed Δ keeps, in expectation, the share (coefficients)/(values) of its energy, whichever random directions are
drawn. What differs is the scale at which they give it back.
"""

import torch
from torch import Tensor

from fedkrso_app.core.directions import pair
from fedkrso_app.core.projection import projection


def coefficients(delta: Tensor, seeds: list[int], name: str, rank: int, scale: str) -> Tensor:
    """γ_k = c ⟨Δ, z_k⟩ for the m × n matrix Δ of ``name`` along the low-rank directions of K seeds (Ferret); K values.

    ``unbiased``: c = 1/K, E[Σ γ_k z_k] = Δ, with noise of about √(mn/K) times Δ's own length. ``contractive``:
    c = 1/(mn + K + 1), which has the least mean squared error of all c for directions z ~ N(0, I).
    """
    m, n = delta.shape
    C, P = (part.to(delta) for part in pair(seeds, name, m, n, rank))
    K, _, r = C.shape
    along = (delta @ P.reshape(K * r, n).T).view(m, K, r)  # Δ P_kᵀ; then tr(C_kᵀ Δ P_kᵀ)
    products = (along.permute(1, 0, 2) * C).sum(dim=(1, 2))
    return products / (K if scale == "unbiased" else m * n + K + 1)


def rows(seed: int, name: str, R: int, n: int) -> Tensor:
    """Q, R × n with QQᵀ = I, Haar distributed: U Qᵀ Q is the nearest to U in its span, and never longer than U."""
    return torch.from_numpy(projection(seed, name, R, n, "orthonormal") * (R / n) ** 0.5)


def shares(lengths: list[float], K: int) -> list[int]:
    """How many of K directions each block gets (Ferret's rule): K for the longest update, in proportion, at least 2."""
    longest = max(lengths)
    return [min(K, max(2, int(K * length / longest))) if longest else min(K, 2) for length in lengths]
