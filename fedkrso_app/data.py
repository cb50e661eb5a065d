"""A node's examples: what a task is, where its texts come from, who holds which rows, and batches of them."""

import difflib
import glob
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch

from fedkrso_app.config import ConfigError, resolved_path

_FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
_TEXTS, _NUMBERS = ("string", "large_string"), ("int", "uint", "float", "double")  # starts of Arrow types


@dataclass(frozen=True)
class Task:
    """What to read and how to judge it."""

    name: str  # "glue/sst2", "embedded/entailment"
    columns: tuple[str, ...]  # one or two text columns
    num_labels: int  # 1 for regression
    metric: str  # "accuracy", "matthews" or "pearson"
    validation: str  # the split to report on

    @property
    def regression(self) -> bool:
        return self.num_labels == 1


_ONE, _TWO = ("sentence",), ("sentence1", "sentence2")
_ALL = [
    Task("embedded/acceptability", _ONE, 2, "accuracy", "validation"),
    Task("embedded/sentiment", _ONE, 2, "accuracy", "validation"),
    Task("embedded/paraphrase", _TWO, 2, "accuracy", "validation"),
    Task("embedded/entailment", _TWO, 3, "accuracy", "validation"),
    Task("embedded/similarity", _TWO, 1, "pearson", "validation"),
    Task("glue/cola", _ONE, 2, "matthews", "validation"),
    Task("glue/sst2", _ONE, 2, "accuracy", "validation"),
    Task("glue/mrpc", _TWO, 2, "accuracy", "validation"),
    Task("glue/qqp", ("question1", "question2"), 2, "accuracy", "validation"),
    Task("glue/stsb", _TWO, 1, "pearson", "validation"),
    Task("glue/mnli", ("premise", "hypothesis"), 3, "accuracy", "validation_mismatched"),
    Task("glue/qnli", ("question", "sentence"), 2, "accuracy", "validation"),
    Task("glue/rte", _TWO, 2, "accuracy", "validation"),
]
_TASKS = {task.name: task for task in _ALL}


def task(name: str) -> Task:
    """The task called ``name``, such as ``glue/sst2``. Raises :class:`ConfigError` for an unknown one."""
    if name not in _TASKS:
        hint = "".join(f" Did you mean {close!r}?" for close in difflib.get_close_matches(name, _TASKS, n=1))
        raise ConfigError(f"task = {name!r} is not one of {', '.join(_TASKS)}.{hint}")
    return _TASKS[name]


@lru_cache(maxsize=8)  # a process of the simulation is asked for the same split once per client and round
def load(task: Task, data_dir: str, split: str, holdout: float = 0.0) -> datasets.Dataset:
    """The ``split`` ("train" or "validation") of ``task``: its text columns and ``label``, checked.

    ``embedded/*`` comes with the package; ``glue/*`` from files in ``data_dir`` (``<task>/<split>*`` or
    ``<split>*``, as parquet, csv, jsonl or json), or from the hub if that is empty. With ``holdout`` above 0
    that share of the training rows stands in for the validation split (to choose settings without looking at
    the rows that are reported on), and "train" is the rest. Raises :class:`ConfigError` where the data is
    missing, empty or not what the task needs.
    """
    if holdout:
        rows = load(task, data_dir, "train")
        order = np.random.default_rng(0).permutation(len(rows))
        held = round(holdout * len(rows))
        return rows.select(np.sort(order[:held] if split == "validation" else order[held:]))
    split = task.validation if split == "validation" else split
    family, name = task.name.split("/")
    if family == "embedded":
        from fedkrso_app.embedded import load_task  # here: a run on GLUE has no need of it

        return _checked(load_task(name)[split], task, task.name)
    if data_dir:
        files = _find_files(resolved_path(data_dir), name, split)
        return _checked(_read_files(files), task, ", ".join(map(str, files)))
    try:
        loaded = datasets.load_dataset("nyu-mll/glue", name, split=split)
    except Exception as error:  # the hub, HTTP and datasets libraries each raise errors of their own
        mend = f"set data-dir to a folder with {name}/{split}.parquet, or take task='embedded/entailment'"
        raise ConfigError(f"{task.name} could not be loaded from the hub ({error}); {mend}.") from error
    return _checked(loaded, task, f"nyu-mll/glue, {name}, on the hub")


def _find_files(root: Path, name: str, split: str) -> list[Path]:
    """The file ``<split>.<ext>`` of task ``name``, else the one ``<split>_<more>.<ext>``, else all shards."""
    if not root.is_dir():
        raise ConfigError(f"data-dir = {str(root)!r} is not a folder.")
    # "validation" alone never means one of MNLI's two, which are splits with names of their own
    matching = re.compile(re.escape(split) + r"(?![-_.](mis)?matched)([-_.].*)?$")
    for folder in (root / name, root):
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        files = [f for f in files if f.suffix in _FORMATS and matching.match(f.stem) and f.is_file()]
        files = [f for f in files if f.stem == split] or files
        shards_of = [int(shard[1]) for f in files if (shard := re.search(r"-\d+-of-0*(\d+)$", f.stem))]
        if shards_of == [len(files)] * max(1, len(files)) or (len(files) == 1 and not shards_of):
            return files
        if files:
            several = f"{folder} has {', '.join(f.name for f in files)} for {split!r}"
            raise ConfigError(f"{several}; keep one file, or one full set of shards.")
    found = ", ".join(sorted(f.name for f in root.iterdir())[:20]) or "nothing"
    wanted = f"{name}/{split}*.parquet (nor .csv, .jsonl, .json), nor one directly in it"
    raise ConfigError(f"data-dir = {str(root)!r} has no {wanted}. It holds: {found}.")


