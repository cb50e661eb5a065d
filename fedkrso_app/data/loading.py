"""A node's examples: what the config leaves open is read off the data, and every row is checked.

``tasks.py`` knows the tasks, ``files.py`` reads files, ``cells.py`` and ``turns.py`` say what a cell means.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedkrso_app.config import Config, ConfigError, resolved_path
from fedkrso_app.data import cells, files, hub, language, turns
from fedkrso_app.data.pairs import has_border
from fedkrso_app.data.rows import TEXT, Rows, of_dataset, warn, wordy
from fedkrso_app.data.tasks import GLUE, Task, declared, listed, sorted_names, with_columns

logger = logging.getLogger("flwr")

_HELD = 0.1  # share of the training rows that replaces a missing validation file
_MANY = 10_000  # classes, beyond which the label is more likely an id
_TURNS = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
_FIX = "leave such rows out with bad-rows='skip'"


@lru_cache(maxsize=8)
def resolve(config: Config, look: bool = True) -> Task:
    """The task of ``config`` with its columns and labels, read off the data where the config leaves them open.

    The labels are those that the data declares (a ClassLabel), else those of the training and validation rows that
    this process sees, unless ``labels`` names them. A process that has no data does not ``look``; its task has no
    columns. Raises :class:`ConfigError` where something cannot be known.
    """
    task = _resolved(config, look)
    if task.metric == "f1":
        positive = repr(task.classes[1]) if task.classes else "1"
        many = f"the unweighted mean over {task.num_labels} classes"
        logger.info("f1 is %s", many if task.num_labels > 2 else f"that of class {positive}, the second")
    return task


def _resolved(config: Config, look: bool) -> Task:
    found = declared(config)
    if not found.own:
        return found
    if not look:
        if found.num_labels > 1 and not found.classes:
            raise ConfigError(f"labels must be set, for instance labels='neg,pos': {found.name} has no data here.")
        return found
    source, names, words = _columns(found, config.data_dir)
    guessed = with_columns(found, names, source, words)
    if guessed.language or guessed.regression:
        return guessed
    return _with_classes(guessed, config.data_dir, sure=bool(found.label))


def _with_classes(task: Task, data_dir: str, sure: bool) -> Task:
    """``task`` with its classes. Not ``sure``: its label column is what was left, so that it may be another thing."""
    train, *others = (
        _read(task, data_dir, split, [task.label])
        for split in ("train", "validation")
        if split == "train" or _has_validation(task, data_dir)
    )
    seen = [_names(rows, task.label).unique().drop_null().to_pylist() for rows in (train, *others)]
    seen = [[name for name in names if name.strip()] for names in seen]
    classes = task.classes or train.classes.get(task.label) or sorted_names({name for names in seen for name in names})
    if len(seen) > 1 and (only := sorted(set(seen[1]) - set(seen[0]))):
        rest = ", ".join(map(repr, only[:10])) + (f" and {len(only) - 10} more" if len(only) > 10 else "")
        if len(only) == len(set(seen[1])) and not (task.classes or task.label in train.classes):
            raise ConfigError(
                f"{others[0].source}: no training row has one of its classes ({rest}), but "
                f"{', '.join(map(repr, sorted(set(seen[0]))[:10]))}: write the labels alike in both."
            )
        warn(f"{others[0].source}: classes that no training row has: {rest}")
    for rows, names in zip((train, *others), seen, strict=True):
        if alike := _alike(names):
            warn(f"{rows.source}: classes that differ in case, white space or the form of a number alone: {alike}")
    what = f"{train.source}: label column {task.label!r}"
    if task.classes or task.label in train.classes:
        return replace(task, classes=tuple(classes), num_labels=len(classes))
    if len(classes) < 2:
        raise ConfigError(f"{what} has {len(classes)} different values and a classifier needs two; set label-column.")
    values = [cells.value(name) for name in classes]
    odd = [name for name, value in zip(classes, values, strict=True) if value is not None and value % 1]
    if odd and None not in values:
        raise ConfigError(
            f"{what} holds numbers such as {odd[0]}, which name no class; is it task = 'regression'? (Or set labels.)"
        )
    alone = not sure and task.label.lower() in ("id", "index", "key") and len(seen[0]) == len(train.table) > 2
    if len(classes) > _MANY or alone:
        raise ConfigError(
            f"{what} has {len(classes)} different values in {len(train.table)} training rows: is {task.label!r} really "
            "the label? Set label-column to the right one, or name all classes in labels."
        )
    return replace(task, classes=tuple(classes), num_labels=len(classes))


def _alike(names: Sequence[str]) -> str:
    """Groups of names that a person may have meant to be one, in words; "" where there are none."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name in names:
        value = cells.value(name)
        groups[" ".join(name.casefold().split()) if value is None else value].append(name)
    together = [sorted(group) for group in groups.values() if len(group) > 1]
    return ", ".join(" and ".join(map(repr, group)) for group in sorted(together)[:10])


