"""Shamir's secret sharing: any t of n shares give a secret of 32 bytes, t − 1 tell nothing of it.

Share i of n is f(i), i = 1 … n, with f(0) the secret and t − 1 coefficients drawn from the operating system, modulo a
prime above 2^256. Also how large t must be for a sum of many to stay one (:func:`least_threshold`, :func:`honest`).
"""

import secrets
from collections.abc import Sequence

PRIME = 2**256 + 297
SECRET = 32  # bytes
SHARE = 33


def split(secret: bytes, threshold: int, n: int) -> list[bytes]:
    """Shares 1 … ``n`` of ``secret``, of which ``threshold`` give it back."""
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_evaluate(coefficients, x) for x in range(1, n + 1)]


def weights(points: Sequence[int]) -> list[int]:
    """Lagrange's at 0 for the shares number ``points`` (from 1, all different)."""
    found = []
    for i in points:
        above = below = 1
        for j in points:
            if j != i:
                above, below = above * j % PRIME, below * (j - i) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return found


def join(shares: Sequence[bytes], weights: Sequence[int]) -> bytes:
    """The secret of as many shares as :func:`split` was told, with their :func:`weights`. Raises ValueError where they
    are not shares of one."""
    total = sum(int.from_bytes(share) * weight for share, weight in zip(shares, weights, strict=True)) % PRIME
    if total >= 2 ** (8 * SECRET):
        raise ValueError("these are no shares of one secret")
    return total.to_bytes(SECRET)


def least_threshold(n: int) -> int:
    """The smallest t that keeps sums of ``n`` whole: ⌊2n/3⌋ + 1."""
    return 2 * n // 3 + 1


def usual_threshold(n: int) -> int:
    """⌈0.8 n⌉; up to six :func:`least_threshold`, so that one of four may be missing."""
    return least_threshold(n) if n <= 6 else -(-4 * n // 5)


def honest(n: int, threshold: int, colluding: int) -> int:
    """How many honest parties the smallest sum has that a lying server opens with ``colluding`` of ``n``; 0 where the
    threshold rules out nothing.

    It names other survivors to each party. To leave out an honest one, ``threshold − colluding`` honest answers must
    omit it, and one answer omits at most ``n − threshold``.
    """
    t, c = threshold, colluding
    if 2 * t <= n + c or t <= c:
        return 0
    return min(t - c, -(-(n - c) * (2 * t - n - c) // (t - c)))


def _evaluate(coefficients: Sequence[int], x: int) -> bytes:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value.to_bytes(SHARE)
