"""Many tensors as one vector and back: an array of the wire costs a header, whatever it holds."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def flatten(tensors: Iterable[Tensor]) -> np.ndarray:
    """The tensors' values one after another, row by row, float32, on the CPU."""
    parts = [tensor.detach().reshape(-1).to("cpu", torch.float32) for tensor in tensors]
    return torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)


def raw(tensor: Tensor | np.ndarray) -> np.ndarray:
    """The values of one tensor, row by row, on the CPU: float32, or of a bfloat16 the bits as uint16. No copy where
    they are there like that already; what this gave before stays as it is."""
    if isinstance(tensor, np.ndarray):
        return tensor
    flat = tensor.detach().reshape(-1).cpu()
    return flat.view(torch.uint16).numpy() if flat.dtype == torch.bfloat16 else flat.float().numpy()


@torch.no_grad()
def take_raw(values: np.ndarray, tensor: Tensor) -> None:
    """Copy what :func:`raw` gave into ``tensor``."""
    part = torch.from_numpy(values)
    tensor.copy_((part.view(torch.bfloat16) if part.dtype == torch.uint16 else part).view(tensor.shape))


def sent(tensor: Tensor, to: torch.device) -> Tensor:
    """``tensor`` on a device, which need not have finished its work before."""
    return tensor.pin_memory().to(to, non_blocking=True) if to.type == "cuda" else tensor.to(to)


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
