"""Numbers that can be masked: integers modulo 2^64, 2^32 or 2^16, and the keystreams that hide them.

At 64 bits a value is what :mod:`core.fixed_point` makes of it, so that sums are the same to the bit. At 32 and 16 bits
it is a multiple of a step that follows from a public range: the sum of all has one bit to spare, and so a value beyond
what honest clients can add up to is seen.
"""

import math

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BITS = (64, 32, 16)
_CHUNK = 1 << 18  # bytes of keystream made at once


def word(bits: int) -> np.dtype:
    """The dtype of a masked value: unsigned, little-endian."""
    return np.dtype(f"<u{bits // 8}")


def add_keystream(total: np.ndarray, key: bytes, label: int, sign: int) -> None:
    """Add to ``total`` (words, contiguous, in place, modulo 2^bits) ``sign`` times the keystream of ``key``.

    AES-256 in counter mode; ``label`` (0 to 255) keeps the streams of one key apart.
    """
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes([label]) + bytes(15))).encryptor()
    step = _CHUNK // total.itemsize
    zeros = bytes(_CHUNK)
    buffer = bytearray(_CHUNK + 15)
    for start in range(0, total.size, step):
        part = total[start : start + step]
        size = stream.update_into(memoryview(zeros)[: part.nbytes], buffer)
        words = np.frombuffer(buffer, total.dtype, count=size // total.itemsize)
        if sign > 0:
            part += words
        else:
            part -= words


def step(reach: float, count: int, bits: int) -> float:
    """The smallest power of two by which ``count`` values within ±``reach`` add up to at most 2^(bits − 2) steps."""
    return 2.0 ** math.ceil(math.log2(count * reach) - (bits - 2))


def steps(x: np.ndarray, reach: float, size: float, rng: np.random.Generator | None) -> np.ndarray:
    """``x`` (floats) in steps of ``size``, int64: the nearest, or with ``rng`` one of the two beside it at random, so
    that the mean is right. Raises OverflowError for a value beyond ±``reach`` or no number at all."""
    largest = float(np.abs(x).max(initial=0.0))
    if not largest <= reach:
        raise OverflowError(f"a value of {largest:.4g} is beyond ±{reach:.4g}")
    scaled = x.astype(np.float64) / size
    if rng is not None:
        scaled = np.floor(scaled + rng.random(scaled.shape))
    return np.rint(scaled).astype(np.int64)


def signed(total: np.ndarray) -> np.ndarray:
    """Words as the integers around 0 that they stand for; no copy."""
    return total.view(np.dtype(f"<i{total.itemsize}"))
