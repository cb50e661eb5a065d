"""The local loop for several clients in one pass: one forward and backward over all their rows, each its own steps."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkrso_app.config import Config
from fedkrso_app.core.flat import sent
from fedkrso_app.core.stacked import Group, Stack, Unstackable
from fedkrso_app.data.language import IGNORED
from fedkrso_app.training import attention, vocabulary
from fedkrso_app.training.loop import Session, at_work, precision, predicted, schedules, show_progress

logger = logging.getLogger("flwr")


def at_once(config: Config, kind: str) -> int:
    """The most clients of a node that train in one pass on a ``kind`` of device. With ``batch-clients = "auto"`` a CPU
    takes one: it is busy with one client's rows, and a pass pads them to the longest of all."""
    if config.batch_clients != "auto":
        return int(config.batch_clients)
    return 1 if kind == "cpu" else 2**31


def train(
    module: nn.Module,
    batches: Sequence[Iterator[dict[str, Tensor]]],
    sessions: Sequence[Session],
    group: Group,
    stacks: Sequence[Stack],
    config: Config,
    rngs: Sequence[np.random.Generator],
    padding: tuple[Mapping[str, int], bool],
) -> Tensor:
    """What :func:`loop.train` does, for N clients at once; the losses of their steps, N × ``config.local_steps``.

    ``stacks`` hold what the sessions train; ``padding`` (as :func:`data.padding`) fills up to the longest row of the
    pass. Losses are the clients' own means, and a gradient longer than ``max-grad-norm`` is shortened client by
    client. Dropout is drawn from the generators of all, once for the pass. A loss that is not finite is left to the
    caller: it concerns its client alone. Raises :class:`Unstackable`.
    """
    if any(session.from_losses for session in sessions):
        raise Unstackable("the method takes its steps from losses")
    steps, began = config.local_steps, time.monotonic()
    shown = began
    live = trained_stacks(sessions, stacks)
    optimizers = fused(sessions, live)
    rates = schedules(optimizers, sessions[0].constant_rate, config)
    device = live[0].whole.device
    losses = torch.zeros(len(sessions), steps, device=device)
    with at_work(module, seed_of(rngs), device, config) as output_layer, ExitStack() as gradients:
        for stack in live:
            gradients.enter_context(stack.trained())
        for j in range(steps):
            for session in sessions:
                session.before_step(j)
            held = [[next(own) for own in batches] for _ in range(config.gradient_accumulation)]
            totals = [sum(map(predicted, own)) for own in zip(*held, strict=True)]
            for parts in held:
                inputs, labels, weights = joined(parts, totals, padding)
                group.rows = len(labels) // group.clients
                with precision(config.compute_dtype, device):
                    logits = module(
                        **{name: sent(value, device) for name, value in attention.told(inputs).items()}
                    ).logits
                    given = logits, sent(labels, device), sent(weights, device)
                    if output_layer is None:
                        own = client_losses(*given, group.clients)
                    else:
                        own = vocabulary.losses(given[0], output_layer, *given[1:], group.clients)
                own.sum().backward()
                losses[:, j] += own.detach().to(losses.dtype)
            if config.max_grad_norm:
                for session in sessions:
                    nn.utils.clip_grad_norm_(session.parameters, config.max_grad_norm)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.step()
                rate.step()
            for stack in live:
                stack.whole.grad.zero_()  # type: ignore[union-attr]
            shown = show_progress(j, steps, losses[:, j].mean(), began, shown)
    return losses.cpu()


def trained_stacks(sessions: Sequence[Session], stacks: Sequence[Stack]) -> list[Stack]:
    """Those of ``stacks`` that the sessions train. Raises :class:`Unstackable` where they train something else too."""
    trained = {id(p) for session in sessions for p in session.parameters}
    live = [stack for stack in stacks if any(id(part) in trained for part in stack.slices)]
    if len(trained) != sum(len(stack.slices) for stack in live):
        raise Unstackable("the method trains something that is not each client's own")
    return live


def seed_of(rngs: Sequence[np.random.Generator]) -> int:
    """What dropout is drawn from: a draw of the one client's generator, or one of each client's together."""
    drawn = [int(rng.integers(2**63)) for rng in rngs]
    return drawn[0] if len(drawn) == 1 else int(np.random.SeedSequence(drawn).generate_state(1, np.uint64)[0] >> 1)


