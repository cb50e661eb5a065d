"""Tasks and rows: what a task is, where its rows come from, who holds them, and batches of them."""

from fedkrso_app.data.batching import batches, evaluation_batches, longest, longest_rows, padding
from fedkrso_app.data.loading import check, load, resolve
from fedkrso_app.data.partitions import following, partition
from fedkrso_app.data.tasks import Task, metric, task

__all__ = [
    "Task",
    "batches",
    "check",
    "evaluation_batches",
    "following",
    "load",
    "longest",
    "longest_rows",
    "metric",
    "padding",
    "partition",
    "resolve",
    "task",
]
