"""Random projections that anyone can rebuild: (seed, layer name, r, n) -> P, the same bits on every machine.

torch's CPU and CUDA generators differ, and even its CPU stream depends on length and dtype; so P comes from numpy's
Philox4x64-10, keyed by the seed and the layer's *name* (the order of layers is irrelevant), always on the CPU.
"""

import functools
import math

import numpy as np

RNG_ID = "philox4x64-10/box-muller/1"
KINDS = ("gaussian", "rademacher", "orthonormal")


@functools.lru_cache(maxsize=4096)  # each layer's name comes back with every seed
def layer_key(name: str) -> int:
    """FNV-1a, 64 bits, of the UTF-8 name: the second half of the Philox key."""
    key = 0xCBF29CE484222325
    for byte in name.encode():
        key = ((key ^ byte) * 0x100000001B3) % 2**64
    return key


def philox(seed: int, key: int) -> np.random.Philox:
    """The bit stream of (seed, key), both in [0, 2**64), from counter 0."""
    return np.random.Philox(key=np.array([seed, key], dtype=np.uint64), counter=0)


def stream(seed: int, *labels: str | int) -> np.random.Generator:
    """An independent generator for each purpose: ``stream(seed, "client", round, partition)``.

    It depends on its arguments alone, so that whoever resumes, reorders or distributes the work draws the same.
    """
    return np.random.Generator(philox(seed, layer_key("/".join(str(label) for label in labels))))


def projection(seed: int, name: str, r: int, n: int, kind: str = "gaussian") -> np.ndarray:
    """P, r × n, float32, with E[PᵀP] = I_n (FedKRSO, Alg. 2 l. 4).

    - ``gaussian``: entries i.i.d. N(0, 1/r).
    - ``rademacher``: entries ±1/√r; the same bits whatever the mathematical library.
    - ``orthonormal``: √(n/r) times r orthonormal rows, Haar distributed, so that PPᵀ = (n/r)·I exactly (Assumption 4).

    Raises ValueError for another kind, or for r > n with ``orthonormal``.
    """
    bits = philox(seed, layer_key(name))
    if kind == "gaussian":
        return (_gaussian(bits, r * n) / math.sqrt(r)).reshape(r, n).astype(np.float32)
    if kind == "rademacher":
        words = bits.random_raw(-(-r * n // 64)).astype("<u8")
        signs = np.unpackbits(words.view(np.uint8), bitorder="little")[: r * n].astype(np.float32)
        return ((2 * signs - 1) / np.float32(math.sqrt(r))).reshape(r, n)
    if kind == "orthonormal":
        if r > n:
            raise ValueError(f"{r} orthonormal rows do not fit into {n} dimensions")
        q, upper = np.linalg.qr(_gaussian(bits, r * n).reshape(n, r))
        q *= np.sign(np.diag(upper))  # makes the factorisation unique and q Haar distributed
        return np.ascontiguousarray(math.sqrt(n / r) * q.T).astype(np.float32)
    raise ValueError(f"unknown projection {kind!r}; known: {', '.join(KINDS)}")


def probe() -> str:
    """What this machine draws for fixed arguments: two machines that differ here would draw different projections."""
    raw = " ".join(f"{word:016x}" for word in philox(1234, 7).random_raw(3))
    gaussian = " ".join(f"{value:.5f}" for value in projection(1234, "probe", 4, 8).ravel())
    return f"{RNG_ID}: {raw}: {gaussian}"


def _gaussian(bits: np.random.Philox, count: int) -> np.ndarray:
    """Box–Muller in float64: all cosines, then all sines."""
    half = -(-count // 2)
    u1 = ((bits.random_raw(half) >> np.uint64(11)) + 0.5) * 2.0**-53
    u2 = (bits.random_raw(half) >> np.uint64(11)) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(u1)), 2.0 * np.pi * u2
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
