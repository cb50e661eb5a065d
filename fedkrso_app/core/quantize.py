"""Numbers in fewer bytes: float16, int8 or int4 codes with one scale a block, rounded without bias.

    value ≈ scale · code        float16: one power-of-two scale a row, so that the largest code lies in [2^14, 2^15]
                                int8:    codes -127..127, one scale a block of 128 values along the last axis
                                int4:    codes -7..7, likewise; two in a byte, the first in the low half

A scale is the upper half of a float32 (8 bits of precision, rounded up), as uint16. A half byte holds code + 8, so that
0 is no code: it fills up the last byte of an odd row. Rounding is stochastic: up or down by chance, so that the
expected value is the value itself and moves smaller than the grid are kept on average. (Only float16's values below
2^-29 of the largest in their row, where it has fewer bits, go to the nearest.)
"""

import math
from collections.abc import Iterator

import numpy as np

FORMATS = ("float16", "int8", "int4")
BLOCK = 128  # values to a scale: 0.125 bits a value; 64 would make errors 8 % smaller and int4 2 % larger
_LEVELS = {"int8": 127, "int4": 7}
_CHUNK = 512 * BLOCK  # values handled at once, so that what is in between stays in the cache
_SMALLEST = 2.0**-100  # a block below this is zero
_LARGEST = 2.0**64
_LARGEST_SCALE = (127 + 64) << 7  # the same, as upper half: float32's exponent is biased by 127
_HALVES = ((np.arange(256)[:, None] >> [0, 4] & 15) - 8).astype(np.float32)  # byte -> its two int4 codes


def encode(x: np.ndarray, form: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of a float32 array ``x`` (... × n) in one of FORMATS; zeros are kept.

    codes: float16 or int8 of x's shape, or for int4 uint8, ... × ⌈n/2⌉. scales: uint16, ... × ⌈n/128⌉, or for float16
    ... × 1. ``rng`` (with a 64-bit bit generator) gives 16 raw bits a value and nothing else. No value moves by more
    than one scale (float16: 2^-10 of itself or 2^-39 of the row's largest). Raises ValueError for values that are not
    finite or 2^64 and above.
    """
    *shape, n = x.shape
    rows = np.ascontiguousarray(x, np.float32).reshape(math.prod(shape), n)
    block = max(n, 1) if form == "float16" else BLOCK
    starts = np.arange(0, n, block)
    largest = np.maximum(np.maximum.reduceat(rows, starts, axis=1), -np.minimum.reduceat(rows, starts, axis=1))
    if form == "float16" and not n:
        largest = np.zeros((len(rows), 1), np.float32)
    if not (largest < _LARGEST).all():  # NaN fails this too
        raise ValueError("values that are not finite or 2^64 and above cannot be quantised")
    if form == "float16":
        scales = np.ldexp(np.float32(1), np.frexp(largest)[1] - 15)
    else:
        scales = largest / np.float32(_LEVELS[form])
    upper = ((scales.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)
    upper[largest < _SMALLEST] = 0
    scales = _float(upper)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    width = -(-n // 2) if form == "int4" else n
    codes = np.empty((len(rows), width), {"float16": np.float16, "int8": np.int8, "int4": np.uint8}[form])
    for row, out, inv in zip(rows, codes, inverse, strict=True):
        for part, factors in _chunks(n, inv, block):
            y = row[part] * factors
            noise = rng.bit_generator.random_raw(-(-y.size // 4)).astype("<u8").view("<u2")[: y.size]
            if form == "float16":
                out[part] = _half(y, noise)
                continue
            y += (noise + np.float32(0.5)) * np.float32(2**-16)
            q = np.clip(np.floor(y), -_LEVELS[form], _LEVELS[form]).astype(np.int8)
            if form == "int8":
                out[part] = q
                continue
            q = np.append(q + 8, [0] * (q.size % 2)).astype(np.uint8)
            out[part.start // 2 : (part.start + q.size) // 2] = q[::2] | q[1::2] << 4
    return codes.reshape(*shape, width), upper.reshape(*shape, upper.shape[1])


def decode(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What :func:`encode` wrote, float32, ... × n: the dtype of ``codes`` says which format."""
    block = max(codes.shape[-1], 1) if codes.dtype == np.float16 else BLOCK
    n, count = length(codes), math.prod(codes.shape[:-1])
    x = np.empty((*codes.shape[:-1], n), np.float32)
    rows = x.reshape(count, n), codes.reshape(count, codes.shape[-1]), _float(scales).reshape(count, scales.shape[-1])
    for row, code, scale in zip(*rows, strict=True):
        for part, factors in _chunks(n, scale, block):
            if codes.dtype == np.uint8:
                values = _HALVES[code[part.start // 2 : -(-part.stop // 2)]].reshape(-1)[: part.stop - part.start]
            else:
                values = code[part]
            np.multiply(values, factors, out=row[part])
    return x


def length(codes: np.ndarray) -> int:
    """n, the number of values in a row of ``codes``; for int4 the last half byte of the first row tells."""
    n = codes.shape[-1]
    return n if codes.dtype != np.uint8 else 2 * n - int(codes.size > 0 and codes.reshape(-1, n)[0, -1] < 16)


def check(codes: np.ndarray, scales: np.ndarray) -> None:
    """Raise ValueError unless ``codes`` (finite where float16) and ``scales`` are what :func:`encode` could write."""
    if codes.dtype == np.int8 and (codes == -128).any():
        raise ValueError("code -128 is not used")
    if codes.dtype == np.uint8 and codes.size:
        odd = length(codes) % 2
        body, last = codes[..., : codes.shape[-1] - odd], codes[..., codes.shape[-1] - odd :]
        if (body < 16).any() or (codes & 15 == 0).any() or (last >= 16).any():
            raise ValueError("code -8 is not used, and half a byte is empty at the end of every row or of none")
    blocks = 1 if codes.dtype == np.float16 else -(-length(codes) // BLOCK)
    if scales.shape != (*codes.shape[:-1], blocks):
        raise ValueError(f"scales of shape {scales.shape} do not go with codes of shape {codes.shape}")
    if (scales > _LARGEST_SCALE).any():  # as integers: a sign, infinity and NaN lie above it too
        raise ValueError("a scale is negative, not finite or above 2^64")


def _chunks(n: int, factors: np.ndarray, block: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of a row of ``n`` values, each with the factor of every value in it (or the one factor of all)."""
    for start in range(0, n, _CHUNK):
        part = slice(start, min(start + _CHUNK, n))
        if block == BLOCK and len(factors) > 1:
            yield part, np.repeat(factors[start // BLOCK : -(-part.stop // BLOCK)], BLOCK)[: part.stop - start]
        else:
            yield part, factors


def _half(y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """float32 -> float16: noise below the 10 bits that stay, then cut, which is the same for both signs."""
    bits = y.view(np.uint32)
    return ((bits + (noise & 0x1FFF)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float16)


def _float(upper: np.ndarray) -> np.ndarray:
    return (upper.astype(np.uint32) << 16).view(np.float32)
