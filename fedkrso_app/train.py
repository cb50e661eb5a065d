"""The one local loop: batch -> loss -> backward -> step, with the learning-rate schedule and progress."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import get_constant_schedule, get_cosine_schedule_with_warmup

from fedkrso_app.config import Config

logger = logging.getLogger("flwr")

_PROGRESS_SECONDS = 15.0


class TrainingError(RuntimeError):
    """Training went wrong in a way that the message explains."""


def head_optimizer(head: Mapping[str, nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay 0.01, as the paper's code trains the classifier; ``head`` may be empty."""
    return torch.optim.AdamW([{"params": list(head.values())}], lr=learning_rate, weight_decay=0.01)


def precision(dtype: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass in ``dtype``, a ``compute-dtype``."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Same seed, same bits on a GPU too, as far as torch can; it warns of an operation for which it cannot."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@contextmanager
def activation_memory(module: Any, setting: str) -> Iterator[None]:
    """What ``module``, a transformers model, keeps of each block for the backward pass.

    - ``keep``: all that its gradient needs.
    - ``recompute``: the block's input and its products that are no wider than what they are made of (queries, keys,
      values, both outputs, but not the wide layer of the feed-forward part); the rest is computed again.
    - ``checkpoint``: the block's input; the whole block is computed again.

    Gradients are the same to rounding, dropout masks included. Raises :class:`TrainingError` where the model cannot.
    """
    if setting == "keep":
        yield
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if setting == "recompute":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_narrow_products)
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


def _keep_narrow_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep x·Wᵀ (+ b) where W has no more outputs than inputs: there memory buys the most arithmetic."""
    if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        inputs, outputs = args[-1].shape
        if outputs <= inputs:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def train(
    module: nn.Module,
    batches: Iterator[dict[str, Tensor]],
    optimizers: Iterable[torch.optim.Optimizer],
    config: Config,
    rng: np.random.Generator,
    before_step: Callable[[int], None] = lambda j: None,
    constant_rate: bool = False,
) -> float:
    """``config.local_steps`` steps on ``module``; the mean of their losses.

    A step takes the mean gradient of ``gradient-accumulation`` batches, shortened to the L2 norm ``max-grad-norm``
    where that is not 0 and the gradient is longer; in a random subspace, E‖∇W Pᵀ‖² = ‖∇W‖².

    Every parameter of ``optimizers`` is trained (``requires_grad`` is set here and taken back). Unless
    ``constant_rate``, the learning rate rises over the first ``warmup`` share of the steps and falls as a cosine to 0.
    Dropout is drawn from ``rng`` and leaves torch's global generators as they were. Raises :class:`TrainingError` when
    the loss is no longer finite.
    """
    optimizers = list(optimizers)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    steps = config.local_steps
    schedules = [
        get_constant_schedule(optimizer)
        if constant_rate
        else get_cosine_schedule_with_warmup(optimizer, int(config.warmup * steps), steps)
        for optimizer in optimizers
    ]
    device = parameters[0].device
    losses = torch.zeros(steps, device=device)
    shown = started = time.monotonic()
    was_training = module.training
    module.train()
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        deterministic(device),
        activation_memory(module, config.activation_memory),
    ):
        torch.manual_seed(int(rng.integers(2**63)))
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for j in range(steps):
                before_step(j)
                for _ in range(config.gradient_accumulation):
                    batch = {name: value.to(device) for name, value in next(batches).items()}
                    with precision(config.compute_dtype, device):
                        loss = module(**batch).loss / config.gradient_accumulation
                    loss.backward()
                    losses[j] += loss.detach()
                if config.max_grad_norm:
                    nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                if j + 1 < steps and time.monotonic() - shown > _PROGRESS_SECONDS:
                    shown = time.monotonic()
                    left = (shown - started) / (j + 1) * (steps - j - 1)
                    logger.info("step %d/%d, loss %.4f, about %.0f s left", j + 1, steps, losses[j].item(), left)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            module.train(was_training)
    if not torch.isfinite(losses).all():
        bad = int((~torch.isfinite(losses)).nonzero()[0])
        raise TrainingError(
            f"the loss is {losses[bad].item()} at step {bad + 1}: lower {config.strategy}'s learning-rate"
        )
    return float(losses.double().mean())
