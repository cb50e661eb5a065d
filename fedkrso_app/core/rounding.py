"""A W in bfloat16 that entries move without bias: float32 sums, rounded up or down by chance, the same chance for all.

bfloat16 keeps 8 bits of a number, so that rounding to the nearest loses most of what a round adds. Here the sum is made
in float32, one layer at a time, and rounded with probabilities that make its mean the sum itself. The chance is drawn
from (run seed, version, layer): every copy of the model rounds alike, and an entry leads all of them to the same bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from fedkrso_app.core.projection import stream

_CHUNK = 1 << 20  # values rounded at once


def rounded(x: Tensor, noise: Tensor) -> Tensor:
    """``x`` (float32) as bfloat16: away from zero where ``noise`` (int32, 0 to 65535) reaches what is cut off.

    Uniform noise makes that as likely as x is near the larger neighbour: the mean of the 65536 results is x exactly.
    Values of bfloat16 stay themselves.
    """
    bits = x.view(torch.int32) + noise
    return bits.bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)


@contextmanager
def moving(W: Tensor, seed: int, version: int, name: str) -> Iterator[Tensor]:
    """W (m × n) of layer ``name``, to be moved in place by entry ``version``: itself, or if it is bfloat16 a float32
    copy that is rounded into it at the end."""
    if W.dtype != torch.bfloat16:
        yield W
        return
    exact = W.to(torch.float32)
    yield exact
    rng = stream(seed, "rounding", version, name)
    step = max(1, _CHUNK // W.shape[1])
    for start in range(0, len(W), step):
        rows = slice(start, start + step)
        count = exact[rows].numel()
        words = rng.bit_generator.random_raw(-(-count // 4)).astype("<u8").view("<u2")[:count]
        noise = torch.from_numpy(words.astype(np.int32)).view_as(exact[rows])
        W[rows] = rounded(exact[rows], noise.to(W.device))
