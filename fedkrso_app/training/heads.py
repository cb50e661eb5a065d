"""Which part of a classifier's head is trained, by the key ``head``; the rest of it is frozen and never travels.

A dense layer can be the larger part of what a LoRA method sends: of RoBERTa-base's head of 592,130 parameters the
output layer has 1,538.
"""

from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn

from fedkrso_app.config import ConfigError
from fedkrso_app.training import checkpoint

KINDS = ("dense", "linear", "frozen")


def trained(
    kind: str, module: nn.Module, head: Mapping[str, nn.Parameter], new: Set[str], num_labels: int
) -> dict[str, nn.Parameter]:
    """The part of ``head`` that is trained.

    ``dense``: all of it. ``frozen``: nothing, it stays as the checkpoint has it or as the seed has drawn it.
    ``linear``: its output layer. Of the layers before that, those that the checkpoint has stay as they are; those that
    it lacks (``new``) become the identity where they are square, so that the head is linear but for the family's own
    activation, and the result is still a plain hub model. Raises :class:`ConfigError` for a language model.
    """
    if kind != "dense" and not num_labels:
        raise ConfigError(
            f"head = {kind!r} is for classifiers, and this task trains a language model: set it to 'dense'."
        )
    if kind == "dense" or not head:
        return dict(head)
    output = _output(module, head, num_labels) if kind == "linear" else {}
    rest = {name: parameter for name, parameter in head.items() if name not in output}
    drawn = [name for name in rest if output and name in new]
    identities = [name for name in drawn if _make_identity(name, rest[name], rest)]
    if rest:
        checkpoint.say(
            "head = '%s': of the head %d parameters are trained (%s), %d are frozen%s",
            kind,
            sum(parameter.numel() for parameter in output.values()),
            ", ".join(output) or "none",
            sum(parameter.numel() for parameter in rest.values()),
            f"; the identity: {', '.join(identities)}" if identities else "",
        )
    return output


def output_bias(module: nn.Module, head: Mapping[str, nn.Parameter], num_labels: int) -> str | None:
    """The name of the output layer's bias in ``head``; None where it has none."""
    biases = [name for name, p in _output(module, head, num_labels).items() if p.shape == (num_labels,)]
    return biases[-1] if biases else None


def _output(module: nn.Module, head: Mapping[str, nn.Parameter], num_labels: int) -> dict[str, nn.Parameter]:
    """The parameters of the last linear layer in ``head`` that gives ``num_labels`` values; all if there is none."""
    layers = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part.out_features == num_labels and f"{name}.weight" in head
    ]
    return {name: p for name, p in head.items() if not layers or name.rpartition(".")[0] == layers[-1]}


@torch.no_grad()
def _make_identity(name: str, weight: Tensor, rest: Mapping[str, nn.Parameter]) -> bool:
    """Make a square layer the identity, if ``weight`` is that of one."""
    if not name.endswith(".weight") or weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        return False
    nn.init.eye_(weight)
    if (bias := rest.get(name.removesuffix("weight") + "bias")) is not None:
        bias.zero_()
    return True
