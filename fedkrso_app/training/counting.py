"""Bytes and operations of what runs inside, counted on any device; on torch's meta device as a CPU or a GPU takes them.

A meta tensor has a shape and no memory, so a step of any model can be counted on any machine. What the meta device
lacks is done here: autocast, CUDA's attention kernels, and the few values that a model asks for.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

# torch's lists of what autocast computes in few bits, and in float32 (docs: Automatic Mixed Precision package)
_FEW_BITS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "baddbmm", "addmm", "addbmm", "conv1d"}
_FEW_BITS |= {"scaled_dot_product_attention"}
_EXACT = {"cross_entropy", "nll_loss", "mse_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits"}
_EXACT_ON_CUDA = _EXACT | {
    "layer_norm",
    "group_norm",
    "softmax",
    "log_softmax",
    "norm",
    "pow",
    "__pow__",
    "rsqrt",
    "exp",
}
_EXACT_ON_CUDA |= {"log", "sum", "prod", "cumsum", "softplus", "reciprocal"}


class Counter(TorchDispatchMode):
    """Bytes of the tensors made inside, each storage once: ``live`` now and at the ``peak``; and ``operations``, of
    matrix products and attention, two for each multiplication that is added up.

    On the meta device a model that asks whether a mask is all ones, or which labels are given, gets yes, and a loss
    that is read is 1. Other operations that want values raise a RuntimeError, with a note that names them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.operations = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            made = self._made(operation, args, kwargs)
        except RuntimeError as error:
            error.add_note(str(operation))
            raise
        if count := flop_registry.get(operation.overloadpacket):
            self.operations += count(*args, **kwargs, out_val=made)
        given = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and _key(tensor) not in given | self._known:
                storage, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
                self._known.add(_key(tensor))
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, _key(tensor), size)
        return made

    def _made(self, operation: Any, args: Any, kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            dtype = args[0].dtype
            if operation is torch.ops.aten._local_scalar_dense.default:
                if dtype == torch.bool:
                    return True
                if dtype.is_floating_point:
                    return 1.0
            if operation is torch.ops.aten.nonzero.default and dtype == torch.bool:
                return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
        return operation(*args, **kwargs)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Behaviour(TorchFunctionMode):
    """Meta tensors computed as on a CPU or, with ``cuda``, on a GPU, under whatever torch's autocast of the CPU says: a
    checkpoint that computes again brings that back too."""

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if name in _FEW_BITS:
                args, kwargs = _cast((args, kwargs), torch.float32, torch.get_autocast_dtype("cpu"))
            elif name in (_EXACT_ON_CUDA if self.cuda else _EXACT):
                args, kwargs = _cast((args, kwargs), torch.get_autocast_dtype("cpu"), torch.float32)
        ours = {functional.scaled_dot_product_attention: _attention, functional.dropout: _dropout}
        if self.cuda and function in ours and args and args[0].is_meta:
            function = ours[function]
        return function(*args, **kwargs)


def _cast(given: Any, before: torch.dtype, to: torch.dtype) -> Any:
    """``given`` with its meta tensors of dtype ``before`` in dtype ``to``."""
    fits = lambda x: isinstance(x, Tensor) and x.is_meta and x.dtype == before  # noqa: E731
    return tree_map(lambda x: x.to(to) if fits(x) else x, given)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA's, whose mask has one byte."""
    return torch.native_dropout(x, p, training)[0] if training and p and not inplace else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernel that torch takes on CUDA: FlashAttention in two bytes without a mask, else the memory
    efficient one; written out where neither can (float32 with fewer keys' heads than queries')."""
    plain = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    ops: Any = torch.ops.aten
    if attn_mask is None and query.dtype != torch.float32 and query.shape[-1] <= 256:
        return ops._scaled_dot_product_flash_attention(query, key, value, **plain)[0]
    if enable_gqa and key.shape[1] != query.shape[1]:
        given = attn_mask, dropout_p, is_causal
        return functional.scaled_dot_product_attention(query, key, value, *given, scale=scale, enable_gqa=True)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return ops._scaled_dot_product_efficient_attention(query, key, value, attn_mask, query.requires_grad, **plain)[0]


@contextmanager
def counting(cuda: bool = False) -> Iterator[Counter]:
    """Count what is done inside. What happens on the meta device is done as on a CPU, or as on a GPU with ``cuda``."""

    behaviour, again = _Behaviour(cuda), list[nn.Module]()

    def enter(module: nn.Module, args: Any) -> None:
        if not torch._C._len_torch_function_stack():  # in a backward pass, where a checkpoint computes again
            behaviour.__enter__()
            again.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if again and again[-1] is module:
            again.pop()
            behaviour.__exit__(None, None, None)

    def by_lists(optimizer: torch.optim.Optimizer, *_: Any) -> None:  # torch's default there, with its copies of lists
        for group in optimizer.param_groups:
            group["foreach"] = "foreach" in group and not group.get("fused")

    with ExitStack() as stack:
        if cuda:
            stack.callback(register_optimizer_step_pre_hook(by_lists).remove)
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        counter = stack.enter_context(Counter())
        stack.enter_context(behaviour)
        yield counter


def distinct(tensors: Iterable[Tensor]) -> dict[int, Any]:
    """The storages of ``tensors``, each once."""
    return {_key(tensor): tensor.untyped_storage() for tensor in tensors}


def total(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of ``tensors``, each once."""
    return sum(storage.nbytes() for storage in distinct(tensors).values())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
