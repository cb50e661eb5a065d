"""The evaluation of a replica, the same on the server and on a client."""

from typing import Any

import datasets
import numpy as np

from fedkrso_app import data
from fedkrso_app.federation.replica import Replica
from fedkrso_app.training import metrics
from fedkrso_app.training.loop import precision


def tally(replica: Replica, examples: datasets.Dataset, task: data.Task, tokenizer: Any) -> np.ndarray:
    """The :func:`metrics.tally` of ``examples`` at the replica's version, in the run's ``compute-dtype``."""
    method = replica.computing()
    module, c = method.module, method.config
    rows = 4 * c.batch_size  # without gradients more fits
    batches = data.evaluation_batches(examples, task, tokenizer, rows, c.max_length)
    with precision(c.compute_dtype, next(module.parameters()).device):
        return metrics.tally(module, batches, task.num_labels)
