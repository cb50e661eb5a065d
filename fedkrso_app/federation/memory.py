"""What training takes of a client's memory: the storages that a method's own code makes are counted, on any device."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fedkrso_app.config import Config
from fedkrso_app.core.projection import stream
from fedkrso_app.core.stacked import Group
from fedkrso_app.core.subspace import SubspaceLinear
from fedkrso_app.data import Task
from fedkrso_app.federation.replica import Replica
from fedkrso_app.records.ledger import Ledger
from fedkrso_app.strategies import make
from fedkrso_app.strategies.base import Local, Method
from fedkrso_app.training import loop, together
from fedkrso_app.training.counting import counting, total
from fedkrso_app.training.model import LoadedModel, outline
from fedkrso_app.training.shapes import Shapes

SETTINGS = ("keep", "recompute", "checkpoint")  # of activation-memory, the least memory last


class _Enough(Exception):
    """What was to be counted has been counted."""


@dataclass
class Memory:
    """Bytes of training on a client, each storage once; and operations of one step."""

    weights: int = 0  # parameters, those that the method adds included
    activations: int = 0  # still there after the forward pass
    peak: int = 0  # most at any moment of forward and backward, gradients and passing results included
    gradients: int = 0
    optimizer: int = 0  # moments; FedKRSO's projections and accumulators too
    aside: int = 0  # W^t, kept to give the model back unchanged
    standing: int = 0  # all that is there when the second step begins
    stepping: int = 0  # most at any moment of that step's optimizers
    grown: int = 0  # what these hold beyond ``optimizer``, which is after the first step
    later: int = 0  # what a client holds at the end of a round beyond those after its first step
    trained: int = 0  # how many numbers get a gradient
    steps: int = 0
    passes: int = 0  # operations of the forward and backward passes
    moves: int = 0  # of the optimizers

    @property
    def total(self) -> int:
        """Most of all together at any moment."""
        return max(self.standing + self.peak, self.stepping) + max(0, self.later - self.grown)

    @property
    def operations(self) -> int:
        """Those of one optimizer step, gradient accumulation included."""
        return self.passes + self.moves


def outlined(config: Config, task: Task) -> tuple[Method, Local, dict[str, Tensor]]:
    """The method of a run on ``task``, and what :func:`prepared` makes of the outline of its model."""
    loaded = outline(config.model, task.num_labels, config.head)
    method = make(config, Shapes.of(loaded), judged=False)
    return method, *prepared(method, loaded, task)


def prepared(method: Method, loaded: LoadedModel, task: Task) -> tuple[Local, dict[str, Tensor]]:
    """The half that trains beside ``loaded``, an outline or a model in float32, and a batch of full length."""
    with (device := next(loaded.module.parameters()).device):
        local = method.local(loaded)
        if method.config.compute_dtype == "bfloat16" and not method.config.few_bits:
            local = local.computing(device)
        return local, batch(loaded, task, method.config)


def batch(loaded: LoadedModel, task: Task, config: Config) -> dict[str, Tensor]:
    """A batch of full length on the default device; its labels, which training counts, are on the CPU."""
    settings: Any = loaded.module.config
    positions = getattr(settings.get_text_config(), "max_position_embeddings", config.max_length)
    longest = getattr(loaded.tokenizer, "model_max_length", positions)
    rows, tokens = config.batch_size, min(config.max_length, longest)
    names = {"input_ids", "attention_mask", *getattr(loaded.tokenizer, "model_input_names", ())}
    inputs = {name: torch.ones(rows, tokens, dtype=torch.long) for name in names}
    if task.language:
        return inputs | {"labels": torch.zeros(rows, tokens, dtype=torch.long, device="cpu")}
    kind = torch.float32 if task.regression else torch.long
    return inputs | {"labels": torch.zeros(rows, dtype=kind, device="cpu")}


def client_memory(
    method: Method, local: Local, inputs: Mapping[str, Tensor], cuda: bool = False, settings: Sequence[str] = SETTINGS
) -> tuple[dict[str, Memory], dict[str, str]]:
    """The memory of ``local`` (of :func:`prepared`) training on ``inputs``, by setting of
    ``activation-memory``, as on a CPU or with ``cuda`` a GPU; and why there is none. Of rounds of several kinds, that
    which takes most."""
    if method.config.few_bits:
        reason = "weights of few bits are not counted; plan with compute-weights = 'float'."
        return {}, dict.fromkeys(settings, f"compute-weights = {method.config.compute_weights!r}: {reason}")
    rounds = [_memory(local, inputs, turn, cuda, settings) for turn in _turns(method)]
    later = method.client_bytes(method.expected(1)[0])
    memories, refused = rounds[0]
    return {
        setting: replace(max((found[setting] for found, _ in rounds), key=lambda memory: memory.total), later=later)
        for setting in memories
    }, refused


def _turns(method: Method) -> list[dict[str, Any]]:
    return [{**turn, "labels": lambda: np.zeros(0, np.int64)} for turn in method.turns()]  # a plan has no rows


def _memory(
    local: Local, inputs: Mapping[str, Tensor], instructions: Mapping[str, Any], cuda: bool, settings: Sequence[str]
) -> tuple[dict[str, Memory], dict[str, str]]:
    config = local.config
    memories: dict[str, Memory] = {}
    refused: dict[str, str] = {}
    replica = Replica(local, Ledger(Path()), span=1)  # to lend a model takes no entries

    def batches() -> Iterator[dict[str, Tensor]]:
        while memory.steps < 2:
            yield dict(inputs)
        raise _Enough

    def stop(*_: Any) -> None:
        if memories:  # the optimizers hold the same whatever is kept for backward
            raise _Enough

    for setting in settings:
        local.config = replace(config, activation_memory=setting, local_steps=max(3, config.local_steps))
        try:
            rng = stream(config.seed, "plan")
            lent = replica.lend() if config.on_device else nullcontext()
            with _silent(), measured(local.module, cuda) as memory, suppress(_Enough), ExitStack() as stack, lent:
                stack.callback(register_optimizer_step_pre_hook(stop).remove)  # after the one that counts
                session = stack.enter_context(local.session(instructions, rng))
                loop.train(local.module, batches(), session, local.config, rng)
        except RuntimeError as error:  # NotImplementedError is one too
            refused[setting] = ": ".join([*getattr(error, "__notes__", []), str(error).splitlines()[0]])
            continue
        finally:
            local.config = config
        first = next(iter(memories.values()), replace(memory, aside=total(local.trained()) if config.on_device else 0))
        own = {"activations": memory.activations, "peak": memory.peak, "passes": memory.passes}
        memories[setting] = replace(first, **own)
    return memories, refused


@contextmanager
def _silent() -> Iterator[None]:
    """A large model's step is slow here too, and its progress is no training's."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(disabled)


