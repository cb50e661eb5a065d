"""What training takes of a client's memory: the storages that a method's own code makes are counted, on any device."""

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedkrso_app.core.projection import stream
from fedkrso_app.core.subspace import SubspaceLinear
from fedkrso_app.federation.replica import Replica
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.strategies.base import Local
from fedkrso_app.training import loop

SETTINGS = ("keep", "recompute", "checkpoint")  # of activation-memory


class _Enough(Exception):
    """What was to be counted has been counted."""


@dataclass
class Memory:
    """Bytes of training on a client, each storage once."""

    weights: int = 0  # parameters, those that the method adds included
    activations: int = 0  # still there after the forward pass
    peak: int = 0  # most at any moment of forward and backward, gradients and passing results included
    gradients: int = 0
    optimizer: int = 0  # moments; FedKRSO's projections and accumulators too
    aside: int = 0  # W^t, kept to give the model back unchanged
    standing: int = 0  # all that is there when the second step begins
    stepping: int = 0  # most at any moment of that step's optimizers
    grown: int = 0  # what these hold beyond ``optimizer``, which is after the first step
    trained: int = 0  # how many numbers get a gradient
    steps: int = 0

    @property
    def total(self) -> int:
        """Most of all together at any moment."""
        return max(self.standing + self.peak, self.stepping)


def client_memory(
    local: Local, inputs: Mapping[str, Tensor], instructions: Mapping[str, Any]
) -> tuple[dict[str, Memory], dict[str, str]]:
    """The memory of ``local`` training on ``inputs``, by setting of ``activation-memory``; and why there is none."""
    config = local.config
    memories: dict[str, Memory] = {}
    refused: dict[str, str] = {}
    if config.compute_dtype != "float32":
        reason = "torch has no autocast on its meta device; plan with compute-dtype='float32' (and state-dtype)."
        return {}, dict.fromkeys(SETTINGS, f"compute-dtype = {config.compute_dtype!r}: {reason}")
    replica = Replica(local, Ledger(Path()), span=1)  # to lend a model takes no entries

    def batches() -> Iterator[dict[str, Tensor]]:
        while memory.steps < 2:
            yield dict(inputs)
        raise _Enough

    def stop(*_: Any) -> None:
        if memories:  # the optimizers hold the same whatever is kept for backward
            raise _Enough

    disabled = logging.root.manager.disable
    for setting in SETTINGS:
        logging.disable(logging.INFO)  # a large model's step is slow here too, and its progress is no training's
        local.config = replace(config, activation_memory=setting, local_steps=max(3, config.local_steps))
        try:
            rng = stream(config.seed, "plan")
            with measured(local.module) as memory, suppress(_Enough), ExitStack() as stack, replica.lend():
                stack.callback(register_optimizer_step_pre_hook(stop).remove)  # after the one that counts
                session = stack.enter_context(local.session(instructions, rng))
                loop.train(local.module, batches(), session, local.config, rng)
        except RuntimeError as error:  # NotImplementedError is one too
            refused[setting] = ": ".join([*getattr(error, "__notes__", []), str(error).splitlines()[0]])
            continue
        finally:
            local.config = config
            logging.disable(disabled)
        first = next(iter(memories.values()), replace(memory, aside=total(local.trained())))
        memories[setting] = replace(first, activations=memory.activations, peak=memory.peak)
    return memories, refused


@contextmanager
def measured(module: nn.Module) -> Iterator[Memory]:
    """Count what is done with ``module`` inside: forward and backward passes, and one or two steps of any optimizers.

    The figures are those of the first step, but ``standing`` and ``stepping``.
    """
    memory, storage = Memory(), Storage()
    before, start = total(module.parameters()), 0
    stepped: dict[int, int] = {}

    def forward(module: nn.Module, args: Any) -> None:
        nonlocal start
        if not memory.weights:
            # W of a target is no parameter of the module while a SubspaceLinear replaces its layer.
            inside = (part.W for part in module.modules() if isinstance(part, SubspaceLinear))
            memory.weights = total([*module.parameters(), *inside])
            storage.peak = start = storage.live
        if memory.steps == 1 and not memory.standing:
            memory.standing = before + storage.live

    def backward(gradient: Tensor) -> None:  # by now nothing but the graph holds what the forward pass made
        memory.activations = memory.activations or storage.live - start

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if output.loss.requires_grad:  # not in a closure of a zeroth-order step
            output.loss.register_hook(backward)

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        memory.peak = memory.peak or storage.peak - start
        if id(optimizer) not in stepped:
            memory.gradients += total(p.grad for p in _parameters(optimizer) if p.grad is not None)
            memory.trained += sum(p.numel() for p in _parameters(optimizer))
        storage.peak = storage.live

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped[id(optimizer)] = stepped.get(id(optimizer), 0) + 1
        memory.steps = max(stepped.values())
        if memory.steps == 1:
            memory.optimizer += total(_state(optimizer))
            memory.grown -= total(_state(optimizer))
        else:
            memory.grown += total(_state(optimizer))
            memory.stepping = max(memory.stepping, before + storage.peak)

    with ExitStack() as stack:
        for handle in (
            module.register_forward_pre_hook(forward),
            module.register_forward_hook(after),
            register_optimizer_step_pre_hook(before_step),
            register_optimizer_step_post_hook(after_step),
        ):
            stack.callback(handle.remove)
        stack.enter_context(storage)
        yield memory


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    if held := getattr(optimizer, "held", None):  # of optimizers that keep tensors outside torch's ``state``
        return held()
    return [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]


class Storage(TorchDispatchMode):
    """Bytes of the tensors made inside: ``live`` now and at the ``peak``. Works on the meta device too.

    There, a model that asks whether a mask is all ones, or which labels are given, gets yes, and a loss that is read is
    1. Other operations that want values raise a RuntimeError, with a note that names them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            made = self._made(operation, args, kwargs or {})
        except RuntimeError as error:
            error.add_note(str(operation))
            raise
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


def distinct(tensors: Iterable[Tensor]) -> dict[int, Any]:
    """The storages of ``tensors``, each once."""
    return {_key(tensor): tensor.untyped_storage() for tensor in tensors}


def total(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of ``tensors``, each once."""
    return sum(storage.nbytes() for storage in distinct(tensors).values())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
