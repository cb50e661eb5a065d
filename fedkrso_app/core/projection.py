"""Random projections that anyone can rebuild: (seed, layer name, r, n) -> P, the same bits on every machine.

torch's CPU and CUDA generators differ, and even its CPU stream depends on length and dtype; so P comes from numpy's
Philox4x64-10, keyed by the seed and the layer's *name* (the order of layers is irrelevant), always on the CPU.
"""

import functools
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fedkrso_app.core.flat import sent

RNG_ID = "philox4x64-10/box-muller/1"
KINDS = ("gaussian", "rademacher", "orthonormal")

_MOST = 2**24  # values of projections that a process keeps, 4 bytes each


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


def beside(rng: np.random.Generator) -> np.random.Generator:
    """A generator for a method's own draws in a round, far from ``rng``'s: not from that itself, or the batches would
    not be those that every other method sees."""
    return np.random.Generator(rng.bit_generator.jumped())  # type: ignore[attr-defined]


def projections(seeds: Sequence[int], name: str, r: int, n: int, kind: str = "gaussian") -> np.ndarray:
    """P_k of one layer for every seed k, len(seeds) × r × n, float32, with E[P_kᵀP_k] = I_n (FedKRSO, Alg. 2 l. 4).

    - ``gaussian``: entries i.i.d. N(0, 1/r).
    - ``rademacher``: entries ±1/√r; the same bits whatever the mathematical library.
    - ``orthonormal``: √(n/r) times r orthonormal rows, Haar distributed, so that PPᵀ = (n/r)·I exactly (Assumption 4).

    Raises ValueError for another kind, or for r > n with ``orthonormal``.
    """
    key = layer_key(name)
    if kind == "gaussian":
        return _gaussian(seeds, key, r * n).div_(math.sqrt(r)).float().numpy().reshape(-1, r, n)
    if kind == "rademacher":
        words = np.stack([philox(seed, key).random_raw(-(-r * n // 64)) for seed in seeds]).astype("<u8")
        signs = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : r * n].astype(np.float32)
        return ((2 * signs - 1) / np.float32(math.sqrt(r))).reshape(-1, r, n)
    if kind == "orthonormal":
        if r > n:
            raise ValueError(f"{r} orthonormal rows do not fit into {n} dimensions")
        q, upper = np.linalg.qr(_gaussian(seeds, key, r * n).numpy().reshape(-1, n, r))
        # Makes the factorisation unique and q Haar distributed.
        q *= np.sign(np.diagonal(upper, axis1=1, axis2=2))[:, None]
        return np.ascontiguousarray(math.sqrt(n / r) * q.transpose(0, 2, 1)).astype(np.float32)
    raise ValueError(f"unknown projection {kind!r}; known: {', '.join(KINDS)}")


def projection(seed: int, name: str, r: int, n: int, kind: str = "gaussian") -> np.ndarray:
    """P of one seed, r × n: see :func:`projections`."""
    return projections([seed], name, r, n, kind)[0]


class _Newest:
    """The newest projections by what they were drawn from."""

    def __init__(self) -> None:
        self.arrays: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self.values, self.lock = 0, threading.Lock()

    def get(self, key: tuple) -> np.ndarray | None:
        with self.lock:
            if key in self.arrays:
                self.arrays.move_to_end(key)
            return self.arrays.get(key)

    def put(self, key: tuple, P: np.ndarray) -> None:
        with self.lock:
            if key not in self.arrays:
                self.arrays[key], self.values = P, self.values + P.size
            while self.values > _MOST:
                self.values -= self.arrays.popitem(last=False)[1].size


_newest = _Newest()


def kept(seed: int, name: str, r: int, n: int, kind: str = "gaussian") -> np.ndarray:
    """:func:`projection`, not to be written to. The newest are kept: all clients of a round draw from one pool."""
    key = seed, name, r, n, kind
    P = _newest.get(key)
    if P is None:
        _newest.put(key, P := projection(*key))
    return P


def placed(seed: int, name: str, r: int, n: int, kind: str, like: Tensor) -> Tensor:
    """:func:`kept` with the device and the dtype of ``like``. A GPU need not finish its work before, and gets random
    signs as bits; on the meta device there is nothing to draw."""
    if like.is_meta:
        return like.new_empty(r, n)
    if like.is_cuda and kind == "rademacher":
        words = torch.from_numpy(philox(seed, layer_key(name)).random_raw(-(-r * n // 64)).view(np.int64))
        return signs(sent(words, like.device), r, n).to(like.dtype)
    return sent(torch.from_numpy(kept(seed, name, r, n, kind)), like.device).to(like.dtype)


def signs(words: Tensor, r: int, n: int) -> Tensor:
    """The projection of kind ``rademacher`` (r × n, float32) whose bits are in ``words`` (int64, one axis), on their
    device."""
    bits = (words[:, None] >> torch.arange(64, device=words.device)) & 1
    size = float(np.float32(1) / np.float32(math.sqrt(r)))  # a GPU divides by a number in another way
    return torch.where(bits.flatten()[: r * n].view(r, n) == 1, size, -size)


def ahead(seed: int, shapes: Mapping[str, tuple[int, int]], kind: str) -> Future[None]:
    """Let a thread draw what :func:`kept` will be asked for, by name r and n of each layer; a result says that it has.

    It holds Python's lock for a small part of that: numpy draws, and torch computes, without it.
    """

    def draw() -> None:
        for name, (r, n) in shapes.items():
            kept(seed, name, r, n, kind)

    return _thread().submit(draw)


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "projections")


def probe() -> str:
    """What this machine draws for fixed arguments: two machines that differ here would draw different projections."""
    raw = " ".join(f"{word:016x}" for word in philox(1234, 7).random_raw(3))
    gaussian = " ".join(f"{value:.5f}" for value in projection(1234, "probe", 4, 8).ravel())
    return f"{RNG_ID}: {raw}: {gaussian}"


def _gaussian(seeds: Sequence[int], key: int, count: int) -> Tensor:
    """Box–Muller in float64: all cosines, then all sines of a stream (seed, key). len(seeds) × count.

    The functions are torch's, several times as fast as numpy's. Whose they are may change the last bit of a float64
    here and there, of which the float32 that becomes of it keeps nothing but about once in 10^11 values.
    """
    half = -(-count // 2)
    words = np.empty((len(seeds), 2 * half))
    for row, seed in zip(words, seeds, strict=True):
        np.random.Generator(philox(seed, key)).random(out=row)  # (raw >> 11) · 2^-53
    uniform = torch.from_numpy(words)
    u1, u2 = uniform.split(half, dim=1)
    radius, angle = u1.add_(2.0**-54).log_().mul_(-2.0).sqrt_(), u2.mul_(2.0 * math.pi)
    values = torch.empty_like(uniform)  # on the CPU, whatever torch's default device is
    torch.cos(angle, out=values[:, :half]).mul_(radius)
    torch.sin(angle, out=values[:, half:]).mul_(radius)
    return values[:, :count]
