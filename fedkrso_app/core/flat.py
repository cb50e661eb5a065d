"""Many tensors as one vector and back: an array of the wire costs a header, whatever it holds."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def flatten(tensors: Iterable[Tensor]) -> np.ndarray:
    """The tensors' values one after another, row by row, float32, on the CPU."""
    parts = [tensor.detach().reshape(-1).to("cpu", torch.float32) for tensor in tensors]
    return torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)


def storage(tensor: Tensor) -> int:
    """Which memory a tensor is, also on the meta device, where all have the address 0."""
    return tensor.untyped_storage()._cdata


@torch.no_grad()
def unflatten(values: np.ndarray, tensors: Iterable[Tensor]) -> None:
    """Copy a vector made by :func:`flatten` back into ``tensors``."""
    tensors = list(tensors)
    parts = torch.from_numpy(np.array(values)).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))
