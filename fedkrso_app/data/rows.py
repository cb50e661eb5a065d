"""The rows of a split, wherever they come from, as a table that remembers where each row was."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

logger = logging.getLogger("flwr")

TEXT = pa.large_string()  # more than 2 GiB of texts have room


@dataclass(frozen=True)
class Rows:
    """``table`` has the wanted columns that exist, ``found`` names all that exist.

    Cells of the columns in ``lists`` are lists as JSON texts; ids in the columns of ``classes`` have those names.
    """

    source: str  # where they come from, in words
    table: pa.Table
    found: tuple[str, ...]
    lists: frozenset[str] = frozenset()
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[tuple[str, np.ndarray], ...] = ()  # ("file, line", number of each of its rows); () without lines

    def place(self, row: int) -> str:
        """Where row ``row`` (from 0) is: ``file, line n``, or only ``row n``, from 1."""
        at = row
        for what, numbers in self.parts:
            if at < len(numbers):
                return f"{what} {numbers[at]}"
            at -= len(numbers)
        return f"row {row + 1}"


def of_table(source: str, table: pa.Table, found: Sequence[str], features: Any) -> Rows:
    """A typed table's rows: strings of one type, lists as JSON texts, and the names that ``features`` gives to ids."""
    table, lists, classes = table.replace_schema_metadata(None), set(), {}
    for i, name in enumerate(table.column_names):
        column = table[name]
        if isinstance(feature := features.get(name), datasets.ClassLabel):
            classes[name] = tuple(feature.names)
        if isinstance(column.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
            column = column.cast(TEXT)
        if pa.types.is_nested(column.type):
            lists.add(name)
            cells = (None if cell is None else json.dumps(cell, default=str) for cell in column.to_pylist())
            column = pa.chunked_array([pa.array(cells, TEXT)])
        table = table.set_column(i, name, column)
    return Rows(source, table, tuple(found), frozenset(lists), classes)


def of_dataset(source: str, rows: datasets.Dataset, wanted: Sequence[str]) -> Rows:
    """The ``wanted`` columns of a dataset that is in memory or in the hub's cache."""
    kept = [name for name in dict.fromkeys(wanted) if name in rows.column_names]
    table: Any = rows.select_columns(kept).with_format("arrow")[:]
    return of_table(source, table, rows.column_names, rows.features)


def wordy(table: pa.Table, is_word: Callable[[str], bool]) -> set[str]:
    """The columns of texts of which some are words."""
    plain = of_table("", table, table.column_names, {})
    return {
        name
        for name, column in zip(table.column_names, plain.table.columns, strict=True)
        if column.type == TEXT
        and name not in plain.lists
        and any(cell and is_word(cell) for cell in column.to_pylist())
    }


@lru_cache(maxsize=256)
def warn(message: str) -> None:
    """Log ``message`` once in this process, however often the rows are read."""
    logger.warning(message)
