"""Data files: which belong to a split, their rows, and the line of what is wrong in them."""

import csv
import glob
import io
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets

from fedkrso_app.config import ConfigError, cache

logger = logging.getLogger("flwr")

_FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
# A sentence may well be "null" or "NA": only an empty cell is a missing one.
_CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}

_SCRATCH = "reading-"  # start of the names of folders


def find(root: Path, name: str, split: str, needed: bool = True) -> list[Path]:
    """The file ``<split>.<ext>`` of task ``name``, else the one ``<split>_<more>.<ext>``, else all shards.

    They are looked for in ``root/name`` and then in ``root``. Raises :class:`ConfigError` where several would do, and
    where there is none unless it is not ``needed``.
    """
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
    if not needed:
        return []
    found = ", ".join(sorted(f.name for f in root.iterdir())[:20]) or "nothing"
    wanted = f"{name}/{split}*.parquet (nor .csv, .jsonl, .json), nor one directly in it"
    raise ConfigError(f"data-dir = {str(root)!r} has no {wanted}. It holds: {found}.")


def read(files: Sequence[Path], skip: bool) -> datasets.Dataset:
    """The rows of ``files``, which are of one format.

    Broken lines of csv and jsonl are left out (and counted in the log) if ``skip``; else, and where a file cannot be
    read at all, :class:`ConfigError` names the file and the line.
    """
    kind, names = _FORMATS[files[0].suffix], ", ".join(map(str, files))
    paths = [glob.escape(str(f)) for f in files]  # datasets takes paths for patterns
    options = dict(_CSV) if kind == "csv" else {}
    # Its reader pads short rows of csv and shifts long ones, so they are looked at first.
    broken = _broken(files) if kind == "csv" else []
    for file in files if kind == "json" else ():
        _text(file)  # its reader finds out late, and raises an error that names no file
    try:
        if not broken:
            with _scratch() as folder:
                options |= {"cache_dir": folder, "keep_in_memory": True}
                return datasets.load_dataset(kind, data_files=paths, split="train", **options)  # type: ignore[arg-type]
    except Exception as error:  # each format's reader raises errors of its own
        broken = _broken(files)
        if not broken:
            reason = str(error.__cause__ or error)
            if re.search("to no data|No columns", reason) or not any(file.stat().st_size for file in files):
                raise ConfigError(f"{names}: there are no rows; put some in, or remove the file.") from error
            raise ConfigError(f"{names}: could not be read as {kind} ({reason}).") from error
    if not skip:
        more = f" (and {len(broken) - 1} more lines)" if len(broken) > 1 else ""
        raise ConfigError(f"{broken[0]}{more}; mend it, or leave such lines out by bad-rows='skip'.")
    warn(f"broken lines left out: {len(broken)}, the first: {broken[0]}")
    rows = [row for file in files for _, row in records(file) if isinstance(row, dict)]
    try:
        return _in_memory(rows, kind)
    except Exception as error:  # pandas and Arrow raise errors of their own
        raise ConfigError(f"{names}: what is left could not be read as {kind} ({error}).") from error


@contextmanager
def _scratch() -> Iterator[str]:
    """A folder for the copy that datasets makes of what it reads; it is gone as soon as the rows are in memory.

    Its own cache would keep the user's rows after the run. Only the owner can look into the folder. A process that was
    killed while it read leaves its folder; whoever reads next removes it after an hour.
    """
    cache().mkdir(parents=True, exist_ok=True)
    for leftover in cache().glob(f"{_SCRATCH}*"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > 3600:
                shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=cache(), ignore_cleanup_errors=True) as folder:
        yield folder


@lru_cache(maxsize=256)
def warn(message: str) -> None:
    """Log ``message`` once in this process, however often the file is read."""
    logger.warning(message)


def place(files: Sequence[Path], row: int) -> str:
    """Where row ``row`` (from 0, broken lines not counted) stands: ``file, line n``, or only its number."""
    at = row
    for file in files:
        if file.suffix not in (".csv", ".jsonl"):
            break
        for line, record in records(file):
            if isinstance(record, dict):
                if at == 0:
                    return f"{file}, line {line}"
                at -= 1
    return f"row {row + 1}"


def records(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, row) of a csv or jsonl file: the row by column, or a text that says what is wrong with the line.

    Lines count from 1, and a csv header is one. Raises :class:`ConfigError` for text that is not UTF-8, and for csv
    without commas.
    """
    text = _text(file)
    if file.suffix == ".csv":
        header = text.lstrip().partition("\n")[0]
        if "," not in header and (other := re.search("[;\t]", header)):
            raise ConfigError(f"{file}: {other[0]!r} stands between its columns; save the file with commas.")
        yield from _csv_records(list(io.StringIO(text, newline="")))
        return
    for line, part in enumerate(text.split("\n"), 1):
        if part.strip():
            try:
                row = json.loads(part)
                yield line, row if isinstance(row, dict) else "is not a JSON object"
            except ValueError as error:
                yield line, f"is not JSON ({error})"


def _text(file: Path) -> str:
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}, line {line}: this is not UTF-8; save the file with that encoding.") from None


def _csv_records(lines: list[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    csv.field_size_limit(2**31 - 1)  # a text may be long
    reader, skipped = csv.reader(lines, strict=True), 0
    header: list[str] = []
    while True:
        line = skipped + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"is not CSV ({error})"
            reader, skipped = csv.reader(lines[line:], strict=True), line  # an open quote takes in all that follows
            continue
        if not cells:
            continue  # a blank line
        if not header:
            header = cells
        elif len(cells) != len(header):
            yield line, f"has {len(cells)} cells where the header has {len(header)} (a text with a comma needs quotes)"
        else:
            yield line, dict(zip(header, cells, strict=True))


def _broken(files: Sequence[Path]) -> list[str]:
    """What is wrong, line by line, in csv and jsonl files."""
    checked = [file for file in files if file.suffix in (".csv", ".jsonl")]
    return [f"{f}, line {line}: {why}" for f in checked for line, why in records(f) if isinstance(why, str)]


def _in_memory(rows: list[dict[str, Any]], kind: str) -> datasets.Dataset:
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    if kind == "json" or not rows:
        return datasets.Dataset.from_dict(columns)
    import pandas  # here, because only broken files need it

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(row.values() for row in rows)
    text.seek(0)
    return datasets.Dataset.from_pandas(pandas.read_csv(text, **_CSV), preserve_index=False)
