"""Tasks and rows: what a task is, where its rows come from, who holds them, and batches of them."""

from fedkrso_app.data.loading import batches, evaluation_batches, load, resolve
from fedkrso_app.data.partitions import partition
from fedkrso_app.data.tasks import Task, task

__all__ = ["Task", "batches", "evaluation_batches", "load", "partition", "resolve", "task"]
