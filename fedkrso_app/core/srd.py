"""FedSRD and FedSRD-e for one layer: prune on the way up, re-factor on the server, sparsify on the way down.

Source: FedSRD, arXiv:2510.04601 (WWW 2026); "step (n)" counts the steps of one round in the paper's order.

Letters and shapes, the same everywhere: a layer's weight is m×n (out × in features) and is adapted by ``B``
(m×r) times ``A`` (r×n). ``B, A`` is the global pair that server and clients share at the start of a round,
``B_i, A_i`` what client i makes of it, ``dB = B_i − B`` and ``dA = A_i − A`` its update, ``p_i`` its weight.
LoRA's scale α/r is common to all and drops out. No function here forms an m×n matrix (only the stacked
factors of :func:`truncated_svd` can outgrow one, with very many clients).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkrso_app.core.projection import layer_key, philox

Term = tuple[float, Tensor, Tensor]
"""``(p_i, B_i, A_i)``, standing for the m×n matrix ``p_i · B_i · A_i``."""


def importance(dB: Tensor, dA: Tensor, A: Tensor, B_local: Tensor) -> tuple[Tensor, Tensor]:
    """Step (2), eq. 5–6: the Frobenius norm of each element's own contribution to ``ΔW_i``, for dB and dA.

    The identity ``ΔW_i = dB·A + B_i·dA`` tells the contributions apart, hence the *old* ``A`` (r×n) and the
    *new* ``B_local = B_i`` (m×r): the old B is zero in round 1 and would make every score of ``dA`` zero.
    Returns the scores of ``dB`` (m×r) and ``dA`` (r×n), in float32 (float64 for float64 updates).
    """
    I_B = _real(dB).abs() * _real(A).norm(dim=1)  # eq. 5: |dB[u,v]| · ‖A[v,:]‖₂
    I_A = _real(dA).abs() * _real(B_local).norm(dim=0)[:, None]  # eq. 6: |dA[u,v]| · ‖B_i[:,u]‖₂
    return I_B, I_A


def sparsity(scores: Tensor, alpha: float, max_sparsity: float) -> float:
    """Step (3): the share ρ of one matrix to prune, ``min(alpha + 0.1·ln κ, max_sparsity)``.

    κ is the Pearson kurtosis (biased estimator, 3 for a normal) of ``scores`` (any shape and float dtype),
    computed in float64; constant scores count as κ = 1, its least value. So ``alpha ≤ ρ ≤ max_sparsity`` for
    ``alpha ≤ max_sparsity``. Raises ``ValueError`` for empty scores or scores that are not finite.
    """
    x = _flat(scores)
    x = x - x.mean()
    squared = float(np.mean(x**2)) ** 2
    kappa = float(np.mean(x**4)) / squared if squared > 0 else 1.0
    rho = alpha + 0.1 * math.log(max(kappa, 1.0))
    return min(rho, max_sparsity)  # the bound is on ρ itself, not on the added term


def prune(delta: Tensor, scores: Tensor, rho: float) -> Tensor:
    """Step (4): ``delta`` with zeros for the share ``rho`` of its elements that has the lowest ``scores``.

    The threshold is the linearly interpolated ``rho``-quantile, for any float dtype and size; elements at the
    threshold stay, except that a score of zero never does. Result in ``delta``'s dtype, on its device. Raises
    ``ValueError`` if ``scores`` has another shape, for ``rho`` outside [0, 1], for empty scores or ones not
    finite.
    """
    if delta.shape != scores.shape:
        raise ValueError(f"delta is {tuple(delta.shape)} but its scores are {tuple(scores.shape)}")
    x = _flat(scores)
    tau = np.quantile(x, rho)
    keep = x >= tau if tau > 0 else x > 0
    return torch.where(_mask(keep, delta), delta, torch.zeros_like(delta))


def compensate_l1(delta: Tensor, pruned: Tensor) -> Tensor:
    """Step (5), not in the paper's text: ``pruned`` scaled up to the L1 norm of ``delta``.

    Both have one shape and dtype, and so has the result: ``pruned`` itself if less than 1e-9 is left of it.
    """
    left, whole = (values.cpu().double().abs().sum().item() for values in (pruned, delta))  # mps has no float64
    return pruned if left < 1e-9 else pruned * (whole / left)


def truncated_svd(Bs: Sequence[Tensor], As: Sequence[Tensor], p: Sequence[float], r: int) -> tuple[Tensor, Tensor]:
    """Step (8), FedSRD only: factors (m×r, r×n) of ``SVD_r(W̄)``, where ``W̄ = Σ p_i·B_i·A_i`` (eq. 9).

    ``Bs[i]`` is m×r_i, ``As[i]`` r_i×n. Works on the stacked factors, QR before SVD, and is exact also when
    Σ r_i exceeds m or n; each factor takes √Σ. Stacked in the given order, in float64; the result stays
    float64 because it goes straight into :func:`least_squares_factors`. Raises ``ValueError`` for sequences
    of different lengths or none at all.
    """
    U, S, Vh = svd_of_sum(Bs, As, p, r)
    root = S.sqrt()
    missing = r - len(root)  # W̄ has fewer than r singular values
    pad = torch.nn.functional.pad
    return pad(U * root, (0, missing)), pad(root[:, None] * Vh, (0, 0, 0, missing))


def svd_of_sum(Bs: Sequence[Tensor], As: Sequence[Tensor], p: Sequence[float], r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m×q), the singular values (q, descending) and Vᵀ (q×n) of Σ p_i·B_i·A_i, the largest q ≤ r; float64.

    q is r unless Σ r_i, m or n is smaller. Raises ``ValueError`` as :func:`truncated_svd` does.
    """
    if not Bs:
        raise ValueError("no client's factors to decompose")
    left = torch.cat([p_i * B_i.double() for p_i, B_i in zip(p, Bs, strict=True)], dim=1)  # m × Σr_i
    right = torch.cat([A_i.double() for _, A_i in zip(Bs, As, strict=True)])  # Σr_i × n
    Q_B, R_B = torch.linalg.qr(left)
    Q_A, R_A = torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)  # W̄ = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ
    return Q_B @ U[:, :r], S[:r], Vh[:r] @ Q_A.T


