"""Columns of any Arrow type as what a task reads in them: texts, names, or numbers."""

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedkrso_app.data.rows import TEXT

_NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
_TRUTH = {"true", "false"}


def is_word(cell: str) -> bool:
    """Whether a cell is neither empty nor a number nor a truth value."""
    bare = cell.strip()
    return bool(bare) and not re.fullmatch(_NUMBER, bare) and bare.lower() not in _TRUTH


def value(name: str) -> float | None:
    """The number that ``name`` is, or None."""
    return float(name) if re.fullmatch(_NUMBER, name.strip()) else None


def empty(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) bool: no value, which white space is not."""
    void = pc.is_null(column, nan_is_null=True)
    if pa.types.is_large_string(column.type):
        void = pc.or_(void, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True))
    return void.to_numpy()


def texts(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """A column of texts, or None where it holds something else; one without any value is of no type."""
    if pa.types.is_large_string(column.type):
        return column
    return column.cast(TEXT) if pa.types.is_null(column.type) else None


def names(column: pa.ChunkedArray, classes: Sequence[str] = ()) -> pa.ChunkedArray | None:
    """A column's values as texts, as Python and csv files write them; None where they are not single values.

    ``classes`` names the values 0, 1, …; others have no name.
    """
    kind = column.type
    if pa.types.is_large_string(kind):
        return column
    if pa.types.is_nested(kind) or "binary" in str(kind):
        return None
    if pa.types.is_float16(kind):
        column = column.cast(pa.float32())
    distinct = pc.unique(column)
    known = dict(enumerate(classes))
    written = [
        None if cell is None or cell != cell else known.get(cell) if classes else str(cell)
        for cell in distinct.to_pylist()
    ]
    return pc.take(pa.array(written, TEXT), pc.index_in(column, distinct))


def numbers(column: pa.ChunkedArray) -> np.ndarray | None:
    """(n,) float64, NaN where a cell is no finite number; None where the column cannot hold numbers."""
    kind = column.type
    if pa.types.is_decimal(kind):
        column = column.cast(TEXT)  # as exact as a number that is written in csv
    elif pa.types.is_floating(kind) or pa.types.is_integer(kind):
        found = column.cast(pa.float64(), safe=False).to_numpy()
        return np.where(np.isfinite(found), found, np.nan)
    elif not pa.types.is_large_string(kind):
        return None
    held = pc.utf8_trim_whitespace(column)
    held = pc.if_else(pc.match_substring_regex(held, f"^{_NUMBER}$"), held, None)
    held = pc.utf8_ltrim(held, "+")  # Arrow knows no sign of what is positive
    found = pc.fill_null(held.cast(pa.float64()), float("nan")).to_numpy()
    return np.where(np.isfinite(found), found, np.nan)
