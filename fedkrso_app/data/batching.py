"""Batches of examples, for training without end and for one evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fedkrso_app.data import language
from fedkrso_app.data.tasks import Task

_MOST = 2**26  # tokens that a process keeps, 4 bytes each
_LOOK = 4096  # rows whose lengths in tokens decide which of them an evaluation takes together


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
    characters = lengths(examples, task)
    while True:
        # the smaller batch is drawn first, or it would always hold the longest texts
        small, rest = np.split(rng.permutation(len(examples)), [len(examples) % batch_size])
        # with jitter, or the same neighbours in length would meet in every pass
        rest = rest[np.argsort(characters[rest] * rng.uniform(0.9, 1.1, len(rest)))]
        groups = [*rest.reshape(-1, batch_size), *([small] if len(small) else [])]
        for i in rng.permutation(len(groups)):
            yield batch(examples, groups[i], task, tokenizer, max_length)


def evaluation_batches(
    examples: datasets.Dataset, task: Task, tokenizer: Any, tokens: int, max_length: int
) -> Iterator[dict[str, torch.Tensor]]:
    """One pass over ``examples``, about the longest first; batches as those of :func:`batches`, of as many rows as
    make at most ``tokens`` tokens with their padding, or of one row."""
    order = np.argsort(-lengths(examples, task), kind="stable")
    kept = _tokens_of(examples, task, tokenizer, longest(tokenizer, max_length))
    for start in range(0, len(order), _LOOK):
        rows = kept.laid_out(examples, order[start : start + _LOOK].tolist())
        rows.sort(key=lambda row: -len(row[0]["input_ids"]))
        while rows:
            count = max(1, tokens // max(1, len(rows[0][0]["input_ids"])))
            yield kept.padded(rows[:count])
            rows = rows[count:]


def longest_rows(
    examples: datasets.Dataset, task: Task, tokenizer: Any, count: int, max_length: int
) -> dict[str, torch.Tensor]:
    """The batch of the ``count`` rows with most characters."""
    return batch(examples, np.argsort(-lengths(examples, task), kind="stable")[:count], task, tokenizer, max_length)


def lengths(examples: datasets.Dataset, task: Task) -> np.ndarray:
    """(n,) int64 characters of each example: near enough to tokens for grouping, and far cheaper."""
    if _characters.get(examples, ((), None))[0] != task.columns:
        _characters[examples] = task.columns, _lengths(examples, task)
    return _characters[examples][1]


def _lengths(examples: datasets.Dataset, task: Task) -> np.ndarray:
    table: Any = examples.with_format("arrow")[:]
    total = np.zeros(len(examples), np.int64)
    for name in task.columns:
        if name not in table.column_names:  # turns are in one column
            continue
        column = table[name]
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            texts = pc.struct_field(pc.list_flatten(column), "content")
            np.add.at(total, pc.list_parent_indices(column).to_numpy(), pc.utf8_length(texts).to_numpy())
        else:
            total += pc.fill_null(pc.utf8_length(column), 0).to_numpy()
    return total


def batch(
    examples: datasets.Dataset, rows: np.ndarray, task: Task, tokenizer: Any, max_length: int
) -> dict[str, torch.Tensor]:
    """The batch of ``rows``, (b,) int64, as those of :func:`batches`. Each row is tokenized once in a process."""
    kept = _tokens_of(examples, task, tokenizer, longest(tokenizer, max_length))
    return kept.padded(kept.laid_out(examples, rows.tolist()))


def _tokens_of(examples: datasets.Dataset, task: Task, tokenizer: Any, max_length: int) -> "_Tokens":
    kept = _tokens.get(examples)
    if kept is None or not kept.serves(task, tokenizer, max_length):
        kept = _tokens[examples] = _Tokens(task, tokenizer, max_length)
    return kept


_Row = tuple[Mapping[str, np.ndarray], Any]  # values of each input, and the label


class _Tokens:
    """Rows of one dataset as tokens, as far as they were asked for."""

    def __init__(self, task: Task, tokenizer: Any, max_length: int) -> None:
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length
        self.rows: dict[int, _Row] = {}
        self.count = 0

    def serves(self, task: Task, tokenizer: Any, max_length: int) -> bool:
        return (self.task, self.max_length) == (task, max_length) and self.tokenizer is tokenizer

    def laid_out(self, examples: datasets.Dataset, rows: Sequence[int]) -> list[_Row]:
        found = {row: self.rows[row] for row in rows if row in self.rows}
        if new := [row for row in dict.fromkeys(rows) if row not in found]:
            found |= zip(new, self._laid_out(examples[new]), strict=True)
            if sum(each.count for each in list(_tokens.values())) < _MOST:
                self.rows |= {row: found[row] for row in new}
                self.count += sum(values.size for row in new for values in found[row][0].values())
        return [found[row] for row in rows]

    def padded(self, rows: Sequence[_Row]) -> dict[str, torch.Tensor]:
        inputs, labels = zip(*rows, strict=True)
        values, in_front = padding(self.task, self.tokenizer)
        batch = {name: padded([each[name] for each in inputs], values.get(name, 0), in_front) for name in inputs[0]}
        if self.task.language:
            return language.checked(batch)
        of_labels = torch.float32 if self.task.regression else torch.int64
        return {**batch, "labels": torch.tensor(labels, dtype=of_labels)}

    def _laid_out(self, chosen: Mapping[str, Any]) -> Iterator[tuple[dict[str, np.ndarray], Any]]:
        task = self.task
        texts = [chosen[column] for column in task.columns if column in chosen]
        if task.language:
            encoded = language.laid_out(texts, self.tokenizer, self.max_length)
            labels: Sequence[Any] = [None] * len(encoded["input_ids"])
        else:
            encoded, labels = self.tokenizer(*texts, truncation=True, max_length=self.max_length), chosen[task.label]
        for i, label in enumerate(labels):
            yield {name: np.array(values[i], np.int32) for name, values in encoded.items()}, label


_tokens: WeakKeyDictionary[datasets.Dataset, _Tokens] = WeakKeyDictionary()
_characters: WeakKeyDictionary[datasets.Dataset, tuple[Sequence[str], np.ndarray]] = WeakKeyDictionary()


def padded(values: Sequence[np.ndarray], fill: int, in_front: bool) -> torch.Tensor:
    """(b, t) int64, t the length of the longest."""
    whole = np.full((len(values), max(map(len, values))), fill, np.int64)
    for row, own in zip(whole, values, strict=True):
        row[len(row) - len(own) if in_front else 0 :][: len(own)] = own
    return torch.from_numpy(whole)


def longest(tokenizer: Any, max_length: int) -> int:
    """``max_length``, or what the model can read if that is less; in tokens."""
    return min(max_length, getattr(tokenizer, "model_max_length", max_length))


def padding(task: Task, tokenizer: Any) -> tuple[dict[str, int], bool]:
    """How :func:`batches` fill up a shorter text: by which value of which input (0 of the others), and whether in front
    of it."""
    values = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    values["labels"] = language.IGNORED
    return values, not task.language and tokenizer.padding_side == "left"
