"""The one local loop: batch -> loss -> backward -> step, with the learning-rate schedule and progress."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fedkrso_app.config import Config
from fedkrso_app.core.flat import sent
from fedkrso_app.data.language import IGNORED
from fedkrso_app.training import attention
from fedkrso_app.training.activations import TrainingError, activation_memory
from fedkrso_app.training.device import module_of
from fedkrso_app.training.vocabulary import without_logits

logger = logging.getLogger("flwr")

_PROGRESS_SECONDS = 15.0


def head_optimizer(head: Mapping[str, nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay 0.01, as the paper's code trains the classifier; ``head`` may be empty."""
    return torch.optim.AdamW([{"params": list(head.values())}], lr=learning_rate, weight_decay=0.01)


def factor_optimizer(factors: Sequence[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW without decay. Low-rank factors are many and small, and are moved in a few calls: on a CPU nearly twice as
    quick as one after the other, with the same bits; on a GPU it is torch's default."""
    return torch.optim.AdamW(factors, lr=learning_rate, weight_decay=0.0, foreach=True)


def precision(dtype: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward pass in ``dtype``, a ``compute-dtype``."""
    kind = "cpu" if device.type == "meta" else device.type  # what counts a step there goes by it (training.counting)
    return torch.autocast(kind, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Same seed, same bits on a GPU too. Raises :class:`TrainingError` where torch has no such form of an operation."""
    if device.type not in ("cuda", "xpu"):
        yield
        return
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # with warn_only, attention's kernels would stay as they are
    settings.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise TrainingError(
            f"on a GPU torch cannot train this model to the same bits twice ({str(error).splitlines()[0]}); "
            "hide the GPU from this process (CUDA_VISIBLE_DEVICES='')."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        settings.fill_uninitialized_memory = fills


class NotFinite(TrainingError):
    """All steps are done, and a loss is no number."""


@dataclass
class Session:
    """One client's round, for whoever drives it: optimizers, what happens before a step, and the update at the end.

    ``update`` gives the arrays of the reply. With ``from_losses`` there is no dropout, and ``optimizer.step`` gets a
    closure that evaluates the step's loss at the parameters as they are. An optimizer that moves by that alone gives a
    parameter outside the module; those that are in it have their gradients as ever.
    """

    optimizers: Sequence[torch.optim.Optimizer]
    update: Callable[[], dict[str, np.ndarray]]
    before_step: Callable[[int], None] = lambda j: None
    constant_rate: bool = False
    from_losses: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizers move."""
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]


def predicted(batch: Mapping[str, Tensor]) -> int:
    """How many labels a batch's loss is the mean over: rows of a classifier; of a language model, (b, t) labels, those
    after a row's first that are not -100."""
    labels = batch["labels"]
    return len(labels) if labels.dim() == 1 else int((labels[:, 1:] != IGNORED).sum())


def train(
    module: nn.Module,
    batches: Iterator[dict[str, Tensor]],
    session: Session,
    config: Config,
    rng: np.random.Generator,
) -> float:
    """``config.local_steps`` steps on ``module``; the mean of their losses.

    A step takes the gradient of ``gradient-accumulation`` batches as if they were one, each weighted by its
    :func:`predicted` labels, shortened to the L2 norm ``max-grad-norm`` where that is not 0 and the gradient is longer;
    in a random subspace, E‖∇W Pᵀ‖² = ‖∇W‖².

    The session's parameters are trained (``requires_grad`` is set here and taken back). Unless its rate is constant,
    the learning rate rises over the first ``warmup`` share of the steps and then falls as a cosine to 0, or stays
    (``schedule``). Dropout is drawn
    from ``rng`` and leaves torch's global generators as they were. Raises :class:`NotFinite` when the loss is no longer
    finite.
    """
    parameters, steps = session.parameters, config.local_steps
    rates = schedules(session.optimizers, session.constant_rate, config)
    device = parameters[0].device
    losses = torch.zeros(steps, device=device)
    shown = began = time.monotonic()

    def loss_of(batch: Mapping[str, Tensor], share: float) -> Tensor:
        with precision(config.compute_dtype, device):
            inputs = {name: sent(value, device) for name, value in attention.told(batch).items()}
            return module(**inputs).loss * share

    with at_work(module, int(rng.integers(2**63)), device, config, dropout=not session.from_losses):
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for j in range(steps):
                session.before_step(j)
                held = [next(batches) for _ in range(config.gradient_accumulation)]
                total = sum(map(predicted, held))
                of_step = [(batch, predicted(batch) / total) for batch in held]
                closure = None
                if session.from_losses:
                    closure = torch.no_grad()(
                        lambda of_step=of_step: torch.stack([loss_of(*part) for part in of_step]).sum()
                    )
                for batch, share in of_step:
                    loss = loss_of(batch, share)
                    if loss.requires_grad:
                        loss.backward()
                    losses[j] += loss.detach()
                if config.max_grad_norm:
                    nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                for optimizer, rate in zip(session.optimizers, rates, strict=True):
                    optimizer.step(closure)  # type: ignore[arg-type]
                    optimizer.zero_grad()
                    rate.step()
                shown = show_progress(j, steps, losses[j], began, shown)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
    return mean_loss(losses, config)


def rate_factor(constant: bool, config: Config, j: int) -> float:
    """What a rate is multiplied by at local step j = 0, 1, …: transformers' schedules with warm-up, to the bit.

    Those that it has itself come with peft and more, seconds of every process.
    """
    steps = config.local_steps
    rising = 0 if constant else int(config.warmup * steps + 1e-9)  # .29 × 100 is 28.999…
    if j < rising:
        return j / rising
    if constant or config.schedule == "constant":
        return 1.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((j - rising) / max(1, steps - rising)))))


def schedules(optimizers: Sequence[torch.optim.Optimizer], constant: bool, config: Config) -> list[LambdaLR]:
    """The learning-rate schedule of each optimizer."""
    return [LambdaLR(optimizer, partial(rate_factor, constant, config)) for optimizer in optimizers]


def rate_factors(constant: bool, config: Config) -> list[float]:
    """:func:`rate_factor` at each local step."""
    return [rate_factor(constant, config, j) for j in range(config.local_steps)]


@contextmanager
def at_work(
    module: nn.Module,
    seed: int,
    device: torch.device,
    config: Config,
    dropout: bool = True,
    own_masks: bool = True,
) -> Iterator[nn.Linear | None]:
    """``module`` as it trains: dropout drawn from ``seed``, torch's generators as they were afterwards, the same bits
    each time, for backward what ``activation-memory`` says, and no logits of a language model, whose output layer is
    yielded then (:mod:`training.vocabulary`). Without ``own_masks`` torch's dropout stays on a CPU too."""
    was_training = module.training
    kind = "cuda" if device.type == "cpu" else device.type
    devices = [] if device.type in ("cpu", "mps") else [device]  # fork_rng does not know the one generator of mps
    with (
        torch.random.fork_rng(devices=devices, device_type=kind),
        deterministic(device),
        without_logits(module) as output_layer,
        activation_memory(module, config.activation_memory, own_masks),
        attention.unread(module),
    ):
        module.train(dropout)
        # torch.manual_seed would also note a traceback for every kind of device, for when it is initialised
        torch.default_generator.manual_seed(seed)
        if accelerator := module_of(device):
            accelerator.manual_seed(seed)
        try:
            yield output_layer
        finally:
            module.train(was_training)


def show_progress(j: int, steps: int, loss: Tensor | None, began: float, shown: float) -> float:
    """Log how far step ``j`` is, now and then, with its ``loss`` where that may be told; when that was last done
    (monotonic seconds)."""
    now = time.monotonic()
    if j + 1 == steps or now - shown < _PROGRESS_SECONDS:
        return shown
    left = (now - began) / (j + 1) * (steps - j - 1)
    text = "" if loss is None else f", loss {loss.item():.4f}"
    logger.info("step %d/%d%s, about %.0f s left", j + 1, steps, text, left)
    return now


def mean_loss(losses: Tensor, config: Config) -> float:
    """The mean of a client's losses, (steps,). Raises :class:`NotFinite` where one is not finite."""
    if not torch.isfinite(losses).all():
        bad = int((~torch.isfinite(losses)).nonzero()[0])
        raise NotFinite(f"the loss is {losses[bad].item()} at step {bad + 1}: lower {config.strategy}'s learning-rate")
    return float(losses.cpu().double().mean())
