"""Files of text: csv, jsonl and json. Every cell of theirs is a text, and every row has a line.

A cell of csv is what is written there. Of jsonl, numbers and truth values become the text that csv would have. The csv
reader is Python's own: it reads 100 MB in a few seconds, and pyarrow's loses count of the lines once a quoted text
holds a line break.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fedkrso_app.config import ConfigError
from fedkrso_app.data.rows import TEXT, Rows, warn

_CHUNK = 1 << 16  # rows that become Arrow at a time
Record = list[str | None] | str  # the cells of a row, or what is wrong with it


class _Number(str):
    """A number of a JSON file as it is written."""


# NaN is how some writers say that there is nothing.
_JSON = json.JSONDecoder(parse_float=_Number, parse_constant=lambda word: None if word == "NaN" else _Number(word))


def columns(file: Path) -> Counter[str]:
    """How often each column is there: a csv header may have one twice."""
    if file.suffix == ".csv":
        return Counter(_header(_decoded(file)[0])[0])
    return Counter(dict.fromkeys((key for _, row in _objects(file) if isinstance(row, dict) for key in row), 1))


def read(file: Path, wanted: Sequence[str], texts: frozenset[str], skip: bool) -> Rows:
    """The ``wanted`` columns of a file; in those of ``texts`` JSON may have lists, and no numbers.

    Raises :class:`ConfigError` for a broken line unless ``skip``, and for what is no text in a wanted column.
    """
    what = f"{file}, {'row' if _is_list(file) else 'line'}"
    of = _csv_records if file.suffix == ".csv" else _json_records
    lists: dict[str, bool] = {}  # column of texts -> whether its cells are lists
    broken: list[str] = []
    lines: list[int] = []
    chunks: list[list[pa.Array]] = [[] for _ in wanted]
    cells: list[list[str | None]] = [[] for _ in wanted]

    def flush() -> None:
        for column, held in zip(chunks, cells, strict=True):
            column.append(pa.array(held, TEXT))
            held.clear()

    for line, record in of(file, wanted, texts, lists):
        if isinstance(record, str):
            broken.append(f"{what} {line}: {record}")
            continue
        for held, cell in zip(cells, record, strict=True):
            held.append(cell)
        lines.append(line)
        if not len(lines) % _CHUNK:
            flush()
    flush()
    if broken and not skip:
        more = f" (and {len(broken) - 1} more lines)" if len(broken) > 1 else ""
        raise ConfigError(f"{broken[0]}{more}; fix it, or leave such lines out with bad-rows='skip'.")
    if broken:
        warn(f"broken lines left out: {len(broken)}, the first: {broken[0]}")
    table = pa.table(dict(zip(wanted, map(pa.chunked_array, chunks), strict=True)))
    return Rows(
        str(file),
        table,
        tuple(wanted),
        frozenset(name for name, are in lists.items() if are),
        parts=((what, np.array(lines, np.int64)),),
    )


def wordy(file: Path, is_word: Callable[[str], bool]) -> set[str]:
    """The columns of texts of which some are words."""
    found: set[str] = set()
    if file.suffix == ".csv":
        names = _header(_decoded(file)[0])[0]
        at = [i for i, name in enumerate(names) if names.count(name) == 1]
        rows = (
            {names[i]: row[i] for i in at} for _, row in _csv_rows(file, _decoded(file)[0]) if not isinstance(row, str)
        )
    else:
        rows = (row for _, row in _objects(file) if isinstance(row, dict))
    for row in rows:
        found |= {name for name, cell in row.items() if type(cell) is str and name not in found and is_word(cell)}
    return found


# --- csv ---


def _csv_records(
    file: Path, wanted: Sequence[str], texts: frozenset[str], lists: dict[str, bool]
) -> Iterator[tuple[int, Record]]:
    text, damaged = _decoded(file)
    names, _ = _header(text)
    at = [names.index(name) for name in wanted]
    for line, cells in _csv_rows(file, text):
        if isinstance(cells, str):
            yield line, cells
            continue
        row = [cells[i] or None for i in at]
        if damaged:
            _see_encoding(file, line, row)
        yield line, row


def _header(text: str) -> tuple[list[str], str]:
    """The names of a csv file's columns, and what separates them: a comma, else a semicolon or a tab."""
    lines = iter(io.StringIO(text, newline=""))
    first = next((line for line in lines if line.strip()), "")
    mark = ","
    if found := re.fullmatch(r"sep=(.)\s*", first):  # Excel's own first line
        mark, first = found[1], next((line for line in lines if line.strip()), "")
    else:
        bare = re.sub(r'"[^"]*"', "", first)
        if "," not in bare and re.search("[;\t]", bare):
            mark = max(";\t", key=bare.count)
    csv.field_size_limit(2**31 - 1)  # a text may be long
    names = next(csv.reader([first, *lines] if first.count('"') % 2 else [first], delimiter=mark), [])
    # a name that is no UTF-8 may be that of a column that nobody reads
    return [name.strip().encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names], mark


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, list[str] | str]]:
    """(line, cells) below the header; a text in place of cells says what is wrong with the line."""
    names, mark = _header(text)
    if mark != ",":
        warn(f"{file}: its columns are separated by {mark!r}")
    lines, skipped, header = list(io.StringIO(text, newline="")), 0, True
    while skipped < len(lines) and re.fullmatch(r"(sep=.)?\s*", lines[skipped]):
        skipped += 1
    reader = csv.reader(lines[skipped:], strict=True, delimiter=mark)
    while True:
        line = skipped + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"is not CSV ({error})"
            reader, skipped = csv.reader(lines[line:], strict=True, delimiter=mark), line  # an open quote takes in all
            continue
        if header:
            header = False
        elif not cells:  # a blank line
            continue
        elif len(cells) != len(names):
            why = f"has {len(cells)} cells where the header has {len(names)}"
            yield line, f"{why} (a text with {mark!r} in it needs quotes)"
        else:
            yield line, cells


