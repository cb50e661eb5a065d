"""What the model in a process is worth on some rows."""

import itertools
from typing import Any

import datasets
import numpy as np

from fedkrso_app import data
from fedkrso_app.config import Config, ConfigError
from fedkrso_app.strategies.base import Local
from fedkrso_app.training import metrics
from fedkrso_app.training.loop import precision
from fedkrso_app.training.model import LoadedModel


def tally(local: Local, examples: datasets.Dataset, task: data.Task, tokenizer: Any) -> np.ndarray:
    """Sums over ``examples`` that add up over clients, as :func:`metrics.result` reads them."""
    c = local.config
    batches = data.evaluation_batches(examples, task, tokenizer, 4 * c.batch_size, c.max_length)
    with precision(c.compute_dtype, next(local.module.parameters()).device):
        return metrics.tally(local.module, batches, task.metric, task.num_labels)


def trial(loaded: LoadedModel, examples: datasets.Dataset, task: data.Task, config: Config, split: str) -> None:
    """The longest rows of a split through model, loss and metric: what fails here would fail in every round.

    Raises :class:`ConfigError`.
    """
    batches = data.evaluation_batches(examples, task, loaded.tokenizer, 2, config.max_length)
    try:
        with precision(config.compute_dtype, next(loaded.module.parameters()).device):
            metrics.tally(loaded.module, itertools.islice(batches, 1), task.metric, task.num_labels)
    except Exception as error:  # tokenizers, models and losses raise errors of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"model = {config.model!r} fails on the longest {split} rows ({reason}): lower max-length = "
            f"{config.max_length}, or take another model or task."
        ) from error
