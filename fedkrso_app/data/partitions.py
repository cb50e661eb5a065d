"""Who holds which rows in a simulation."""

import warnings
from typing import Any

import datasets
import numpy as np

from fedkrso_app.config import ConfigError
from fedkrso_app.data.tasks import Task


def partition(
    train: datasets.Dataset, task: Task, num_partitions: int, scheme: str, alpha: float, seed: int
) -> list[np.ndarray]:
    """Who holds which rows: ``num_partitions`` ascending int64 arrays, every row in exactly one, none empty.

    ``scheme`` is "iid" (equal sizes), "dirichlet" (the rows of each label, or of each value of column ``task.group``,
    shared out in proportions drawn with ``alpha``), "dirichlet-equal" (equal sizes; each client draws its shares of the
    labels, as in Hsu et al., arXiv:1909.06335) or "natural" (all rows of a value of ``task.group`` with one client;
    clients have equally many values, give or take one). Equal arguments give equal partitions. Raises
    :class:`ConfigError` where that is impossible.
    """
    if not 1 <= num_partitions <= len(train):
        raise ConfigError(f"num-supernodes = {num_partitions} must be 1 to {len(train)}, {task.name}'s rows.")
    # Runs of neighbouring rows are cut, and files are often sorted by source: shuffle first.
    table: Any = train.with_format("arrow")[:]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train))
    if scheme == "iid":
        return [np.sort(rows) for rows in np.array_split(order, num_partitions)]
    labels = np.zeros(len(train), np.int64)
    if task.group:
        values = table[task.group].to_pylist()
        distinct = {value: code for code, value in enumerate(sorted(set(values), key=str))}
        labels = np.array([distinct[value] for value in values])
    elif task.label:
        labels = table[task.label].to_numpy()
        if task.regression:
            labels = np.digitize(labels, np.quantile(labels, [0.2, 0.4, 0.6, 0.8]))
    if scheme == "natural":
        if len(distinct) < num_partitions:
            problem = f"partition-column = {task.group!r} has {len(distinct)} values for {num_partitions} clients"
            raise ConfigError(f"{problem}; lower num-supernodes, or choose another column.")
        groups = np.array_split(rng.permutation(len(distinct)), num_partitions)
        return [np.flatnonzero(np.isin(labels, group)) for group in groups]
    if scheme == "dirichlet-equal":
        return [np.sort(order[rows]) for rows in equal_shares(labels[order], num_partitions, alpha, rng)]
    # here, because it takes seconds to import and most runs do without
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(num_partitions, "label", float(alpha), 1, shuffle=False, seed=seed)
    shuffled = datasets.Dataset.from_dict({"row": order, "label": labels[order]})
    partitioner.dataset = shuffled.with_format("arrow")  # any other format is read value by value: seconds
    try:
        with warnings.catch_warnings(action="ignore"):  # of tries that did not fit; the last one counts
            parts = [partitioner.load_partition(i)[:]["row"] for i in range(num_partitions)]
    except ValueError as error:
        problem = f"dirichlet-alpha = {alpha} leaves some of {num_partitions} clients without any row"
        raise ConfigError(f"{problem}; raise dirichlet-alpha or lower num-supernodes.") from error
    return [np.sort(rows.to_numpy()) for rows in parts]


def equal_shares(labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Positions in ``labels`` for each client: sizes differ by one at most, and every position is in exactly one.

    A client draws the shares of the labels from Dir(``alpha``), symmetric, and then its rows one by one by these
    shares; the shares of a label that has run out go to the others in proportion. So the first clients follow the law
    exactly, and the last ones take what is left.
    """
    queues = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    left = np.array([len(queue) for queue in queues])
    parts = []
    for size in [len(part) for part in np.array_split(labels, clients)]:
        shares, taken = rng.dirichlet(np.full(len(queues), alpha)), np.zeros_like(left)
        while missing := size - int(taken.sum()):
            now = np.where(left > taken, shares, 0.0)
            if not now.sum():  # a small alpha gives shares that are exactly 0
                now = (left - taken).astype(float)
            taken += np.minimum(rng.multinomial(missing, now / now.sum()), left - taken)
        parts.append(
            np.concatenate([queue[len(queue) - n :][:k] for queue, n, k in zip(queues, left, taken, strict=True)])
        )
        left = left - taken
    return parts
