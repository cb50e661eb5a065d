"""The one local loop: batch -> loss -> backward -> step, with the learning-rate schedule and progress."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from transformers import get_constant_schedule, get_cosine_schedule_with_warmup

from fedkrso_app.config import Config

logger = logging.getLogger("flwr")

_PROGRESS_SECONDS = 15.0


class TrainingError(RuntimeError):
    """Training went wrong in a way that the message explains."""


def head_optimizer(head: Mapping[str, nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay 0.01, as the paper's code trains the classifier; ``head`` may be empty."""
    return torch.optim.AdamW([{"params": list(head.values())}], lr=learning_rate, weight_decay=0.01)


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
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(rng.integers(2**63)))
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for j in range(steps):
                before_step(j)
                batch = {name: value.to(device) for name, value in next(batches).items()}
                loss = module(**batch).loss
                loss.backward()
                losses[j] = loss.detach()
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                if j + 1 < steps and time.monotonic() - shown > _PROGRESS_SECONDS:
                    shown = time.monotonic()
                    left = (shown - started) / (j + 1) * (steps - j - 1)
                    logger.info("step %d/%d, loss %.4f, about %.0f s left", j + 1, steps, loss.item(), left)
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
