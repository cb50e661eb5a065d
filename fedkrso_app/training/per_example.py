"""The local loop of example-level differential privacy: DP-SGD (arXiv:1607.00133) on what a session trains.

Of a client's N rows, each takes part in a step by its own coin, with probability q = B/N. A step's gradient is

    Ĝ = (Σ_i min(1, C/‖g_i‖) g_i + σ C Z) / (qN)        Z: one N(0, 1) for each value that is trained

whoever was drawn: a batch of nobody is a step along noise. All that a method makes of Ĝ (moments, projections, factors)
is post-processing. Coins and Z come from keys of the operating system (:mod:`core.noise`); dropout comes from the run's
seed, as in every run.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core.examples import NotRows, RowGradients, row_gradients
from fedkrso_app.core.noise import NoiseStream
from fedkrso_app.data.language import IGNORED
from fedkrso_app.training import attention, vocabulary
from fedkrso_app.training.loop import Session, at_work, precision, schedules, show_progress
from fedkrso_app.training.together import client_losses

logger = logging.getLogger("flwr")

_SAME = {"float32": 1e-3, "bfloat16": 5e-2}  # relative distance of two gradients that differ by rounding, at most

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Mechanism:
    """How a client of ``rows`` rows draws, clips and adds noise; ``batch`` is B, the mean number of rows drawn."""

    rows: int
    batch: int
    clip: float  # C
    noise: float  # σ, in units of C
    stream: NoiseStream

    @property
    def rate(self) -> float:
        """q."""
        return min(1.0, self.batch / self.rows)

    def drawn(self) -> np.ndarray:
        """The rows of the next step, (k,) int64 ascending."""
        return np.flatnonzero(self.stream.uniform(self.rows) < self.rate)

    def released(self, total: Tensor) -> Tensor:
        """Ĝ of one parameter from the clipped sum of its rows' gradients."""
        if self.noise:
            z = torch.from_numpy(self.stream.normal(*total.shape)).mul_(self.noise * self.clip)
            total = total + z.to(total)
        return total / (self.rate * self.rows)


def train(
    module: nn.Module,
    read: Callable[[np.ndarray], Batch],
    session: Session,
    config: Config,
    rng: np.random.Generator,
    mechanism: Mechanism,
    lengths: np.ndarray | None = None,
) -> None:
    """What :func:`training.loop.train` does, with differential privacy for each row; no loss is told.

    ``read`` makes a batch, as :func:`data.batches` do, of the rows at the given positions. A step's rows go through the
    model in parts of at most ``batch-size``, those of like ``lengths`` (one for each of the client's rows) together,
    which changes nothing but rounding. A row that cannot be read
    (ValueError), or whose gradient is not finite, counts as one without gradient. Raises :class:`ConfigError` where
    rows have no gradients of their own.
    """
    parameters, steps = session.parameters, config.local_steps
    rates = schedules(session.optimizers, session.constant_rate, config)
    shown = began = time.monotonic()
    with _rows_of(module, session, config, int(rng.integers(2**63)), dropout=True) as backward:
        try:
            for j in range(steps):
                session.before_step(j)
                sums = [torch.zeros_like(parameter) for parameter in parameters]
                drawn = mechanism.drawn()
                drawn = drawn if lengths is None else drawn[np.argsort(lengths[drawn], kind="stable")]
                for batch in _parts(read, drawn, config.batch_size):
                    for total, more in zip(sums, backward(batch).clipped(mechanism.clip), strict=True):
                        if more is not None:
                            total += more
                for parameter, total in zip(parameters, sums, strict=True):
                    parameter.grad = mechanism.released(total)
                for optimizer, rate in zip(session.optimizers, rates, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    rate.step()
                shown = show_progress(j, steps, None, began, shown)
        finally:
            for parameter in parameters:
                parameter.grad = None


def _parts(read: Callable[[np.ndarray], Batch], rows: np.ndarray, size: int) -> Iterator[Batch]:
    """Batches of at most ``size`` of the ``rows``. A row that cannot be read leaves the others where they are."""
    for part in np.array_split(rows, math.ceil(len(rows) / size)) if len(rows) else ():
        try:
            yield read(part)
        except ValueError as error:
            if len(part) > 1:
                yield from _parts(read, part, 1)
            else:
                logger.warning("a row is left out: %s", error)


def check(module: nn.Module, read: Callable[[np.ndarray], Batch], rows: int, session: Session, config: Config) -> None:
    """See on a few of a client's ``rows`` that the gradient of one does not depend on those beside it.

    Raises :class:`ConfigError` with the model's name where it does, or where rows have no gradients of their own.
    """
    session.before_step(0)
    found = []
    with _rows_of(module, session, config, 0, dropout=False) as backward:
        for others in ([1], [2, 3]):
            gradients = backward(read(np.array([0, *others]) % rows))
            first = torch.zeros(gradients.rows, device=session.parameters[0].device)
            first[0] = 1
            found.append(torch.cat([g.flatten() for g in gradients.weighted(first) if g is not None]))
    one, other = found
    if torch.dist(one, other) > _SAME[config.compute_dtype] * one.norm():
        raise _refused(config, "the gradient of a row depends on the rows beside it")


def _refused(config: Config, reason: str) -> ConfigError:
    return ConfigError(
        f"privacy.unit = 'example' does not work with model = {config.model!r} ({reason}): choose another model, or "
        "try head = 'linear'."
    )


@contextmanager
def _rows_of(
    module: nn.Module, session: Session, config: Config, seed: int, dropout: bool
) -> Iterator[Callable[[Batch], RowGradients]]:
    """Inside, the session's parameters are trained, and the function that is yielded takes a batch through the model
    and back."""
    parameters = session.parameters
    device = parameters[0].device
    try:
        if session.from_losses:
            raise NotRows(f"{config.strategy} takes no gradients")
        norms = [name for name, part in module.named_modules() if isinstance(part, _BatchNorm)]
        if norms:
            raise NotRows(f"{norms[0]} normalises over a batch")
        with (
            at_work(module, seed, device, config, dropout) as output_layer,
            row_gradients(module, parameters) as found,
        ):
            for parameter in parameters:
                parameter.requires_grad_(True)

            def backward(batch: Batch) -> RowGradients:
                found.start(len(batch["labels"]))
                with precision(config.compute_dtype, device):
                    losses = row_losses(
                        module, {k: v.to(device) for k, v in attention.told(batch).items()}, output_layer
                    )
                losses.sum().backward()
                if stray := [p for p in parameters if p.grad is not None]:
                    name = next((name for name, p in module.named_parameters() if p is stray[0]), "a parameter")
                    raise NotRows(f"{name} is used outside its layer")
                return found

            yield backward
    except NotRows as reason:
        raise _refused(config, str(reason)) from None
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def row_losses(module: nn.Module, batch: Mapping[str, Tensor], output_layer: nn.Linear | None) -> Tensor:
    """Each row's own loss, (b,): of a language model the mean over the tokens that the row is asked for (0 without
    any). ``output_layer`` is that of a module that gives hidden states for logits (:mod:`training.vocabulary`)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    logits = module(**inputs).logits
    weights = torch.ones(labels.shape, device=labels.device)
    if labels.dim() == 2:
        weights = (labels != IGNORED).float()
        weights[:, 0] = 0  # nothing is before a row's first token
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    if output_layer is not None:
        return vocabulary.losses(logits, output_layer, labels, weights, len(labels))
    return client_losses(logits, labels, weights, len(labels))