# --- json ---


def _json_records(
    file: Path, wanted: Sequence[str], texts: frozenset[str], lists: dict[str, bool]
) -> Iterator[tuple[int, Record]]:
    damaged = _decoded(file)[1]
    for line, row in _objects(file):
        if isinstance(row, str):
            yield line, row
            continue
        if damaged:
            _see_encoding(file, line, [json.dumps(row.get(name), ensure_ascii=False) for name in wanted])
        try:
            yield line, [_cell(row.get(name), name, name in texts, lists) for name in wanted]
        except ValueError as error:
            yield line, str(error)


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, row) of a file with an object on each line, or (number, row) of one list of them.

    A text in place of the row says what is wrong with it. Raises :class:`ConfigError` where a list is none.
    """
    text, _ = _decoded(file)
    if _is_list(file):
        try:
            whole = _JSON.decode(text.strip())
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: could not be read as json ({error}).") from None
        for number, row in enumerate(whole, 1):
            yield number, row if isinstance(row, dict) else "is not a JSON object"
        return
    for line, part in enumerate(text.split("\n"), 1):
        if part and not part.isspace():
            try:
                row = _JSON.decode(part.strip())
                yield line, row if isinstance(row, dict) else "is not a JSON object"
            except (ValueError, RecursionError) as error:
                yield line, f"is not JSON ({error})"


def _is_list(file: Path) -> bool:
    return file.suffix == ".json" and _decoded(file)[0].lstrip()[:1] == "["


def _cell(value: Any, name: str, text: bool, lists: dict[str, bool]) -> str | None:
    """A value as a cell. Raises ValueError where it cannot be one."""
    if value is None:
        return None
    if isinstance(value, list | dict):
        if not text:
            raise ValueError(f"{name!r} holds a list or an object, not one value")
        if not lists.setdefault(name, True):
            raise ValueError(f"{name!r} holds a list where the lines before hold texts")
        return json.dumps(value)
    if type(value) is not str:
        if text:
            raise ValueError(f"{name!r} holds {value}, not a text (put it in quotes)")
        return str(value)
    if text and lists.setdefault(name, False):
        raise ValueError(f"{name!r} holds a text where the lines before hold lists")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name!r} holds {value[error.start]!r}, one half of a character") from None
    return value


# --- encodings ---


def _decoded(file: Path) -> tuple[str, bool]:
    """The text of a file, and whether some of its bytes are no text."""
    content = file.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # Excel's "Unicode text"
        try:
            return content.decode("utf-16"), False
        except UnicodeDecodeError:
            raise ConfigError(f"{file}: it begins as UTF-16 and then is not; save it as UTF-8.") from None
    if b"\0" in content[:4096]:
        raise ConfigError(f"{file}: it holds NUL bytes, as UTF-16 without its mark does; save it as UTF-8.")
    try:
        return content.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return content.decode("utf-8-sig", "surrogateescape"), True


def _see_encoding(file: Path, line: int, cells: Sequence[str | None]) -> None:
    """Raise :class:`ConfigError` where a cell is not what :func:`_decoded` could decode."""
    for cell in cells:
        try:
            (cell or "").encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{file}, line {line}: this is not UTF-8 (a byte is 0x{ord((cell or '')[error.start]) & 0xFF:02x}; it "
                "may be cp1252 or Latin-1); save the file as UTF-8, in Excel as 'CSV UTF-8'."
            ) from None
