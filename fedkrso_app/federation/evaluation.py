"""What the model in a process is worth on some rows."""

from typing import Any

import datasets
import numpy as np

from fedkrso_app import data
from fedkrso_app.strategies.base import Local
from fedkrso_app.training import metrics
from fedkrso_app.training.loop import precision


def tally(local: Local, examples: datasets.Dataset, task: data.Task, tokenizer: Any) -> np.ndarray:
    """Sums over ``examples`` that add up over clients, as :func:`metrics.result` reads them."""
    c = local.config
    batches = data.evaluation_batches(examples, task, tokenizer, 4 * c.batch_size, c.max_length)
    with precision(c.compute_dtype, next(local.module.parameters()).device):
        return metrics.tally(local.module, batches, task.metric, task.num_labels)