def _read_files(files: list[Path]) -> datasets.Dataset:
    kind = _FORMATS[files[0].suffix]
    # a sentence may well be "null" or "NA": only an empty cell is a missing one
    options: Any = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
    paths = [glob.escape(str(f)) for f in files]  # datasets takes paths for patterns
    try:
        return datasets.load_dataset(kind, data_files=paths, split="train", **options)
    except Exception as error:  # each format's reader raises errors of its own
        cause, names = error.__cause__ or error, ", ".join(map(str, files))
        raise ConfigError(f"{names}: could not be read as {kind} ({cause}).") from error


def _checked(examples: datasets.Dataset, task: Task, source: str) -> datasets.Dataset:
    """``examples`` with the columns of ``task`` only; ConfigError where they cannot be trained on."""
    table: Any = examples.with_format("arrow")[:]
    found = ", ".join(f"{field.name} ({field.type})" for field in table.schema) or "none"

    def need(holds: bool, column: str, problem: str) -> None:
        if not holds:
            raise ConfigError(f"{source}: column {column!r} {problem}. Columns found: {found}.")

    if not len(examples):
        raise ConfigError(f"{source}: there are no rows. Columns found: {found}.")
    for column in (*task.columns, "label"):
        need(column in table.column_names, column, f"of {task.name} is missing")
        missing = pc.sum(pc.is_null(table[column], nan_is_null=True)).as_py()
        need(missing == 0, column, f"has no value in {missing} of {len(examples)} rows")
        kind, types = ("texts", _TEXTS) if column in task.columns else ("numbers", _NUMBERS)
        need(str(table[column].type).startswith(types), column, f"does not hold {kind}")
    labels = table["label"].to_numpy()
    wrong = labels[~(np.isfinite(labels) if task.regression else np.isin(labels, np.arange(task.num_labels)))]
    kind = "a finite number" if task.regression else f"a class from 0 to {task.num_labels - 1}"
    need(not len(wrong), "label", f"holds {wrong[:1]}, which is not {kind}")
    return examples.select_columns([*task.columns, "label"])


def partition(
    train: datasets.Dataset, task: Task, num_partitions: int, scheme: str, alpha: float, seed: int
) -> list[np.ndarray]:
    """Who holds which rows: ``num_partitions`` ascending int64 arrays, every row in exactly one, none empty.

    ``scheme`` is "iid" (equal sizes) or "dirichlet" (each label's rows shared out in proportions drawn with
    ``alpha``). Equal arguments give equal partitions. Raises :class:`ConfigError` where that is impossible.
    """
    # here, because it takes seconds to import and a server never needs it
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    if not 1 <= num_partitions <= len(train):
        raise ConfigError(f"num-supernodes = {num_partitions} must be 1 to {len(train)}, {task.name}'s rows.")
    # Both partitioners cut runs of neighbouring rows, and files are often sorted by source: shuffle first.
    order = np.random.default_rng(seed).permutation(len(train))
    labels = train.with_format("arrow")[:]["label"].to_numpy()
    if task.regression:
        labels = np.digitize(labels, np.quantile(labels, [0.2, 0.4, 0.6, 0.8]))
    partitioner: Any = IidPartitioner(num_partitions)
    if scheme == "dirichlet":
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


def batches(
    examples: datasets.Dataset,
    task: Task,
    tokenizer: Any,
    batch_size: int,
    max_length: int,
    rng: np.random.Generator,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end, pass after pass over ``examples``, in a new order each time that ``rng`` decides.

    A batch has (b, t) int64 ``input_ids``, ``attention_mask`` and what else the tokenizer gives, with t at
    most ``max_length``, and (b,) ``labels``: int64, or float32 for regression. One batch of a pass may be
    smaller. Texts of like length come together, so that little is padded. Raises ValueError without examples.
    """
    if not len(examples):
        raise ValueError("there are no examples to make batches of")
    lengths = _lengths(examples, task)
    while True:
        # the smaller batch is drawn first, or it would always hold the longest texts
        small, rest = np.split(rng.permutation(len(examples)), [len(examples) % batch_size])
        # with jitter, or the same neighbours in length would meet in every pass
        rest = rest[np.argsort(lengths[rest] * rng.uniform(0.9, 1.1, len(rest)))]
        groups = [*rest.reshape(-1, batch_size), *([small] if len(small) else [])]
        for i in rng.permutation(len(groups)):
            yield _batch(examples, groups[i], task, tokenizer, max_length)


def evaluation_batches(
    examples: datasets.Dataset, task: Task, tokenizer: Any, batch_size: int, max_length: int
) -> Iterator[dict[str, torch.Tensor]]:
    """One pass over ``examples``, the longest first; batches as those of :func:`batches`."""
    order = np.argsort(-_lengths(examples, task), kind="stable")
    for start in range(0, len(order), batch_size):
        yield _batch(examples, order[start : start + batch_size], task, tokenizer, max_length)


def _lengths(examples: datasets.Dataset, task: Task) -> np.ndarray:
    """(n,) characters of each example: near enough to tokens for grouping, and far cheaper."""
    table: Any = examples.with_format("arrow")[:]
    return sum(pc.utf8_length(table[column]).to_numpy().astype(np.int64) for column in task.columns)


def _batch(
    examples: datasets.Dataset, rows: np.ndarray, task: Task, tokenizer: Any, max_length: int
) -> dict[str, torch.Tensor]:
    chosen = examples[rows.tolist()]
    texts = [chosen[column] for column in task.columns]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    labels = torch.tensor(chosen["label"], dtype=torch.float32 if task.regression else torch.int64)
    return {**encoded, "labels": labels}