@contextmanager
def measured(module: nn.Module, cuda: bool = False) -> Iterator[Memory]:
    """Count what is done with ``module`` inside: forward and backward passes, and one or two steps of any optimizers.

    The figures are those of the first step, but ``standing`` and ``stepping``.
    """
    memory = Memory()
    before, start = total(module.parameters()), 0
    stepped: dict[int, int] = {}

    def forward(module: nn.Module, args: Any) -> None:
        nonlocal start
        if not memory.weights:
            # W of a target is no parameter of the module while a SubspaceLinear replaces its layer.
            inside = (part.W for part in module.modules() if isinstance(part, SubspaceLinear))
            memory.weights = total([*module.parameters(), *inside])
            counter.peak = start = counter.live
        if memory.steps == 1 and not memory.standing:
            memory.standing = before + counter.live

    def backward(gradient: Tensor) -> None:  # by now nothing but the graph holds what the forward pass made
        memory.activations = memory.activations or counter.live - start

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if output.loss.requires_grad:  # not in a closure of a zeroth-order step
            output.loss.register_hook(backward)

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        memory.peak = memory.peak or counter.peak - start
        memory.passes = memory.passes or counter.operations
        if id(optimizer) not in stepped:
            memory.gradients += total(p.grad for p in _parameters(optimizer) if p.grad is not None)
            memory.trained += sum(p.numel() for p in _parameters(optimizer))
        counter.peak = counter.live

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped[id(optimizer)] = stepped.get(id(optimizer), 0) + 1
        memory.steps = max(stepped.values())
        if memory.steps == 1:
            memory.optimizer += total(_state(optimizer))
            memory.grown -= total(_state(optimizer))
            memory.moves = counter.operations - memory.passes
        else:
            memory.grown += total(_state(optimizer))
            memory.stepping = max(memory.stepping, before + counter.peak)

    with ExitStack() as stack:
        for handle in (
            module.register_forward_pre_hook(forward),
            module.register_forward_hook(after),
            register_optimizer_step_pre_hook(before_step),
            register_optimizer_step_post_hook(after_step),
        ):
            stack.callback(handle.remove)
        counter = stack.enter_context(counting(cuda))
        yield memory


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    if held := getattr(optimizer, "held", None):  # of optimizers that keep tensors outside torch's ``state``
        return held()
    return [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]


def pass_memory(
    method: Method, local: Local, inputs: Mapping[str, Tensor], clients: int, cuda: bool = False
) -> tuple[int, int]:
    """Most bytes at any moment of ``clients`` training in one pass, weights included, and the operations of one step of
    one of them; ``local`` and ``inputs`` as :func:`client_memory` takes them.

    All intervals of a round are open from the first of the two steps that are counted on. Raises
    :class:`core.stacked.Unstackable` where clients take turns.
    """
    config, group = local.config, Group(clients)
    rngs = [stream(config.seed, "plan", client) for client in range(clients)]

    def batches() -> Iterator[dict[str, Tensor]]:
        yield from itertools.repeat(dict(inputs), 2 * config.gradient_accumulation)
        raise _Enough

    def opened(session: loop.Session) -> loop.Session:
        def before_step(j: int) -> None:
            for i in range(config.local_steps if j == 0 else 0):
                session.before_step(i)

        return replace(session, before_step=before_step)

    most = operations = 0
    for turn in _turns(method):
        with _silent(), counting(cuda) as counter, suppress(_Enough), ExitStack() as stack:
            halves, stacks = stack.enter_context(local.stacked(group))
            asked = [{**turn, "partition": client} for client in range(clients)]
            given = zip(halves, asked, rngs, strict=True)
            sessions = [opened(stack.enter_context(half.session(told, rng))) for half, told, rng in given]
            more = [batches() for _ in range(clients)]
            longer = replace(config, local_steps=max(3, config.local_steps))
            together.train(local.module, more, sessions, group, stacks, longer, rngs, ({}, False))
        most = max(most, total(local.module.parameters()) + counter.peak)
        operations = max(operations, counter.operations // (2 * clients))
    return most, operations
