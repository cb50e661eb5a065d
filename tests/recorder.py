"""What a CUDA graph does, on a CPU: the operations of a call are noted once and repeated on the same memory.

Nothing of Python runs when they are repeated: a number that the call took from there, a branch that it took by a value,
stays as it was. Operations that a graph cannot hold raise RuntimeError before they are done.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# values that the host reads, and those that it brings
HOST = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "lift_fresh"}


class _Noted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket.__name__ in HOST:
            raise RuntimeError(f"a step asks its host: {operation}")
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result


def record(call):
    """Do ``call``; what repeats it."""
    with _Noted() as noted:
        call()

    @torch.no_grad()
    def again():
        for operation, args, kwargs, result in noted.operations:
            new = operation(*args, **kwargs)
            pairs = zip(result, new, strict=True) if isinstance(result, tuple | list) else [(result, new)]
            for place, value in pairs:
                if isinstance(value, torch.Tensor) and value.data_ptr() != place.data_ptr():
                    place.detach().copy_(value)

    return again