@lru_cache(maxsize=8)  # a process of the simulation is asked for the same split once per client and round
def load(task: Task, data_dir: str, split: str, holdout: float = 0.0) -> datasets.Dataset:
    """The ``split`` ("train" or "validation") of ``task``: the columns that it reads, checked, labels as ids.

    ``embedded/*`` comes with the package; ``glue/*`` from files in ``data_dir`` (``<task>/<split>*`` or
    ``<split>*``, as parquet, csv, jsonl or json), or from the hub if that is empty; any other task likewise, from the
    hub dataset that it names, whose split "test" is read where it has no "validation". The rows are in memory.
    Conversations are one column of lists of ``{"role", "content"}``, instead of the task's last text column. A task
    with ``rows`` has as many of each split, drawn at random, the same in every process.

    With ``holdout`` above 0 that share of the training rows replaces the validation split (to choose settings
    without looking at the rows that are reported on), and "train" is the rest. Before that, where the user's own data
    holds no validation split, a tenth of the training rows becomes one. Raises :class:`ConfigError` where the data is
    missing, empty or not what the task needs.
    """
    return _load(task, data_dir, split, holdout)[0]


def _load(task: Task, data_dir: str, split: str, holdout: float) -> tuple[datasets.Dataset, Callable[[int], str]]:
    """:func:`load`'s rows, and where each is."""
    if task.rows:
        every, place = _load(replace(task, rows=0), data_dir, split, holdout)
        chosen = np.sort(np.random.default_rng(0).permutation(len(every))[: task.rows])
        return every.select(chosen), lambda row: place(int(chosen[row]))
    if holdout:
        return _part(*_load(task, data_dir, "train", 0.0), holdout, split)
    if task.own and not _has_validation(task, data_dir):
        if split == "validation":
            lacks = f"{data_dir} has no validation file" if data_dir else f"{task.dataset} has no split for validation"
            logger.info("%s: %.0f %% of the training rows are held back instead.", lacks, 100 * _HELD)
        return _part(*_whole(task, data_dir, "train"), _HELD, split)
    return _whole(task, data_dir, split)


def _part(
    rows: datasets.Dataset, place: Callable[[int], str], share: float, split: str
) -> tuple[datasets.Dataset, Callable[[int], str]]:
    """The ``share`` of ``rows`` that is held back as "validation", or the rest; the same ones in every process."""
    order = np.random.default_rng(0).permutation(len(rows))
    held = max(1, round(share * len(rows)))
    if len(rows) <= held:
        raise ConfigError(
            f"{len(rows)} training rows are too few to hold back {share:.0%} of them; add a validation file."
        )
    chosen = np.sort(order[:held] if split == "validation" else order[held:])
    return rows.select(chosen), lambda row: place(int(chosen[row]))


def _whole(task: Task, data_dir: str, split: str) -> tuple[datasets.Dataset, Callable[[int], str]]:
    group = task.group if split == "train" else ""  # who holds which row is asked of training rows alone
    wanted = [column for column in (*task.columns, task.label, group) if column]
    return _checked(_read(task, data_dir, split, wanted), replace(task, group=group))


def _read(task: Task, data_dir: str, split: str, wanted: Sequence[str]) -> Rows:
    """The ``wanted`` columns of a split, wherever it is."""
    split = task.validation if split == "validation" else split
    family, _, name = task.name.rpartition("/")
    if family == "embedded":
        return of_dataset(task.name, _embedded(name)[split], wanted)
    if data_dir or (task.own and not task.dataset):
        return files.read(_files(task, data_dir, split), wanted, task.columns, task.skip)
    if task.own:
        splits, split = hub.splits(task.dataset), _split(task, split)
        return of_dataset(f"{task.dataset} ({split})", splits[split], wanted)
    repository = task.dataset or f"{GLUE}:{task.folder}"
    try:
        loaded = hub.splits(repository)[split]
    except (ConfigError, KeyError) as error:
        fix = f"set data-dir to a folder with {name}/{split}.parquet, or take task='embedded/entailment'"
        raise ConfigError(f"{task.name} could not be loaded from the hub ({error}); {fix}.") from error
    return of_dataset(f"{repository} on the hub", loaded, wanted)


