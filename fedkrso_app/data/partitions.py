"""Who holds which rows in a simulation."""

import warnings
from collections.abc import Sequence
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
    table = _arrow(train)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train))
    if scheme == "iid":
        return [np.sort(rows) for rows in np.array_split(order, num_partitions)]
    if task.group:
        values = table[task.group].to_pylist()
        distinct = {value: code for code, value in enumerate(sorted(set(values), key=str))}
        labels = np.array([distinct[value] for value in values])
    else:
        labels = _classes(train, train, task)
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


def following(
    shares: Sequence[np.ndarray], train: datasets.Dataset, rows: datasets.Dataset, task: Task, seed: int
) -> list[np.ndarray]:
    """``rows`` (the validation split) shared out as :func:`partition` has shared out ``train``: ascending int64 arrays.

    Of each label's rows every client gets the part that it has of the training rows of that label, give or take one
    (a regression's labels in fifths; without labels, of all rows). Every row is in exactly one share. Raises
    :class:`ConfigError` where that leaves a client without any.
    """
    known, asked = _classes(train, train, task), _classes(rows, train, task)
    rng = np.random.default_rng([seed, 1])
    owned: list[list[np.ndarray]] = [[] for _ in shares]
    for label in np.unique(asked):
        order = rng.permutation(np.flatnonzero(asked == label))
        counts = np.array([np.count_nonzero(known[share] == label) for share in shares])
        counts = counts if counts.any() else np.array([len(share) for share in shares])
        ends = np.floor(np.cumsum(counts) / counts.sum() * len(order) + 0.5).astype(int)
        for part, found in zip(owned, np.split(order, ends[:-1]), strict=True):
            part.append(found)
    parts = [np.sort(np.concatenate(part)) for part in owned]
    if without := sum(not len(part) for part in parts):
        raise ConfigError(
            f"{without} of {len(parts)} clients have no validation rows when those follow their training rows' labels: "
            "raise dirichlet-alpha, lower num-supernodes, or add validation rows."
        )
    return parts


def _classes(rows: datasets.Dataset, train: datasets.Dataset, task: Task) -> np.ndarray:
    """The label of each row; a regression's as the fifth of ``train`` that it is in, and 0 where there are none."""
    if not task.label:
        return np.zeros(len(rows), np.int64)
    labels, known = (_arrow(split)[task.label].to_numpy() for split in (rows, train))
    return np.digitize(labels, np.quantile(known, [0.2, 0.4, 0.6, 0.8])) if task.regression else labels


def _arrow(rows: datasets.Dataset) -> Any:
    table: Any = rows.with_format("arrow")
    return table[:]
