"""Secret noise: Gaussians from a cipher keyed by the operating system, and clipping that no rounding exceeds.

Nothing here may come from the run's seed, which everyone knows: who can draw the noise again can subtract it. The
stream is AES-256-CTR, read as little-endian words; z is Box-Muller on pairs of them. The radius uses all 64 bits, so
the tails end at √(2 ln 2^64) = 9.4.
"""

import hashlib
import hmac
import os
from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES = 32
_CHUNK = 1 << 16  # values drawn at once, so that they stay in the cache

BITS = 36  # fractional bits of a clipped value: the grid of :mod:`core.fixed_point`
# Of a clip, and of a noise over its clip: the sum of 100,000 clipped updates and its noise has 63 bits.
LARGEST = 1024.0
_MARGIN = 1e-9  # of a norm in float64, and more than summing 1e9 squares can lose


def fresh_key() -> bytes:
    """32 bytes from the operating system."""
    return os.urandom(KEY_BYTES)


def derived_key(key: bytes, *labels: str | int) -> bytes:
    """HMAC-SHA256: a key of its own for each purpose, ``derived_key(key, "noise", round)``."""
    return hmac.new(key, "/".join(str(label) for label in labels).encode(), hashlib.sha256).digest()


def public_key(seed: int) -> bytes:
    """A key that follows from the run's seed: for tests and comparisons; it protects nothing."""
    return hashlib.sha256(f"fedkrso/public-noise/{seed}".encode()).digest()


def key_for(randomness: str, seed: int, *labels: str | int) -> bytes:
    """A key for one purpose, by ``privacy.randomness``: from the operating system ("os"), or from the run's seed."""
    return fresh_key() if randomness == "os" else derived_key(public_key(seed), *labels)


class NoiseStream:
    """The numbers of one key, in order. Two streams of one key are the same, so a key serves once."""

    def __init__(self, key: bytes) -> None:
        """``key``: 32 bytes."""
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def words(self, size: int) -> np.ndarray:
        """The next ``size`` words, uint64."""
        return np.frombuffer(self._cipher.update(bytes(8 * size)), dtype="<u8")

    def uniform(self, size: int) -> np.ndarray:
        """``size`` numbers in [0, 1), float64, multiples of 2^-53: coins."""
        return (self.words(size) >> np.uint64(11)) * 2.0**-53

    def normal(self, *shape: int) -> np.ndarray:
        """An array of independent N(0, 1), float64."""
        size = int(np.prod(shape))
        z = np.empty(size + size % 2)
        for start in range(0, z.size, _CHUNK):
            pairs = self.words(min(_CHUNK, z.size - start)).reshape(-1, 2)
            radius = np.sqrt(-2.0 * np.log((pairs[:, 0].astype(np.float64) + 1.0) * 2.0**-64))
            angle = (pairs[:, 1] >> np.uint64(11)) * (2.0 * np.pi * 2.0**-53)
            z[start : start + 2 * len(pairs) : 2] = radius * np.cos(angle)
            z[start + 1 : start + 2 * len(pairs) : 2] = radius * np.sin(angle)
        return z[:size].reshape(shape)

    def integers(self, size: int, deviation: float) -> np.ndarray:
        """rint(``deviation`` · z), int64: noise on a sum of integers. It is a continuous Gaussian rounded afterwards,
        so the low bits of floats (Mironov 2012) tell nothing."""
        return np.rint(self.normal(size) * deviation).astype(np.int64)


def clipped(arrays: Mapping[str, np.ndarray], clip: float) -> dict[str, np.ndarray]:
    """``arrays`` (floats) scaled down to one flat L2 norm of at most ``clip``; float32.

    Every value is an integer multiple q of 2^-36 that float32 holds exactly, rounded toward zero, and Σ q² ≤
    (clip · 2^36)² without exception. Clipping twice changes nothing. An update that is not finite becomes zeros: to
    refuse it would tell something about its data.
    """
    norm = flat_norm(arrays)
    if not np.isfinite(norm):
        return {name: np.zeros(x.shape, np.float32) for name, x in arrays.items()}
    factor = 1.0 if norm * (1 + _MARGIN) <= clip else clip / norm * (1 - 3 * _MARGIN)
    return {name: _toward_zero(x, factor) for name, x in arrays.items()}


def flat_norm(arrays: Mapping[str, np.ndarray]) -> float:
    """The L2 norm of all ``arrays`` as one vector; not finite if a value is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.sqrt(sum(_square(x) for x in arrays.values())))


def _square(x: np.ndarray) -> float:
    flat = x.reshape(-1)
    parts = (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))
    return float(np.sum([np.square(part, dtype=np.float64).sum() for part in parts]))


def _toward_zero(x: np.ndarray, factor: float) -> np.ndarray:
    """x · factor on the grid 2^-36 and within float32's 24 bits, no value further from zero than it was."""
    flat, out = x.reshape(-1), np.empty(x.size, np.float32)
    for i in range(0, flat.size, _CHUNK):
        exact = np.trunc(flat[i : i + _CHUNK].astype(np.float64) * (factor * 2.0**BITS)) * 2.0**-BITS
        near = exact.astype(np.float32)
        out[i : i + _CHUNK] = np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
    return out.reshape(x.shape)