@lru_cache(maxsize=1)
def _embedded(name: str) -> Mapping[str, datasets.Dataset]:
    """The splits of an embedded task, which are written at once: each process reads both."""
    from fedkrso_app.data.embedded.pretraining import load_task  # here: a run on GLUE has no need of it

    return load_task(name)


def _columns(task: Task, data_dir: str) -> tuple[str, Sequence[str], Callable[[], set[str]]]:
    """What the training rows come from, in words; their columns; and a function that finds those of words."""
    if data_dir or not task.dataset:
        here = _files(task, data_dir, "train")
        return ", ".join(map(str, here)), files.columns(here, task.skip), lambda: files.wordy(here, cells.is_word)
    rows = hub.splits(task.dataset)[_split(task, "train")]
    table: Any = rows.with_format("arrow")
    return f"{task.dataset} (train)", rows.column_names, lambda: wordy(table[:], cells.is_word)


def _split(task: Task, split: str) -> str:
    """The name that the hub's dataset has for a split."""
    splits = hub.splits(task.dataset)
    if split in splits:
        return split
    if split == "train" or "test" not in splits:
        raise ConfigError(
            f"dataset = {task.dataset!r} has no split {split!r}, only {', '.join(splits)}; take another dataset."
        )
    warn(f"{task.dataset} has no split 'validation': 'test' is used instead.")
    return "test"


def _has_validation(task: Task, data_dir: str) -> bool:
    """Whether the user's own data has rows for evaluation."""
    if data_dir or not task.dataset:
        return bool(_files(task, data_dir, "validation", needed=False))
    return bool({"validation", "test"} & set(hub.splits(task.dataset)))


def _files(task: Task, data_dir: str, split: str, needed: bool = True) -> tuple[Path, ...]:
    if not data_dir:
        fix = "set data-dir to a folder with train.csv in it, or dataset to the name of one on the hub"
        raise ConfigError(f"task = {task.name!r} reads your own files: {fix}.")
    return files.find(resolved_path(data_dir), task.folder, split, needed)


def _names(rows: Rows, column: str) -> pa.ChunkedArray:
    """A column as names. Raises :class:`ConfigError` where it is not there, or holds no single values."""
    if column not in rows.found:
        raise ConfigError(f"{rows.source}: column {column!r} is missing. {listed(rows.found)}")
    held = rows.table[column]
    names = None if column in rows.lists else cells.names(held, rows.classes.get(column, ()))
    if names is None:
        kind = "lists" if column in rows.lists else held.type
        raise ConfigError(f"{rows.source}: column {column!r} holds {kind}, not texts or numbers; take another column.")
    return names


def _checked(rows: Rows, task: Task) -> tuple[datasets.Dataset, Callable[[int], str]]:
    """The columns that ``task`` reads of ``rows``, and where each row is; ConfigError where it cannot be trained on."""
    count, found, good = len(rows.table), listed(rows.found), np.ones(len(rows.table), bool)
    reasons: dict[int, str] = {}  # first bad row of a kind -> what is wrong
    for column in task.reads:
        if column not in rows.found:
            raise ConfigError(f"{rows.source}: column {column!r} of {task.name} is missing. {found}")
    if not count:
        raise ConfigError(f"{rows.source}: there are no rows. {found}")

    def judge(bad: np.ndarray, column: str, why: Callable[[int], str]) -> None:
        nonlocal good
        if bad.any():
            first = int(bad.argmax())
            if not task.skip:
                raise ConfigError(
                    f"{rows.source}: column {column!r} {why(first)} in {bad.sum()} of {count} rows (the first: "
                    f"{rows.place(first)}); fix it, or {_FIX}. {found}"
                )
            reasons[first] = f"column {column!r} {why(first)}".rstrip(",")
            good &= ~bad

    made: dict[str, Any] = {}
    for column in task.columns:
        texts = cells.texts(rows.table[column])
        if texts is None:
            hint = " (write numbers that are texts in quotes, in jsonl)" if task.own else ""
            raise ConfigError(f"{rows.source}: column {column!r} does not hold texts{hint}. {found}")
        made[column] = texts
        if task.name != "instruction" or column not in task.columns[1:-1]:  # an instruction's input may be empty
            empty = cells.empty(texts) if task.own else pc.is_null(texts).to_numpy()
            judge(empty, column, lambda row: "has no value")
    if task.name == "instruction" and (len(task.columns) == 1 or rows.lists & set(task.columns)):
        said = [column in rows.lists or len(task.columns) == 1 for column in task.columns]
        made, wrong = _conversations(made, said, good)
        judge(
            np.isin(np.arange(count), list(wrong)),
            task.columns[-1],
            lambda row: f"is no conversation to learn ({wrong[row]})",
        )
    if task.group:
        made.setdefault(task.group, _names(rows, task.group))
        judge(cells.empty(made[task.group]), task.group, lambda row: "has no value")
    if task.label:
        made[task.label] = _labels(rows, task, judge)
    kept = np.flatnonzero(good)
    if len(kept) < count:
        first = int(good.argmin())
        warn(
            f"{rows.source}: rows left out: {count - len(kept)} of {count}, the first: {rows.place(first)} "
            f"({reasons.get(first, 'more than one reason')})"
        )
        if not len(kept):
            raise ConfigError(f"{rows.source}: there are no rows that can be used: {next(iter(reasons.values()))}.")
    table = pa.table({column: made[column] for column in task.reads if column in made})
    table = table.take(kept) if len(kept) < count else table
    fingerprint = datasets.fingerprint.generate_random_fingerprint()  # its own would hash every row
    examples = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=fingerprint)
    return examples, lambda row: rows.place(int(kept[row]))


