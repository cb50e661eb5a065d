"""The local loop as steps that a GPU repeats without its host: recorded once, replayed over new batches.

All that a step reads or writes keeps its place in memory: batches are padded to a few lengths, learning rates, Adam's
counts of steps and the losses are tensors, gradients are set to 0 instead of dropped, dropout comes from torch's own
generator, and no value is read back. A step is a few pieces: forward and backward for each length, and the update.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedkrso_app import data
from fedkrso_app.config import Config
from fedkrso_app.core.rso import RSO
from fedkrso_app.core.stacked import Group, Stack, StackedRSO
from fedkrso_app.data.tasks import Task
from fedkrso_app.training import vocabulary
from fedkrso_app.training.loop import Session, at_work, precision, predicted, rate_factors, show_progress
from fedkrso_app.training.together import client_losses, fused, joined, seed_of, trained_stacks

logger = logging.getLogger("flwr")

LENGTHS = 8  # to which batches are padded: eighths of the longest

Call = Callable[[], None]


class NotStatic(RuntimeError):
    """A session whose steps need the host; the text says why."""


class Recorder:
    """``record`` does a call once and gives what repeats it on the same memory, or raises RuntimeError with nothing
    done. After that, and with None, calls are made as they are: the bits are the same."""

    def __init__(self, record: Callable[[Call], Call] | None = None) -> None:
        self.record = record

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """What surrounds all calls that are recorded and repeated."""
        yield

    def first(self, call: Call) -> Call | None:
        """Do ``call``; what repeats it."""
        if self.record:
            try:
                return self.record(call)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                cause = error.__context__ or error  # what ended a recording, not that it ended
                logger.warning("The steps of this model are not captured: %s", str(cause).splitlines()[0])
                self.record = None
        call()
        return None


class _Piece:
    """A part of a step: done as it is at first, recorded when it comes again, and repeated from then on.

    The first time makes what is made once (gradients, an optimizer's state, a library's workspace).
    """

    def __init__(self, call: Call, recorder: Recorder) -> None:
        self.call, self.recorder, self.seen = call, recorder, False
        self.again: Call | None = None

    def __call__(self) -> None:
        if self.again and self.recorder.record:
            self.again()
        elif self.seen:
            self.again = self.recorder.first(self.call)
        else:
            self.seen = True
            self.call()


def train(
    module: nn.Module,
    batches: Sequence[Iterator[dict[str, Tensor]]],
    sessions: Sequence[Session],
    group: Group,
    stacks: Sequence[Stack],
    config: Config,
    rngs: Sequence[np.random.Generator],
    padding: tuple[Mapping[str, int], bool],
    longest: int,
    recorder: Recorder,
) -> Tensor:
    """What :func:`together.train` does; without ``stacks`` what :func:`loop.train` does for the one session there is.

    Results differ from theirs in the last bits, and dropout on a CPU is torch's. No batch is longer than ``longest``
    tokens. Raises :class:`NotStatic` before anything has changed, and :class:`Unstackable`.
    """
    check(sessions)
    steps, began = config.local_steps, time.monotonic()
    shown = began
    live = trained_stacks(sessions, stacks) if stacks else []
    parameters = [stack.whole for stack in live] or sessions[0].parameters
    device = parameters[0].device
    losses = torch.zeros(len(sessions), steps, device=device)
    with ExitStack() as context:
        context.enter_context(recorder.at_work())
        output_layer = context.enter_context(at_work(module, seed_of(rngs), device, config, own_masks=False))
        for stack in live:
            context.enter_context(stack.trained())
        if not live:
            context.enter_context(_trained(parameters))
        optimizers, rates, shares = _prepared(sessions, live, config, device)
        loss = losses.new_zeros(len(sessions))
        buffers: dict[Any, tuple[list[Tensor], _Piece]] = {}

        def gradient(inputs: Mapping[str, Tensor], labels: Tensor, weights: Tensor) -> None:
            group.rows = len(labels) // group.clients
            with precision(config.compute_dtype, device):
                logits = module(**inputs).logits
                if output_layer is None:
                    own = client_losses(logits, labels, weights, group.clients)
                else:
                    own = vocabulary.losses(logits, output_layer, labels, weights, group.clients, every=True)
            own.sum().backward()
            loss.add_(own.detach())

        def update() -> None:
            if config.max_grad_norm:
                for session in sessions:
                    nn.utils.clip_grad_norm_(session.parameters, config.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
            torch._foreach_zero_([p.grad for p in parameters if p.grad is not None])

        finish = _Piece(update, recorder)
        for j in range(steps):
            for session in sessions:
                session.before_step(j)
            rates.copy_(shares[j])
            loss.zero_()
            held = [[next(own) for own in batches] for _ in range(config.gradient_accumulation)]
            totals = [sum(map(predicted, own)) for own in zip(*held, strict=True)]
            for parts in held:
                length = padded(max(part["input_ids"].shape[1] for part in parts), longest)
                inputs, labels, weights = joined(parts, totals, padding, config.batch_size, length)
                new = [*inputs.values(), labels, weights]
                key = tuple(inputs), tuple((tensor.shape, tensor.dtype) for tensor in new)
                if key not in buffers:
                    held_here = [tensor.to(device, copy=True) for tensor in new]
                    call = _bound(gradient, tuple(inputs), held_here)
                    buffers[key] = held_here, _Piece(call, recorder)
                places, piece = buffers[key]
                for place, tensor in zip(places, new, strict=True):
                    place.copy_(tensor.pin_memory() if device.type == "cuda" else tensor, non_blocking=True)
                piece()
            finish()
            losses[:, j] = loss
            shown = show_progress(j, steps, loss.mean(), began, shown)
    return losses.cpu()


def attempt(
    recorder: Recorder | None,
    module: nn.Module,
    batches: Sequence[Iterator[dict[str, Tensor]]],
    sessions: Sequence[Session],
    group: Group,
    stacks: Sequence[Stack],
    config: Config,
    rngs: Sequence[np.random.Generator],
    task: Task,
    tokenizer: Any,
) -> Tensor | None:
    """:func:`train` with a ``recorder``; None, and nothing done, without one or where the method cannot."""
    if recorder is None:
        return None
    try:
        check(sessions)
    except NotStatic as reason:
        if recorder.record:
            logger.warning("Steps are not captured: %s", reason)
            recorder.record = None
        return None
    longest = data.longest(tokenizer, config.max_length)
    padding = data.padding(task, tokenizer)
    return train(module, batches, sessions, group, stacks, config, rngs, padding, longest, recorder)


def check(sessions: Sequence[Session]) -> None:
    """Raise :class:`NotStatic` where a step of ``sessions`` needs the host."""
    for optimizer in (optimizer for session in sessions for optimizer in session.optimizers):
        if any(session.from_losses for session in sessions):
            raise NotStatic("the method takes its steps from losses")
        if type(optimizer) not in (torch.optim.AdamW, RSO):
            raise NotStatic(f"the optimizer {type(optimizer).__name__} is not known here")
        if optimizer._optimizer_step_post_hooks:  # those before a step are part of it (FedProx)
            raise NotStatic("an option corrects each step on the host")


def padded(length: int, longest: int) -> int:
    """To how many tokens batches of ``length`` are padded: the next eighth of ``longest``, at least a multiple of 8."""
    width = 8 * math.ceil(longest / (8 * LENGTHS))
    return max(length, min(longest, width * math.ceil(length / width)))


def _bound(gradient: Callable[..., None], names: Sequence[str], held: Sequence[Tensor]) -> Call:
    *inputs, labels, weights = held
    return lambda: gradient(dict(zip(names, inputs, strict=True)), labels, weights)


def _prepared(
    sessions: Sequence[Session], stacks: Sequence[Stack], config: Config, device: torch.device
) -> tuple[list[torch.optim.Optimizer], Tensor, Tensor]:
    """The sessions' optimizers with every number of a step in a tensor; the learning rates that they read, one for each
    of their groups; and what these are at each step, steps × groups."""
    optimizers: list[torch.optim.Optimizer] = fused(sessions, stacks) if stacks else list(sessions[0].optimizers)
    projected = [optimizer for optimizer in optimizers if isinstance(optimizer, RSO)]
    if projected and stacks:
        optimizers = [o for o in optimizers if not isinstance(o, RSO)] + [StackedRSO(projected)]
    for rso in () if stacks else projected:
        rso.fix()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    factors = rate_factors(sessions[0].constant_rate, config)
    each = [[group["lr"] * factor for group in groups] for factor in factors]
    # torch's fused AdamW reads float32 on a GPU
    shares = torch.tensor(each, dtype=torch.float64 if device.type == "cpu" else torch.float32).to(device)
    rates = shares[0].clone()
    for group, rate in zip(groups, rates.unbind(), strict=True):
        group["lr"] = rate
    for optimizer in optimizers:
        for group in optimizer.param_groups if type(optimizer) is torch.optim.AdamW else ():
            group |= {"fused": True, "foreach": False, "capturable": device.type == "cuda"}
    return optimizers, rates, shares


@contextmanager
def _trained(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """As :func:`loop.train` leaves the parameters of a session."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
