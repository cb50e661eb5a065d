"""What a forward pass keeps of a model for the backward pass, and what is computed again instead."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedkrso_app.core.subspace import SubspaceLinear, is_conv1d, matrix


class TrainingError(RuntimeError):
    """Training went wrong in a way that the message explains."""


@contextmanager
def activation_memory(module: Any, setting: str, own_masks: bool = True) -> Iterator[None]:
    """What ``module``, a transformers model, keeps of each block for the backward pass.

    - ``keep``: all that its gradient needs.
    - ``recompute``: the block's input and what its frozen linear layers gave, unless that is wider than what they were
      given (queries, keys, values, both outputs, but not the wide layer of the feed-forward part); the rest is
      computed again. A layer whose matrix itself is trained is computed again too.
    - ``checkpoint``: the block's input; the whole block is computed again.

    Gradients are the same to rounding, dropout masks included; on a CPU the masks are our own (:func:`_drop`), or
    torch's without ``own_masks``.
    Raises :class:`TrainingError` where the model cannot.
    """
    on_gpu = next(module.parameters()).device.type not in ("cpu", "meta")
    with ExitStack() as stack:
        for part in () if on_gpu or not own_masks else module.modules():
            if type(part) is nn.Dropout and 0 < part.p < 1:
                stack.enter_context(_forward(part, partial(_drop, part)))
        if setting != "keep":
            how: dict[str, Any] = {"use_reentrant": False}
            if setting == "recompute":
                how["context_fn"] = _narrow_products(module, stack)
            stack.enter_context(_checkpoints(module, setting, how))
        yield


@contextmanager
def _forward(part: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let ``function`` stand for the forward of ``part``."""
    part.forward = function
    try:
        yield
    finally:
        del part.forward


@contextmanager
def _checkpoints(module: Any, setting: str, how: dict[str, Any]) -> Iterator[None]:
    """torch's checkpoint around each block, by transformers' own switch."""
    name = "activation" if hasattr(module, "activation_checkpointing_enable") else "gradient"  # transformers renamed it
    try:
        getattr(module, f"{name}_checkpointing_enable")(how)
    except (AttributeError, ValueError) as error:
        raise TrainingError(
            f"activation-memory = {setting!r} is not possible with this model ({error}); set it to 'keep'."
        ) from None
    with suppress(AttributeError):  # some versions ask for the gradient of the embeddings, which nobody needs
        module.disable_input_require_grads()
    try:
        yield
    finally:
        getattr(module, f"{name}_checkpointing_disable")()


# --- recompute: what narrow layers gave is kept beside the checkpoint ---


_Kept = list[tuple[Tensor, int]]  # what the narrow layers of one block gave, and the version that each result had


def _narrow_products(module: nn.Module, stack: ExitStack) -> Callable[[], tuple[AbstractContextManager, ...]]:
    """Let the narrow layers of ``module`` keep what they give until ``stack`` closes; a checkpoint's ``context_fn``."""
    current: list[tuple[_Kept, bool]] = []  # of the block at work, if any; and whether it runs once more

    @contextmanager
    def at_work(kept: _Kept, again: bool) -> Iterator[None]:
        current.append((kept, again))
        try:
            yield
        finally:
            current.pop()

    def product(layer: Any, plain: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if not current or layer.weight.requires_grad:
            return plain(*args, **kwargs)
        kept, again = current[-1]
        if again:
            y, version = kept.pop(0)
            if y._version != version:
                raise TrainingError(
                    "activation-memory = 'recompute' is not possible with this model (it changes what a linear layer "
                    "gave in place); set it to 'checkpoint' or 'keep'."
                )
            return y
        with saved_tensors_hooks(lambda saved: saved, lambda saved: saved):  # the checkpoint's own would drop it
            y = plain(*args, **kwargs)
        kept.append((y.detach().requires_grad_(y.requires_grad), y._version))
        return y

    for layer in module.modules():
        if isinstance(layer, nn.Linear | SubspaceLinear) or is_conv1d(layer):
            outputs, inputs = matrix(layer).shape
            if outputs <= inputs:
                stack.enter_context(_forward(layer, partial(product, layer, layer.forward)))

    def contexts() -> tuple[AbstractContextManager, ...]:
        kept: _Kept = []
        return at_work(kept, again=False), at_work(kept, again=True)

    return contexts


# --- dropout ---


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))  # of torch's generator: a checkpoint draws it once more
        below = min(round(p * 2**16), 2**16 - 1)
        keep = torch.empty(x.shape, dtype=torch.uint8, device=x.device)  # bool becomes float four times as slowly
        if not x.is_meta:
            draw = np.random.Generator(np.random.SFC64(seed)).integers
            random = draw(2**64, size=-(-x.numel() // 4), dtype=np.uint64).view(np.uint16)[: x.numel()]
            np.greater_equal(random, below, out=keep.view(-1).numpy().view(np.bool_))
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - below / 2**16)
        return keep.to(x.dtype).mul_(x).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return keep.to(grads[0].dtype).mul_(grads[0]).mul_(ctx.scale), None


def _drop(part: nn.Dropout, x: Tensor) -> Tensor:
    """Dropout on a CPU, where torch keeps its mask in floats and draws it ten times as slowly: p in steps of 2^-16."""
    return _Dropped.apply(x, part.p) if part.training else x
