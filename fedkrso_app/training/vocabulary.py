"""A language model's loss and first choices without its logits (tokens × vocabulary), which can outweigh all the rest.

The output layer is applied to some tokens at a time, and to those alone whose next token is asked for. Each time the
gradient of the hidden states is computed too and the logits are dropped: nothing is kept, and no product is made twice.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkrso_app.core.subspace import replaced
from fedkrso_app.data.language import IGNORED

logger = logging.getLogger("flwr")

_VALUES = 2**24  # logits at a time, 64 MiB in float32

_able: dict[str, bool] = {}  # kinds of models that were tried


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        parts: int,
        every: bool,
    ) -> Tensor:
        asked = torch.arange(len(weights), device=weights.device) if every else (weights != 0).nonzero().squeeze(1)
        owners = asked // (len(weights) // parts)
        wants = ctx.needs_input_grad[:3]
        losses = torch.zeros(parts, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight) if wants[1] else None
        d_bias = torch.zeros_like(bias) if bias is not None and wants[2] else None
        for rows, owner in zip(*(x.split(max(1, _VALUES // len(weight))) for x in (asked, owners)), strict=True):
            h, share = hidden[rows], weights[rows].to(losses.dtype)
            logits = functional.linear(h, weight, bias).to(losses.dtype)
            logs = torch.log_softmax(logits, 1)
            losses.index_add_(0, owner, -logs.gather(1, labels[rows, None]).squeeze(1) * share)
            if not any(wants):
                continue
            d_logits = logs.exp_()
            d_logits[torch.arange(len(rows), device=rows.device), labels[rows]] -= 1
            d_logits = (d_logits * share[:, None]).to(h.dtype)
            if d_hidden is not None:
                d_hidden[rows] = (d_logits @ weight.to(d_logits.dtype)).to(hidden.dtype)
            if d_weight is not None:
                d_weight += (d_logits.T @ h).to(weight.dtype)
            if d_bias is not None:
                d_bias += d_logits.sum(0).to(d_bias.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.parts = parts
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        each = grads[0]
        if d_hidden is not None:
            d_hidden = (d_hidden.view(ctx.parts, -1) * each[:, None].to(d_hidden.dtype)).view_as(d_hidden)
        # The layer itself is trained with the tokens of one client alone, whose gradient is one number.
        d_weight = None if d_weight is None else d_weight * each[0].to(d_weight.dtype)
        d_bias = None if d_bias is None else d_bias * each[0].to(d_bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


def losses(
    hidden: Tensor, head: nn.Linear, labels: Tensor, weights: Tensor, parts: int = 1, every: bool = False
) -> Tensor:
    """Σ weight · cross entropy over the tokens of each of ``parts`` clients, (parts,) and at least float32.

    ``hidden`` (rows × t × n) are the last hidden states, client by client; ``labels`` and ``weights`` (rows × t) are
    where their tokens are and belong to the states before them. A token of weight 0 is never looked at, but with
    ``every``, which asks no tensor how many there are. With more than one part, ``head`` must be frozen.
    """
    states, wanted = hidden[:, :-1].reshape(-1, hidden.shape[-1]), labels[:, 1:].reshape(-1).clamp(min=0)
    share = weights[:, 1:].reshape(-1).to(torch.promote_types(hidden.dtype, torch.float32))
    return cast(Tensor, _Loss.apply(states, head.weight, head.bias, wanted, share, parts, every))


def first_choices(hidden: Tensor, head: nn.Linear) -> Tensor:
    """The likeliest token after each of ``hidden`` (rows × t × n): rows × t int64."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    chosen = [head(part).argmax(1) for part in flat.split(max(1, _VALUES // len(head.weight)))]
    return torch.cat(chosen).view(hidden.shape[:-1])


@contextmanager
def without_logits(module: Any) -> Iterator[nn.Linear | None]:
    """Inside, ``.logits`` of a language model are its last hidden states and its ``.loss`` is made from these; yields
    the output layer. Other models, and those that do more with their logits, are as ever: yields None."""
    if not can(module):
        yield None
        return
    head = module.get_output_embeddings()
    with _patched(module, head, lambda logits, labels, *_, **__: _mean_loss(logits, head, labels)):
        yield head


def _mean_loss(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """transformers' loss of a language model: the mean over the labels that are asked for."""
    asked = (labels != IGNORED).to(torch.promote_types(hidden.dtype, torch.float32))
    asked[:, 0] = 0  # nothing is before a row's first token
    return losses(hidden, head, labels, asked / asked.sum().clamp(min=1)).squeeze(0)


@contextmanager
def _patched(module: Any, head: nn.Linear, loss: Any) -> Iterator[nn.Module]:
    """Inside, ``loss`` is the model's and its output layer gives what it gets; yields what stands in its place."""
    name = next(name for name, part in module.named_modules() if part is head)
    before = module.__dict__.get("_loss_function")
    module.loss_function = loss
    try:
        with replaced(module, {name: (through := nn.Identity())}):
            yield through
    finally:
        del module._loss_function
        if before is not None:
            module.loss_function = before


def can(module: Any) -> bool:
    """Whether a model gives what its output layer makes to its loss as it is: tried once, on two tokens, which must be
    before its layers are replaced for training."""
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        return False
    kind = f"{type(module).__name__} on {head.weight.device.type} {module.config.to_json_string(use_diff=False)}"
    if kind not in _able:
        given: list[Tensor] = []

        def look(logits: Tensor, *_: Any, **__: Any) -> Tensor:
            given.append(logits)
            return logits.sum()  # a loss has no shape

        ids = torch.ones(1, 2, dtype=torch.long, device=head.weight.device)
        blind = False  # a plan's model has no values, which some models look at; nearly all are able
        with torch.no_grad(), _patched(module, head, look) as through:
            through.register_forward_hook(lambda _, args, output: given.append(output))
            try:
                module.forward(input_ids=ids, labels=ids)  # no hooks of others
            except RuntimeError:
                blind = ids.is_meta
                if not blind:
                    raise
        _able[kind] = blind or (len(given) == 2 and given[0] is given[1])
        if not _able[kind]:
            logger.info("The loss of this model needs all its logits at once: it changes them after its output layer")
    return _able[kind]