def least_squares_factors(
    W_terms: Sequence[Term], B: Tensor, A: Tensor, factor: str, rcond: float | None = None
) -> Tensor:
    """Step (8): the least-squares update of one factor towards ``T = Σ p_i·B_i·A_i − B·A``, the other kept.

    ``W_terms`` is all in which the two methods differ. FedSRD gives one term, ``(1.0, *truncated_svd(...))``;
    FedSRD-e every client's ``(p_i, B_i, A_i)``. With ⁺ for Moore–Penrose and the pair B (m×r), A (r×n):

    * ``factor="A"``: ``ΔA = B⁺·T = Σ p_i (B⁺B_i) A_i − (B⁺B) A``, r×n; zero if B is zero;
    * ``factor="B"``: ``ΔB = T·A⁺ = Σ p_i B_i (A_i A⁺) − B (A A⁺)``, m×r.

    Singular values up to ``rcond`` times the largest count as zero in ⁺; None takes torch's default for the
    dtype of the inverted factor (at least float32), eps·max(its sides). Summed in the given order, in
    float64; the result is float32 (float64 if the pair is). Raises ``ValueError`` for another ``factor``.
    """
    fixed = {"A": B, "B": A}.get(factor)
    if fixed is None:
        raise ValueError(f'factor must be "A" or "B", not {factor!r}')
    if rcond is None:
        rcond = torch.finfo(_real(fixed).dtype).eps * max(fixed.shape)
    inverse = torch.linalg.pinv(fixed.double(), rtol=rcond)  # B⁺ is r×m, A⁺ is n×r
    delta = torch.zeros_like(A if factor == "A" else B, dtype=torch.float64)
    for p_i, B_i, A_i in [*W_terms, (-1.0, B, A)]:
        B_i, A_i = B_i.double(), A_i.double()
        delta += p_i * ((inverse @ B_i) @ A_i if factor == "A" else B_i @ (A_i @ inverse))
    # A decomposition leaves 1e-17 where a zero was. Should DARE drop all but that, the next inverse would be 1e17.
    noise = torch.finfo(torch.float32).eps * delta.abs().max()
    return torch.where(delta.abs() > noise, delta, 0.0).to(_real(fixed).dtype)


def dare(delta: Tensor, p: float, rng: np.random.Generator) -> Tensor:
    """Step (9): ``delta`` with each element dropped with probability ``p``, the others divided by ``1 − p``.

    Unbiased. Same shape, dtype and device; the kept positions are ``dare_mask(delta.shape, p, rng)``. Raises
    ``ValueError`` unless 0 ≤ p < 1.
    """
    keep = _mask(dare_mask(delta.shape, p, rng), delta)
    return torch.where(keep, delta / (1 - p), torch.zeros_like(delta))


def dare_rng(seed: int) -> np.random.Generator:
    """The generator of a mask; its seed travels instead of a bitmap."""
    return np.random.Generator(philox(seed, layer_key("dare")))


def dare_mask(shape: Sequence[int], p: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Step (9): the positions to keep, each with probability ``1 − p``, as booleans of the given shape.

    It takes one raw 64-bit word per element, in C order, and depends on nothing else: so the seed of ``rng``
    can travel instead of a bitmap. Raw words because numpy keeps them the same in every version, unlike its
    distributions. ``rng`` must have a 64-bit bit generator (PCG64, Philox, SFC64; not MT19937). Raises
    ``ValueError`` unless 0 ≤ p < 1.
    """
    if not 0 <= p < 1:
        raise ValueError(f"the drop probability must be at least 0 and below 1, not {p}")
    words = np.asarray(rng.bit_generator.random_raw(math.prod(shape)), dtype=np.uint64)
    return ((words >> np.uint64(11)) * 2.0**-53 >= p).reshape(tuple(shape))


def pack_bits(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """``mask`` (any shape) as a bitmap of ⌈size/8⌉ bytes, in C order, lowest bit first, padded with zeros."""
    return np.packbits(mask, axis=None, bitorder="little")


def unpack_bits(data: bytes | NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    """The first ``count`` bits of a bitmap by :func:`pack_bits`, flat.

    Raises ``ValueError`` unless there are exactly ⌈count/8⌉ bytes whose bits beyond ``count`` are all zero.
    """
    packed = np.frombuffer(data, dtype=np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"a bitmap of {count} bits has {-(-count // 8)} bytes, not {len(packed)}")
    bits = np.unpackbits(packed, bitorder="little").astype(bool)
    if bits[count:].any():
        raise ValueError(f"the bitmap has bits set beyond its {count}")
    return bits[:count]


def _real(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _flat(scores: Tensor) -> NDArray[np.float64]:
    x = scores.detach().flatten().cpu().double().numpy()
    if not x.size or not np.isfinite(x).all():
        raise ValueError("importance scores must be finite, and at least one")
    return x


def _mask(keep: NDArray[np.bool_], like: Tensor) -> Tensor:
    return torch.from_numpy(keep).reshape(like.shape).to(like.device)