def _conversations(
    columns: Mapping[str, Any], lists: Sequence[bool], good: np.ndarray
) -> tuple[dict[str, Any], dict[int, str]]:
    """The text columns as one of turns under the name of the last; and the rows that are none, with the reason."""
    wrong: dict[int, str] = {}

    def of_row(row: int, parts: Sequence[str | None]) -> list[turns.Turn] | None:
        try:
            return turns.of_columns(parts, lists) if good[row] else None
        except ValueError as error:
            wrong[row] = str(error)
            return None

    held = zip(*(column.to_pylist() for column in columns.values()), strict=True)
    rows = [of_row(row, parts) for row, parts in enumerate(held)]
    return {list(columns)[-1]: pa.chunked_array([pa.array(rows, _TURNS)])}, wrong


def _labels(rows: Rows, task: Task, judge: Callable[[np.ndarray, str, Callable[[int], str]], None]) -> Any:
    """The label column: ids of ``task.classes``, ids as they are, or numbers."""
    column, found = rows.table[task.label], listed(rows.found)
    by_name = task.own and not task.regression
    if by_name:
        names = _names(rows, task.label)
        empty = cells.empty(names)
        judge(empty, task.label, lambda row: "has no value")
        ids = pc.index_in(names, pa.array(task.classes, TEXT))
        strange = pc.is_null(ids).to_numpy() & ~empty
        if strange.any():
            row = int(strange.argmax())
            raise ConfigError(
                f"{rows.source}: column {task.label!r} holds {names[row].as_py()!r} ({rows.place(row)}), which is not "
                f"one of labels: {', '.join(task.classes[:30])}. {found}"
            )
        return pc.fill_null(ids, 0).cast(pa.int64())
    numbers = None if task.label in rows.lists else cells.numbers(column)
    if numbers is None:
        raise ConfigError(f"{rows.source}: column {task.label!r} does not hold numbers. {found}")
    empty = cells.empty(column)
    if task.label in rows.classes:
        empty |= numbers < 0
    judge(empty, task.label, lambda row: "has no value")
    allowed = np.isfinite(numbers) if task.regression else np.isin(numbers, np.arange(task.num_labels))
    kind = "a finite number" if task.regression else f"a class from 0 to {task.num_labels - 1}"
    judge(~allowed & ~empty, task.label, lambda row: f"holds {column[row].as_py()!r}, which is not {kind},")
    return pa.array(numbers if task.regression else np.where(allowed, numbers, 0).astype(np.int64))


def check(task: Task, data_dir: str, split: str, holdout: float, tokenizer: Any) -> None:
    """See that the tokenizer can lay out what ``task`` reads: pairs with a border, every answer in its chat template.

    Raises :class:`ConfigError`, with the row of the first answer that has no place.
    """
    if not task.language and len(task.columns) == 2 and not has_border(tokenizer):
        raise ConfigError(
            f"{task.name} reads pairs, and the model's tokenizer has no token to put between them; "
            "take a tokenizer with a separator or an end token."
        )
    if task.name != "instruction" or not tokenizer.chat_template:
        return
    if not tokenizer.is_fast:
        raise ConfigError(
            "the model's tokenizer has a chat template and cannot say where its tokens are; take another."
        )
    examples = load(task, data_dir, split, holdout)
    for start in range(0, len(examples), 1000):
        part: Any = examples[start : start + 1000]
        for i, turns_of_row in enumerate(language.conversations([part[c] for c in task.columns if c in part])):
            try:
                language.placed(turns_of_row, tokenizer)
            except ValueError as error:
                where = _load(task, data_dir, split, holdout)[1](start + i)
                raise ConfigError(
                    f"{where} of {split}: {error}; fix or remove the row, or take another model."
                ) from None
