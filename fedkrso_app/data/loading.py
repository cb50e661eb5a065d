"""A node's examples: where a task's texts come from, and batches of them.

``tasks.py`` knows the tasks, ``files.py`` reads files, ``partition.py`` shares rows out, and ``language.py`` makes the
token ids of language models; the apps ask this file for all of it.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fedkrso_app.config import Config, ConfigError, resolved_path
from fedkrso_app.data import files, hub, language
from fedkrso_app.data.partitions import partition
from fedkrso_app.data.tasks import GLUE, TEXTS, Task, declared, sorted_names, task, with_columns

__all__ = ["Task", "batches", "declared", "evaluation_batches", "load", "partition", "resolve", "task"]

logger = logging.getLogger("flwr")

_NUMBERS = ("int", "uint", "float", "double")  # starts of Arrow types
_HELD = 0.1  # share of the training rows that stands in for a validation file


@lru_cache(maxsize=8)
def resolve(config: Config, look: bool = True) -> Task:
    """The task of ``config`` with its columns and labels, read off the data where the config leaves them open.

    The labels are those that a hub dataset declares, else those of the training and validation rows that this process
    sees, unless ``labels`` names them. A process that has no data does not ``look``; its task has no columns. Raises
    :class:`ConfigError` where something cannot be known.
    """
    found = declared(config)
    if not found.own:
        return found
    if not look:
        if found.num_labels > 1 and not found.classes:
            raise ConfigError(f"labels must be set, for instance labels='neg,pos': {found.name} has no data here.")
        return found
    tables = {}
    for split in ("train", "validation"):
        if split == "train" or _has_validation(found, config.data_dir):
            source, rows, _ = _read(found, config.data_dir, split)
            tables[source] = _table(rows)
    source, train = next(iter(tables.items()))
    found = with_columns(found, {field.name: str(field.type) for field in train.schema}, source)
    if found.language or found.regression or found.classes:
        return found
    declares = {} if config.data_dir or not config.dataset else hub.splits(config.dataset)["train"].features
    if isinstance(declares.get(found.label), datasets.ClassLabel):
        classes = tuple(declares[found.label].names)
        return replace(found, classes=classes, num_labels=len(classes))
    names: set[str] = set()
    for source, table in tables.items():
        if found.label in table.column_names:  # load() says so if it is not
            names |= set(_names(table[found.label], f"{source}: column {found.label!r}").drop_null().to_pylist())
    if len(names) < 2:
        held = f"has {len(names)} different values and a classifier needs two"
        raise ConfigError(f"{source}: label column {found.label!r} {held}; set another label-column.")
    return replace(found, classes=sorted_names(names), num_labels=len(names))


@lru_cache(maxsize=8)  # a process of the simulation is asked for the same split once per client and round
def load(task: Task, data_dir: str, split: str, holdout: float = 0.0) -> datasets.Dataset:
    """The ``split`` ("train" or "validation") of ``task``: the columns that it reads, checked, labels as ids.

    ``embedded/*`` comes with the package; ``glue/*`` from files in ``data_dir`` (``<task>/<split>*`` or
    ``<split>*``, as parquet, csv, jsonl or json), or from the hub if that is empty; any other task likewise, from the
    hub dataset that it names, whose split "test" stands in where it has no "validation".
    A task with ``rows`` has as many of each split, drawn at random, the same in every process.
    With ``holdout`` above 0 that share of the training rows stands in for the validation split (to choose settings
    without looking at the rows that are reported on), and "train" is the rest. Before that, where the user's own data
    holds no validation split, a tenth of the training rows becomes one. Raises :class:`ConfigError` where the data is
    missing, empty or not what the task needs.
    """
    if task.rows:
        every = load(replace(task, rows=0), data_dir, split, holdout)
        chosen = np.random.default_rng(0).permutation(len(every))[: task.rows]
        return every.select(np.sort(chosen))
    if holdout:
        return _part(load(task, data_dir, "train"), holdout, split)
    if task.own and not _has_validation(task, data_dir):
        if split == "validation":
            lacks = f"{data_dir} has no validation file" if data_dir else f"{task.dataset} has no split for validation"
            logger.info("%s: %.0f %% of the training rows stand in.", lacks, 100 * _HELD)
        return _part(_whole(task, data_dir, "train"), _HELD, split)
    return _whole(task, data_dir, split)


def _part(rows: datasets.Dataset, share: float, split: str) -> datasets.Dataset:
    """The ``share`` of ``rows`` that is held back as "validation", or the rest; the same ones in every process."""
    order = np.random.default_rng(0).permutation(len(rows))
    held = max(1, round(share * len(rows)))
    if len(rows) <= held:
        raise ConfigError(
            f"{len(rows)} training rows are too few to hold back {share:.0%} of them; add a validation file."
        )
    return rows.select(np.sort(order[:held] if split == "validation" else order[held:]))


def _whole(task: Task, data_dir: str, split: str) -> datasets.Dataset:
    split = task.validation if split == "validation" else split
    family, _, name = task.name.rpartition("/")
    if family == "embedded":
        from fedkrso_app.data.embedded.pretraining import load_task  # here: a run on GLUE has no need of it

        return _checked(load_task(name)[split], task, task.name)
    if data_dir or task.own:
        source, rows, here = _read(task, data_dir, split)
        return _checked(rows, task, source, here)
    repository = task.dataset or f"{GLUE}:{task.folder}"
    try:
        loaded = hub.splits(repository)[split]
    except (ConfigError, KeyError) as error:
        mend = f"set data-dir to a folder with {name}/{split}.parquet, or take task='embedded/entailment'"
        raise ConfigError(f"{task.name} could not be loaded from the hub ({error}); {mend}.") from error
    return _checked(loaded, task, f"{repository} on the hub")


def _read(task: Task, data_dir: str, split: str) -> tuple[str, datasets.Dataset, list[Path]]:
    """What the rows of a split come from, in words; the rows; and their files, if it is files."""
    if data_dir or not task.dataset:
        here = _files(task, data_dir, split)
        return ", ".join(map(str, here)), files.read(here, task.skip), here
    splits = hub.splits(task.dataset)
    if split not in splits:
        if split == "train" or "test" not in splits:
            listed = ", ".join(splits)
            raise ConfigError(
                f"dataset = {task.dataset!r} has no split {split!r}, only {listed}; take another dataset."
            )
        split = "test"
        files.warn(f"{task.dataset} has no split 'validation': 'test' stands in.")
    return f"{task.dataset} ({split})", hub.named(splits[split]), []


def _has_validation(task: Task, data_dir: str) -> bool:
    """Whether the user's own data has rows for evaluation."""
    if data_dir or not task.dataset:
        return bool(_files(task, data_dir, "validation", needed=False))
    return bool({"validation", "test"} & set(hub.splits(task.dataset)))


def _files(task: Task, data_dir: str, split: str, needed: bool = True) -> list[Path]:
    if not data_dir:
        mend = "set data-dir to a folder with train.csv in it, or dataset to the name of one on the hub"
        raise ConfigError(f"task = {task.name!r} reads your own files: {mend}.")
    return files.find(resolved_path(data_dir), task.folder, split, needed)


def _checked(examples: datasets.Dataset, task: Task, source: str, here: Sequence[Path] = ()) -> datasets.Dataset:
    """``examples`` with the columns that ``task`` reads only; ConfigError where they cannot be trained on."""
    table, count = _table(examples), len(examples)
    found = ", ".join(f"{field.name} ({field.type})" for field in table.schema) or "none"

    def need(holds: bool, column: str, problem: str) -> None:
        if not holds:
            raise ConfigError(f"{source}: column {column!r} {problem}. Columns found: {found}.")

    need_rows = f"{source}: there are no rows"
    if not count:
        raise ConfigError(f"{need_rows}. Columns found: {found}.")
    good = np.ones(count, bool)
    for column in task.reads:
        need(column in table.column_names, column, f"of {task.name} is missing")
        empty = _empty(table[column], task, column)
        if empty.any() and not task.skip:
            first = files.place(here, int(empty.argmax()))
            mend = "leave such rows out by bad-rows='skip'"
            need(
                False, column, f"has no value in {empty.sum()} of {count} rows (the first: {first}); mend it, or {mend}"
            )
        good &= ~empty
    kept = np.flatnonzero(good)
    if len(kept) < count:
        first = files.place(here, int(good.argmin()))
        files.warn(f"{source}: rows with an empty cell left out: {count - len(kept)} of {count}, the first: {first}")
        if not len(kept):
            raise ConfigError(f"{need_rows} without an empty cell. Columns found: {found}.")
        examples, table = examples.select(kept), table.take(kept)
    for column in task.columns:
        if table[column].null_count == len(table):  # an instruction's input that is never given has no type
            examples = examples.cast_column(column, datasets.Value("string"))
            continue
        hint = " (write numbers that are texts in quotes, in jsonl)" if task.own else ""
        need(str(table[column].type).startswith(TEXTS), column, f"does not hold texts{hint}")
    examples = examples.select_columns(task.reads)
    if task.language:
        return examples
    if task.own and not task.regression:
        names = _names(table[task.label], f"{source}: column {task.label!r}")
        ids = pc.index_in(names, pa.array(task.classes))
        strange = np.flatnonzero(pc.is_null(ids).to_numpy())
        if len(strange):
            row = int(strange[0])
            where = files.place(here, int(kept[row]))
            listed = ", ".join(task.classes)
            need(False, task.label, f"holds {names[row].as_py()!r} ({where}), which is not one of labels: {listed}")
        return examples.remove_columns(task.label).add_column(task.label, ids.to_numpy().astype(np.int64))
    need(str(table[task.label].type).startswith(_NUMBERS), task.label, "does not hold numbers")
    labels = table[task.label].to_numpy()
    wrong = labels[~(np.isfinite(labels) if task.regression else np.isin(labels, np.arange(task.num_labels)))]
    kind = "a finite number" if task.regression else f"a class from 0 to {task.num_labels - 1}"
    need(not len(wrong), task.label, f"holds {wrong[:1]}, which is not {kind}")
    return examples


def _table(examples: datasets.Dataset) -> Any:
    return examples.with_format("arrow")[:]


def _empty(values: Any, task: Task, column: str) -> np.ndarray:
    """(n,) bool: no value; of the user's own files, no text either."""
    empty = pc.is_null(values, nan_is_null=True)
    inner = column in task.columns[1:-1]  # an instruction's input may well be empty
    if task.own and inner:
        return np.zeros(len(values), bool)
    if task.own and str(values.type).startswith(TEXTS):
        empty = pc.or_kleene(empty, pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0))
    return pc.fill_null(empty, True).to_numpy()


def _names(values: Any, what: str) -> Any:
    """Labels as texts: whole numbers and truth values too."""
    kind = values.type
    if pa.types.is_floating(kind):  # whole numbers beside an empty cell
        values = pc.if_else(pc.is_nan(values), None, values)
        known = values.drop_null().to_numpy()
        if (known != np.round(known)).any():
            odd = known[known != np.round(known)][0]
            raise ConfigError(f"{what} holds numbers such as {odd}, which name no class; is it task = 'regression'?")
        values = values.cast(pa.int64(), safe=False)
    elif not (str(kind).startswith((*TEXTS, *_NUMBERS, "bool", "dictionary"))):
        raise ConfigError(
            f"{what} holds {kind}, not texts or whole numbers alone; mend it or set another label-column."
        )
    names = pc.utf8_trim_whitespace(values.cast(pa.string()))
    return pc.if_else(pc.equal(names, ""), None, names)


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
    most ``max_length``, and (b,) ``labels``: int64, or float32 for regression; a language model's labels are (b, t)
    int64, -100 where nothing is asked (see ``language.py``). One batch of a pass may be smaller. Texts of like length
    come together, so that little is padded. Raises ValueError without examples.
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
    """One pass over ``examples``, the longest first; batches as those of :func:`batches`.

    A language model gets a quarter of ``batch_size``: its logits are as wide as its vocabulary.
    """
    batch_size = max(1, batch_size // 4) if task.language else batch_size
    order = np.argsort(-_lengths(examples, task), kind="stable")
    for start in range(0, len(order), batch_size):
        yield _batch(examples, order[start : start + batch_size], task, tokenizer, max_length)


def _lengths(examples: datasets.Dataset, task: Task) -> np.ndarray:
    """(n,) characters of each example: near enough to tokens for grouping, and far cheaper."""
    table = _table(examples)
    return sum(pc.fill_null(pc.utf8_length(table[c]), 0).to_numpy().astype(np.int64) for c in task.columns)


def _batch(
    examples: datasets.Dataset, rows: np.ndarray, task: Task, tokenizer: Any, max_length: int
) -> dict[str, torch.Tensor]:
    max_length = min(max_length, getattr(tokenizer, "model_max_length", max_length))  # what the model can read
    chosen = examples[rows.tolist()]
    texts = [chosen[column] for column in task.columns]
    if task.language:
        return language.batch(texts, tokenizer, max_length)
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    labels = torch.tensor(chosen[task.label], dtype=torch.float32 if task.regression else torch.int64)
    return {**encoded, "labels": labels}
