"""What the model in a process is worth on some rows.

A batch is as large as a device is quick with, whatever the batches of training are. Another batch size gives other last
bits, so that it depends on nothing but the kind of device, and on its memory only where that is exceeded.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import torch
from torch import Tensor

from fedkrso_app import data
from fedkrso_app.config import Config, ConfigError
from fedkrso_app.core.flat import sent
from fedkrso_app.records.schema import Field, Schema
from fedkrso_app.strategies.base import Local
from fedkrso_app.training import metrics, vocabulary
from fedkrso_app.training.device import free_bytes, release
from fedkrso_app.training.loop import precision
from fedkrso_app.training.model import LoadedModel

logger = logging.getLogger("flwr")

Batch = dict[str, Tensor]

_LOGITS = 2**24  # of a language model that makes them, in a batch
_SHARE = 16  # a device keeps batches that take up to this part of its free memory

_limits: dict[str, int] = {}  # tokens of a batch by kind of device, where there was not memory for more
_kept: WeakKeyDictionary[datasets.Dataset, tuple[Any, list[Batch]]] = WeakKeyDictionary()


def tally(local: Local, examples: datasets.Dataset, task: data.Task, tokenizer: Any) -> np.ndarray:
    """Sums over ``examples`` that add up over clients, as :func:`metrics.result` reads them."""
    c = local.config
    module: Any = local.module
    device = next(module.parameters()).device
    wide = module.get_output_embeddings().weight.shape[0] if task.language and not vocabulary.can(module) else 0
    while True:
        tokens = min(batch_tokens(device.type, wide), _limits.get(device.type, 2**31))
        try:
            batches = _batches(examples, task, tokenizer, tokens, c.max_length, device)
            with precision(c.compute_dtype, device):
                return metrics.tally(module, batches, task.metric, task.num_labels)
        except (torch.OutOfMemoryError, MemoryError):
            if tokens < 2:
                raise
        _limits[device.type] = half = tokens // 2
        logger.warning("An evaluation of %d tokens at once does not fit into memory: %d from now on", tokens, half)
        release(device)


def batch_tokens(kind: str, wide: int) -> int:
    """Tokens of a batch, padding included, on a ``kind`` of device: a core is quickest with little memory, a GPU's
    kernels then take longer than to start them. ``wide``: the logits that a language model makes for each."""
    most = 2**12 if kind == "cpu" else 2**15
    return max(1, min(most, _LOGITS // wide)) if wide else most


def stays(size: int, free: int) -> bool:
    """Whether batches of ``size`` bytes stay on a device with ``free`` bytes for the evaluations to come."""
    return size <= free // _SHARE


def _batches(
    examples: datasets.Dataset, task: data.Task, tokenizer: Any, tokens: int, max_length: int, device: torch.device
) -> Iterable[Batch]:
    """The batches of ``examples``: those that stayed on ``device``, which all do or none."""
    made_of = task, tokenizer, tokens, max_length, device
    before, batches = _kept.get(examples, (None, []))
    if before == made_of:
        return batches
    made = data.evaluation_batches(examples, task, tokenizer, tokens, max_length)
    return _staying(made, examples, made_of, device) if free_bytes(device) else made


def _staying(made: Iterable[Batch], examples: datasets.Dataset, made_of: Any, device: torch.device) -> Iterable[Batch]:
    """``made``, on ``device``, where they stay if all of them may."""
    staying: list[Batch] | None = []
    free = free_bytes(device)
    for cpu in made:
        batch = {name: sent(tensor, device) for name, tensor in cpu.items()}
        yield batch
        if staying is not None:
            staying.append(batch)
            staying = staying if stays(size_of(staying), free) else None
    if staying is not None:
        _kept[examples] = made_of, staying


def size_of(batches: Sequence[Batch]) -> int:
    """Bytes."""
    return sum(tensor.nbytes for batch in batches for tensor in batch.values())


def tally_schema(task: data.Task) -> Schema:
    """Of what a client says of an evaluation."""
    return Schema({"tally": Field("float64", (metrics.tally_size(task.metric, task.num_labels),))})


def trial(loaded: LoadedModel, examples: datasets.Dataset, task: data.Task, config: Config, split: str) -> None:
    """The longest rows of a split through model, loss and metric: what fails here would fail in every round.

    Raises :class:`ConfigError`.
    """
    try:
        batch = data.longest_rows(examples, task, loaded.tokenizer, 2, config.max_length)
        with precision(config.compute_dtype, next(loaded.module.parameters()).device):
            metrics.tally(loaded.module, [batch], task.metric, task.num_labels)
    except Exception as error:  # tokenizers, models and losses raise errors of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"model = {config.model!r} fails on the longest {split} rows ({reason}): lower max-length = "
            f"{config.max_length}, or take another model or task."
        ) from error