def fused(sessions: Sequence[Session], stacks: Sequence[Stack]) -> list[torch.optim.Optimizer]:
    """The sessions' optimizers; AdamWs on slices of the same stacks, with the same settings, as one on those stacks.

    AdamW knows no more of a parameter than its single values, so that one for all takes the steps of each.
    """
    whole = {id(part): (stack.whole, client) for stack in stacks for client, part in enumerate(stack.slices)}
    result: list[torch.optim.Optimizer] = []
    for alike in zip(*(session.optimizers for session in sessions), strict=True):
        groups = [_on_stacks(parts, whole) for parts in zip(*(o.param_groups for o in alike), strict=True)]
        plain = all(type(o) is torch.optim.AdamW and not o.state and not _watched(o) for o in alike)
        if plain and all(groups):
            result.append(torch.optim.AdamW([found for found in groups if found]))
        else:
            result += alike
    return result


def _watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody has asked to be called at its steps (FedProx)."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def _on_stacks(parts: Sequence[Mapping[str, Any]], whole: Mapping[int, tuple[Tensor, int]]) -> dict[str, Any] | None:
    """One optimizer's group for those of all clients; None where they differ in more than the client."""
    options = [{key: value for key, value in part.items() if key != "params"} for part in parts]
    found = [[whole.get(id(p), (None, client)) for p in part["params"]] for client, part in enumerate(parts)]
    stacks = [[id(tensor) for tensor, _ in own] for own in found]
    in_order = all(client == place for client, own in enumerate(found) for _, place in own)
    if any(option != options[0] for option in options) or any(own != stacks[0] for own in stacks) or not in_order:
        return None
    if any(tensor is None for tensor, _ in found[0]):
        return None
    return {**options[0], "params": [tensor for tensor, _ in found[0]]}


def joined(
    batches: Sequence[Mapping[str, Tensor]],
    totals: Sequence[int],
    padding: tuple[Mapping[str, int], bool],
    rows: int = 0,
    length: int = 0,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The batches of N clients as one of N·b rows, client by client: inputs, labels, and the weight of each label.

    All are as long as the longest (``padding``) and have as many rows as the largest, at least ``length`` and ``rows``;
    a row that fills up is the client's first once more, with weight 0. The weights of a client's batches of one step,
    whose labels are ``totals``, add up to 1.
    """
    rows = max(rows, *(len(batch["labels"]) for batch in batches))
    values, in_front = padding
    length = max(length, *(batch["input_ids"].shape[1] for batch in batches))

    def filled(name: str, value: Tensor) -> Tensor:
        if value.dim() > 1:
            fill, more = IGNORED if name == "labels" else values.get(name, 0), length - value.shape[1]
            value = functional.pad(value, (more, 0) if in_front else (0, more), value=fill)
        return torch.cat([value, value[:1].expand(rows - len(value), *value.shape[1:])])

    inputs = {name: torch.cat([filled(name, batch[name]) for batch in batches]) for name in batches[0]}
    labels = inputs.pop("labels")
    weights = torch.zeros(len(batches), rows, *labels.shape[1:], dtype=torch.float64)
    for own, batch, total in zip(weights, batches, totals, strict=True):
        own[: len(batch["labels"])] = 1 / total
    weights = weights.flatten(0, 1)
    return inputs, labels, weights if labels.dim() == 1 else weights * (labels != IGNORED)


def client_losses(logits: Tensor, labels: Tensor, weights: Tensor, clients: int) -> Tensor:
    """Each client's loss, (N,): that of transformers' heads, weighted label by label.

    ``logits`` are (N·b, classes), (N·b, 1) of a regression, or (N·b, t, vocabulary) of a language model, whose labels
    are where their tokens are.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.dim() == 2:
        logits, labels, weights = logits[:, :-1], labels[:, 1:], weights[:, 1:]
    if labels.is_floating_point():
        each = (logits.squeeze(-1) - labels).square()
    else:
        each = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    # 0 × NaN is NaN, but of the same client
    return (each.view(clients, -1) * weights.reshape(clients, -1).to(each.dtype)).sum(1)
